# Finetuning: the encoder and a linear head, on labels.


rule finetune:
    input:
        PLAN.outputs("finetune"),


use rule pretrain_encoder as finetune_encoder with:
    output:
        **PLAN.output("finetune"),
    wildcard_constraints:
        stage="finetune",
    priority: 0
    threads: PLAN.threads("finetune")
    resources:
        **PLAN.resources("finetune"),
