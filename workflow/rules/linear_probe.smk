# Linear probe: linear classifiers on the frozen encoder.


rule linear_probe:
    input:
        PLAN.outputs("linear_probe"),


use rule pretrain_encoder as linear_probe_encoder with:
    output:
        **PLAN.output("linear_probe"),
    wildcard_constraints:
        stage="linear_probe",
    priority: 0
    group:
        PLAN.group("linear_probe")
    threads: PLAN.threads("linear_probe")
    resources:
        **PLAN.resources("linear_probe"),
