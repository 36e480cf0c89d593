# Report: one page, one table, one set of figures over everything that ran.


rule report:
    input:
        unpack(PLAN.report_inputs),
    output:
        html=report(f"{PLAN.report}/report.html", caption="../report/report.rst", category="Results"),
        csv=report(f"{PLAN.report}/results.csv", caption="../report/table.rst", category="Results"),
    params:
        config=lambda wildcards, resources: PLAN.config_options(),
        folder=PLAN.report,
    log:
        f"{FOLDER}/logs/report.log",
    benchmark:
        f"{FOLDER}/benchmarks/report.tsv"
    localrule: PLAN.runs_here("report")
    threads: PLAN.threads_of("report")
    resources:
        **PLAN.resources("report"),
    shell:
        "{PYTHON:q} -m aps report {params.config} --out {params.folder:q} 2>&1 | tee {log:q}"
