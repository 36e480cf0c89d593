# Results that are there, but were made of other settings, images or weights than the study's (aps/findings.py): their
# jobs have this rule's file among their inputs, so Snakemake runs them, whatever it remembers of them.


rule outdated:
    output:
        touch(PLAN.outdated),
    localrule: True
