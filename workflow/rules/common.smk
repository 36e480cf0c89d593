# What every rule file needs: the study, the paths, and nothing else. The package holds the logic.

import os
import sys
from pathlib import Path

from aps.errors import UserError
from aps.layout import study_folder
from aps.runtime import launch
from aps.workflow.forcing import force_by
from aps.workflow.plan import Plan, one_of
from aps.workflow.start import check_given_once
from snakemake.exceptions import WorkflowError

try:
    if workflow.is_main_process:
        check_given_once(sys.argv)
    PLAN = Plan.of(workflow, config)
except UserError as error:
    raise WorkflowError(str(error)) from None

PLAN.share(workflow)
if workflow.is_main_process:
    PLAN.warn_of_environment()
    for line in PLAN.explain():
        print(line, file=sys.stderr)

RESULTS = PLAN.written.results
FOLDER = study_folder(PLAN.written)

# A job that is asked to stop first saves its state. Snakemake must not end before it; params.start protects its shell.
launch.shield()
PLAN.open_door()

# For envs/aps.post-deploy.sh, which has no other way to know it.
os.environ.setdefault("APS_SOURCE", PLAN.repository())

if workflow.is_main_process and not PLAN.is_module:
    force_by(workflow, PLAN.force, PLAN.marks)


# Before the first job. A dry run does not call it, so any machine can plan. Nor does a module: the workflow that
# includes it has its own `onstart`.
onstart:
    try:
        PLAN.hold_results()
        PLAN.sweep()
        PLAN.check_environment(workflow.dag.needrun_jobs())
        PLAN.warn_of_image(workflow)
    except UserError as error:
        raise WorkflowError(str(error)) from None
    PLAN.forget_forced(workflow)


wildcard_constraints:
    experiment=one_of(PLAN.study.experiments),
    dataset=one_of(PLAN.datasets),
    seed=r"\d+",


onsuccess:
    PLAN.sweep()


onerror:
    PLAN.sweep()
