# Report: one page, one table, one set of figures over everything that ran.


rule report:
    input:
        PLAN.metrics(),
    output:
        html=report(f"{REPORT}/report.html", caption="../report/report.rst", category="Results"),
        csv=report(f"{REPORT}/results.csv", caption="../report/table.rst", category="Results"),
    params:
        study=PLAN.digest(),
        config=lambda wildcards, resources: PLAN.config_options(),
        folder=REPORT,
    log:
        f"{RESULTS}/logs/report.log",
    benchmark:
        f"{RESULTS}/benchmarks/report.tsv"
    localrule: PLAN.runs_here("report")
    threads: PLAN.threads_of("report")
    resources:
        **PLAN.resources("report"),
    shell:
        "{PYTHON:q} -m aps report {params.config} --out {params.folder:q} 2>&1 | tee {log:q}"
