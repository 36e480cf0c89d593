# Linear probe: linear classifiers on the frozen encoder.


rule linear_probe:
    input:
        PLAN.outputs("linear_probe"),


rule probe_encoder:
    input:
        unpack(PLAN.inputs("linear_probe")),
    output:
        **PLAN.output("linear_probe"),
    params:
        settings=PLAN.settings("linear_probe"),
        options=PLAN.options("linear_probe"),
    log:
        f"{RESULTS}/logs/{{experiment}}/seed{{seed}}/linear_probe.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{experiment}}/seed{{seed}}/linear_probe.tsv"
    threads: PLAN.threads("linear_probe")
    resources:
        **PLAN.resources("linear_probe"),
    shell:
        "{PYTHON:q} -m aps linear_probe --settings {params.settings:q} {params.options} 2>&1 | tee {log:q}"
