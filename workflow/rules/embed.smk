# Embed: the frozen encoder's features of the test images, their neighbours and a map of them.


rule embed:
    input:
        PLAN.outputs("embed"),


use rule pretrain_encoder as embed_encoder with:
    output:
        **PLAN.output("embed"),
    wildcard_constraints:
        stage="embed",
    priority: 0
    group:
        PLAN.group("embed")
    threads: PLAN.threads("embed")
    resources:
        **PLAN.resources("embed"),
