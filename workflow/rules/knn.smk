# kNN: the frozen encoder's features, nothing trained.


rule knn:
    input:
        PLAN.outputs("knn"),


use rule pretrain_encoder as knn_encoder with:
    output:
        **PLAN.output("knn"),
    wildcard_constraints:
        stage="knn",
    priority: 0
    group:
        PLAN.group("knn")
    threads: PLAN.threads("knn")
    resources:
        **PLAN.resources("knn"),
