# Pretraining: from images alone to an encoder. The other stages' rules are this one with other files.


rule pretrain:
    input:
        PLAN.outputs("pretrain"),


rule pretrain_encoder:
    input:
        unpack(PLAN.inputs),
    output:
        **PLAN.output("pretrain"),
    params:
        settings=PLAN.settings,
        options=PLAN.options,
    log:
        f"{RESULTS}/logs/{{experiment}}/seed{{seed}}/{{stage}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{experiment}}/seed{{seed}}/{{stage}}.tsv"
    wildcard_constraints:
        stage="pretrain",
    threads: PLAN.threads
    resources:
        **PLAN.resources("pretrain"),
    shell:
        "{PYTHON:q} -m aps {wildcards.stage} --settings {params.settings:q} {params.options} 2>&1 | tee {log:q}"
