# What every rule file needs: the study, the paths, and nothing else. The package holds the logic.

import re
import sys
from pathlib import Path

from aps.errors import UserError
from aps.runtime import launch
from aps.workflow.forcing import translate_forced_targets
from aps.workflow.plan import RULE_OF_TARGET, Plan
from snakemake.exceptions import WorkflowError

try:
    PLAN = Plan.load(workflow.config_settings.configfiles, workflow.config_settings.config)
except UserError as error:
    raise WorkflowError(str(error)) from None

if workflow.is_main_process:
    PLAN.warn_of_environment()

STUDY = PLAN.study.study
RESULTS = PLAN.study.results
REPORT = f"{RESULTS}/report/{STUDY}"
PYTHON = sys.executable

# A job that is asked to stop saves its state first: Snakemake, the shell and tee have to outlive it.
launch.shield()
shell.prefix(launch.SHELL_PREFIX)

translate_forced_targets(workflow, RULE_OF_TARGET)


# Before the first job of a real run; a dry run does not come here, and plans on any machine.
onstart:
    try:
        PLAN.hold_results()
        PLAN.check_environment(workflow.dag.needrun_jobs())
    except UserError as error:
        raise WorkflowError(str(error)) from None
    PLAN.forget_forced(workflow)


wildcard_constraints:
    experiment="|".join(map(re.escape, PLAN.study.experiments)),
    dataset="|".join(PLAN.study.datasets()),
    seed=r"\d+",
