# Detection: Mask R-CNN on the encoder (COCO transfer). The longest evaluation: its priority is that of pretraining.


rule detection:
    input:
        PLAN.outputs("detection"),


use rule pretrain_encoder as detection_encoder with:
    output:
        **PLAN.output("detection"),
    wildcard_constraints:
        stage="detection",
    threads: PLAN.threads("detection")
    resources:
        **PLAN.resources("detection"),
