# What every rule file needs: the study, the paths, and nothing else. The package holds the logic.

import re
import sys
from pathlib import Path

from aps.errors import UserError
from aps.runtime import launch
from aps.workflow.forcing import force_by
from aps.workflow.plan import Plan
from snakemake.exceptions import WorkflowError

try:
    PLAN = Plan.load(workflow.config_settings.configfiles, workflow.config_settings.config)
    PLAN.is_main = workflow.is_main_process
except UserError as error:
    raise WorkflowError(str(error)) from None

if workflow.is_main_process:
    PLAN.warn_of_environment()
    print(*PLAN.explain(), sep="\n", end="\n" if PLAN.explain() else "", file=sys.stderr)

RESULTS = PLAN.study.results
FOLDER = PLAN.folder
PYTHON = sys.executable

# A job that is asked to stop saves its state first: Snakemake, the shell and tee have to outlive it.
launch.shield()
shell.prefix(launch.SHELL_PREFIX)

if workflow.is_main_process:
    force_by(workflow, PLAN.force)


# Before the first job of a real run; a dry run does not come here, and plans on any machine.
onstart:
    try:
        PLAN.hold_results()
        PLAN.sweep()
        PLAN.check_environment(workflow.dag.needrun_jobs())
    except UserError as error:
        raise WorkflowError(str(error)) from None
    PLAN.forget_forced(workflow)


wildcard_constraints:
    experiment="|".join(map(re.escape, PLAN.study.experiments)),
    dataset="|".join(map(re.escape, PLAN.study.dataset_names())),
    seed=r"\d+",


onsuccess:
    PLAN.sweep()


onerror:
    PLAN.sweep()
