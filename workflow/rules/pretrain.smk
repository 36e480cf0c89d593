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
        prefix=PLAN.prefix,
        python=PLAN.python,
        study=lambda wildcards, resources: PLAN.config_options(),
        options=PLAN.options,
    log:
        f"{FOLDER}/logs/{{experiment}}/seed{{seed}}/{{stage}}.log",
    benchmark:
        f"{FOLDER}/benchmarks/{{experiment}}/seed{{seed}}/{{stage}}.tsv"
    wildcard_constraints:
        stage="pretrain",
    threads: PLAN.threads
    resources:
        **PLAN.resources("pretrain"),
    conda:
        "../envs/aps.yaml"
    container:
        PLAN.image()
    shell:
        "{params.prefix}{params.python:q} -m aps {wildcards.stage} {params.study} --experiment {wildcards.experiment}"
        " --seed {wildcards.seed} {params.options}"
        " --attempt {resources.attempt} --mistake {log:q}.mistake 2>&1 | tee {log:q}"
