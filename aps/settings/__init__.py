"""Settings: keys, types, ranges, defaults and descriptions, and how a study's YAML is read into them.

    base.py       the base class of every block, and the types of numbers
    blocks.py     the blocks, each field with its description
    study.py      experiments, studies and one stage's settings, made of the blocks
    reading.py    YAML, includes, inheritance: `load_study`
    checks.py     checks that need more than one block
    sentences.py  a failed validation as one sentence
    reference.py  the tables of config/README.md and the schema for editors, made from the blocks

No module here imports torch, data or models, because the DAG is planned on a login node. The settings of a component are
checked by the component (`aps.registry.CHECKS`, `aps.stages`).
"""
