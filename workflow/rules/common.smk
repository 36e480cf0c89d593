# What every rule file needs: the study, the paths, and nothing else. The package holds the logic.

import os
import sys
from pathlib import Path

from aps import launch
from aps.dag import Plan
from aps.errors import UserError
from snakemake.exceptions import WorkflowError

try:
    PLAN = Plan.load(workflow.config_settings.configfiles, workflow.config_settings.config)
except UserError as error:
    raise WorkflowError(str(error)) from None

STUDY = PLAN.study.study
RESULTS = PLAN.study.results
REPORT = f"{RESULTS}/report/{STUDY}"
PYTHON = sys.executable
os.environ["MLFLOW_TRACKING_URI"] = PLAN.tracking_uri

# A job that is asked to stop saves its state first: Snakemake, the shell and tee have to outlive it.
launch.shield()
shell.prefix(launch.SHELL_PREFIX)

# A target rule has no wildcards, so Snakemake cannot force the jobs behind it: `--forcerun finetune` means them.
if workflow.dag_settings is not None:
    workflow.dag_settings.forcerun = PLAN.forced_rules(workflow.dag_settings.forcerun)


wildcard_constraints:
    experiment="|".join(PLAN.study.experiments),
    dataset="|".join(PLAN.study.datasets()),
    seed=r"\d+",
