# Jobs whose results were made with other settings, images or weights than the study's (aps/findings.py) have this
# rule's file among their inputs. So Snakemake runs them, whatever its records say.


rule outdated:
    output:
        touch(PLAN.outdated),
    localrule: True
