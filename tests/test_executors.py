"""Where jobs run is a profile's affair: another scheduler than Slurm, and a login node that must not be burdened.

LSF's bsub and bjobs are stand-ins that run a job at once; the generic executor, the profile and the rules are real.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from aps.settings.reading import load_study
from aps.workflow.plan import Plan

ROOT = Path(__file__).parent.parent
SITE = ROOT / "config/sites/example.yaml"
PAGE = (ROOT / "docs/cluster.md").read_text()

needs_generic = pytest.mark.skipif(
    find_spec("snakemake_executor_plugin_cluster_generic") is None,
    reason="needs snakemake-executor-plugin-cluster-generic (pip install it; docs/cluster.md, Other executors)",
)

STUDY = """
study: elsewhere
resources:
  default: {partition: short, account: lab, mem_mb: 3000, runtime: 30}
  knn: {gpus: 1, gpu_model: a100, cpus_per_gpu: 2}
defaults:
  dataset: {name: digits, train_limit: 64}
  stages: [pretrain, knn]
  encoder: {arch: micro, image_size: 16, patch_size: 4, dim: 24, depth: 1, heads: 3}
  pretrain: {batch_size: 32}
  knn: {k: [5]}
experiments:
  one: {}
  floor: {stages: [knn], encoder: {weights: random}}
"""

BSUB = """#!/bin/sh
echo "$*" >> {folder}/asked
for script in "$@"; do :; done
number=$(wc -l < {folder}/asked)
( sh "$script" > {folder}/$number.log 2>&1 && echo DONE > {folder}/$number || echo EXIT > {folder}/$number ) > /dev/null &
echo "Job <$number> is submitted to queue <short>."
"""
BJOBS = """#!/bin/sh
for number in "$@"; do :; done
cat {folder}/$number 2>/dev/null || echo RUN
"""

BLOCKER = """
import sys
from importlib.machinery import ModuleSpec
class Blocker:
    def find_spec(self, name, path=None, target=None):  # to ask whether a package is there is fine
        if name in ("torch", "torchvision", "timm", "mlflow", "detectron2", "sklearn", "matplotlib"):
            return ModuleSpec(name, self)
    def create_module(self, spec):
        open({trace!r}, "a").write(spec.name + chr(10))
        raise ImportError(spec.name + " is not for login nodes")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The repository as a folder of links."""
    for name in ("Snakefile", "workflow", "profiles", "slurm", "config", "aps"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path


def snakemake(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments],
        cwd=folder,
        env=os.environ | {"MLFLOW_TRACKING_URI": "none", "APS_DEVICE": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@needs_generic
def test_a_dry_run_plans_the_whole_study_for_lsf(checkout: Path) -> None:
    done = snakemake(checkout, "--profile", "profiles/lsf", "--configfile", "study.yaml", "-n", "all")
    assert done.returncode == 0, done.stdout
    assert {"pretrain_encoder", "knn_encoder", "report"} <= set(re.findall(r"^(\w+) +[12]$", done.stdout, re.MULTILINE))


@needs_generic
@pytest.mark.slow
def test_lsf_runs_a_stage_with_what_it_asks_for(checkout: Path) -> None:
    programs = checkout / "bin"
    programs.mkdir()
    for name, text in (("bsub", BSUB), ("bjobs", BJOBS)):
        (programs / name).write_text(text.format(folder=programs))
        (programs / name).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    arguments = ["--profile", "profiles/lsf", "--configfile", "study.yaml", "--seconds-between-status-checks", "1"]
    done = snakemake(
        checkout, *arguments, "--latency-wait", "5", "results/elsewhere/floor/seed0/knn/metrics.json", PATH=path
    )
    assert done.returncode == 0, done.stdout + "".join(f.read_text() for f in programs.glob("*.log"))
    (asked,) = (programs / "asked").read_text().splitlines()
    assert "-n 2 -R span[hosts=1] -M 3000MB -R rusage[mem=3000MB] -W 30 -q short -P lab -gpu num=1:gmodel=a100" in asked
    assert (checkout / "results/elsewhere/floor/seed0/knn/metrics.json").exists()


def test_no_rule_names_a_scheduler() -> None:
    for file in ROOT.glob("workflow/rules/*.smk"):
        assert not re.search(r"slurm|sbatch|lsf|bsub", file.read_text(), re.IGNORECASE), file


def test_planning_the_whole_paper_for_a_cluster_imports_nothing_heavy(checkout: Path) -> None:
    """On real Snakemake: an import of these fails and leaves a trace, though whoever imports may catch the failure."""
    blocker = checkout / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(BLOCKER.format(trace=str(checkout / "imported")))
    arguments = ["--profile", "slurm", "--configfile", "config/paper.yaml", "-n", "all"]
    done = snakemake(checkout, *arguments, PYTHONPATH=str(blocker))
    imported = checkout / "imported"
    assert not imported.exists(), imported.read_text()
    assert done.returncode == 0 and "pretrain_encoder" in done.stdout, done.stdout
    trial = subprocess.run(
        [sys.executable, "-c", "import torch"], env=os.environ | {"PYTHONPATH": str(blocker)}, stderr=subprocess.DEVNULL
    )
    assert trial.returncode != 0 and imported.read_text() == "torch\n"  # the blocker blocks


@pytest.mark.parametrize("study", ["config.yaml", "cifar.yaml", "imagenet.yaml", "coco.yaml", "paper.yaml"])
def test_the_example_of_a_site_lies_over_every_study(study: str) -> None:
    plan = Plan.load([ROOT / "config" / study, SITE], {})
    for name, experiment in plan.study.experiments.items():
        for stage in experiment.stages:
            assert plan.study.stage_resources(stage, name).account == "mylab"


def test_the_example_of_a_site_explains_every_resource() -> None:
    from aps.settings.blocks import ResourceSettings

    text = SITE.read_text()
    missing = [key for key in ResourceSettings.model_fields if key != "processes" and f"{key}:" not in text]
    assert not missing


def test_the_documented_layers_override_as_the_page_says(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(resources:.*?)```", PAGE, re.DOTALL)
    (tmp_path / "site.yaml").write_text(block)
    study = load_study([ROOT / "config/cifar.yaml", tmp_path / "site.yaml"])
    base, tiny = (study.stage_resources("pretrain", f"cifar10-{size}-1600") for size in ("base", "tiny"))
    assert (base.gpus, base.nodes, base.gpu_model, base.account) == (8, 2, "a100", "mylab")
    assert (tiny.gpus, tiny.nodes, tiny.cpus_per_gpu) == (4, None, 8)
