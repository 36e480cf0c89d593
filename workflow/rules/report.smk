# Report: one page, one table, one set of figures over everything that ran.


rule report:
    input:
        unpack(PLAN.report_inputs),
    output:
        html=report(f"{FOLDER}/report/report.html", caption="../report/report.rst", category="Results"),
        csv=report(f"{FOLDER}/report/results.csv", caption="../report/table.rst", category="Results"),
        figures=report(
            directory(f"{FOLDER}/report/figures"),
            patterns=["{category}/{name}.png"],
            caption="../report/figure.rst",
            category="{category}",
            labels={"figure": "{name}"},
        ),
    params:
        start=PLAN.start,
        study=lambda wildcards, resources: PLAN.config_options,
        folder=lambda wildcards, output: Path(output.html).parent,
    log:
        f"{FOLDER}/logs/report.log",
    benchmark:
        f"{FOLDER}/benchmarks/report.tsv"
    localrule: PLAN.runs_here("report")
    threads: PLAN.threads("report")
    resources:
        **PLAN.resources("report"),
    conda:
        "../envs/aps.yaml"
    container:
        PLAN.image()
    shell:
        "{params.start} -m aps report {params.study} --out {params.folder:q}"
        " --attempt {resources.attempt} --mistake {log:q}.mistake 2>&1 | tee {log:q}"
