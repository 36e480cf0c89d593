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
        start=PLAN.start,
        options=PLAN.options,
    log:
        f"{FOLDER}/logs/{{experiment}}/seed{{seed}}/{{stage}}.log",
    benchmark:
        f"{FOLDER}/benchmarks/{{experiment}}/seed{{seed}}/{{stage}}.tsv"
    wildcard_constraints:
        stage="pretrain",
    priority: 1  # other stages wait for it
    threads: PLAN.threads("pretrain")
    resources:
        **PLAN.resources("pretrain"),
    conda:
        "../envs/aps.yaml"
    container:
        PLAN.image()
    shell:
        "{params.start} -m aps {wildcards.stage} --experiment {wildcards.experiment} --seed {wildcards.seed}"
        " {params.options} --attempt {resources.attempt} --mistake {log:q}.mistake 2>&1 | tee {log:q}"
