# Datasets: what has to exist before anything trains.


rule data:
    input:
        PLAN.manifests(),


rule prepare_dataset:
    input:
        unpack(PLAN.data_inputs),
    output:
        manifest=f"{RESULTS}/data/{{dataset}}/manifest.json",
    params:
        prefix=PLAN.prefix,
        python=PLAN.python,
        # depends on resources only so that Snakemake does not take a moved source for a changed result
        source=lambda wildcards, resources: PLAN.source_options(wildcards.dataset),
        folder=lambda wildcards, output: Path(output.manifest).parent,
    log:
        f"{RESULTS}/logs/data/{{dataset}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/data/{{dataset}}.tsv"
    localrule: PLAN.runs_here("data")
    threads: PLAN.threads_of("data")
    resources:
        **PLAN.resources("data"),
    conda:
        "../envs/aps.yaml"
    container:
        PLAN.image()
    shell:
        "{params.prefix}{params.python:q} -m aps data {wildcards.dataset} --configfile --out {params.folder:q} {params.source}"
        " --attempt {resources.attempt} --mistake {log:q}.mistake 2>&1 | tee {log:q}"
