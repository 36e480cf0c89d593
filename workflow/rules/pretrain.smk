# Pretraining: from images alone to an encoder.


rule pretrain:
    input:
        PLAN.outputs("pretrain"),


rule pretrain_encoder:
    input:
        unpack(PLAN.inputs("pretrain")),
    output:
        **PLAN.output("pretrain"),
    params:
        settings=PLAN.settings("pretrain"),
        options=PLAN.options("pretrain"),
    log:
        f"{RESULTS}/logs/{{experiment}}/seed{{seed}}/pretrain.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{experiment}}/seed{{seed}}/pretrain.tsv"
    threads: PLAN.threads("pretrain")
    resources:
        **PLAN.resources("pretrain"),
    shell:
        "{PYTHON:q} -m aps pretrain --settings {params.settings:q} {params.options} 2>&1 | tee {log:q}"
