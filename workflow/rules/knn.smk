# kNN: the frozen encoder's features, nothing trained.


rule knn:
    input:
        PLAN.outputs("knn"),


rule knn_encoder:
    input:
        unpack(PLAN.inputs("knn")),
    output:
        **PLAN.output("knn"),
    params:
        settings=PLAN.settings("knn"),
        options=PLAN.options("knn"),
    log:
        f"{RESULTS}/logs/{{experiment}}/seed{{seed}}/knn.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{experiment}}/seed{{seed}}/knn.tsv"
    threads: PLAN.threads("knn")
    resources:
        **PLAN.resources("knn"),
    shell:
        "{PYTHON:q} -m aps knn --settings {params.settings:q} {params.options} 2>&1 | tee {log:q}"
