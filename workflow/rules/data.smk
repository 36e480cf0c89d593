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
        start=PLAN.start,
        study=lambda wildcards, resources: PLAN.config_options,
        # takes `resources`, so that Snakemake does not see a moved source as a changed job
        source=PLAN.source_options,
        name=PLAN.dataset_name,
        folder=lambda wildcards, output: Path(output.manifest).parent,
    log:
        f"{RESULTS}/logs/data/{{dataset}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/data/{{dataset}}.tsv"
    localrule: PLAN.runs_here("data")
    threads: PLAN.threads("data")
    resources:
        **PLAN.resources("data"),
    conda:
        "../envs/aps.yaml"
    container:
        PLAN.image()
    shell:
        "{params.start} -m aps data {params.name} {params.study} --out {params.folder:q} {params.source}"
        " --attempt {resources.attempt} --mistake {log:q}.mistake 2>&1 | tee {log:q}"
