"""Settings: keys, types, ranges, defaults and descriptions, and how a study's YAML becomes them.

    base.py       what every block of settings has in common
    blocks.py     the blocks, each field with its description
    study.py      experiments, studies and one stage's settings, made of the blocks
    reading.py    YAML, includes, inheritance: `load_study`
    checks.py     what one block alone can't know
    sentences.py  a failed validation as one sentence
    reference.py  the tables of config/README.md and the schema for editors, made from the blocks

No room here imports torch, data or models: the DAG is planned on a login node. What a component knows of its own
geometry is checked by the component (`aps.registry.CHECKS`, `aps.stages`).
"""
