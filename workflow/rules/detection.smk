# Detection: Mask R-CNN on the encoder (COCO transfer).


rule detection:
    input:
        PLAN.outputs("detection"),


rule detect_encoder:
    input:
        unpack(PLAN.inputs("detection")),
    output:
        **PLAN.output("detection"),
    params:
        settings=PLAN.settings("detection"),
        options=PLAN.options("detection"),
    log:
        f"{RESULTS}/logs/{{experiment}}/seed{{seed}}/detection.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{experiment}}/seed{{seed}}/detection.tsv"
    threads: PLAN.threads("detection")
    resources:
        **PLAN.resources("detection"),
    shell:
        "{PYTHON:q} -m aps detection --settings {params.settings:q} {params.options} 2>&1 | tee {log:q}"
