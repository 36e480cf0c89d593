# Finetuning: the encoder and a linear head, on labels.


rule finetune:
    input:
        PLAN.outputs("finetune"),


rule finetune_encoder:
    input:
        unpack(PLAN.inputs("finetune")),
    output:
        **PLAN.output("finetune"),
    params:
        settings=PLAN.settings("finetune"),
        options=PLAN.options("finetune"),
    log:
        f"{RESULTS}/logs/{{experiment}}/seed{{seed}}/finetune.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{experiment}}/seed{{seed}}/finetune.tsv"
    threads: PLAN.threads("finetune")
    resources:
        **PLAN.resources("finetune"),
    shell:
        "{PYTHON:q} -m aps finetune --settings {params.settings:q} {params.options} 2>&1 | tee {log:q}"
