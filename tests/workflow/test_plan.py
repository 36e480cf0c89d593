"""The DAG on real Snakemake: targets, plans without data, and what a changed setting reruns.

Plans run over outputs that are pretended to be finished: small files, and `--touch` for Snakemake's own records.
test_end_to_end runs the same study for real.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from tiny_study import STUDY, checkout, pretend_finished, pretend_prepared, put

from aps.errors import UserError
from aps.seals import seal
from aps.settings.reading import load_study
from aps.stages import STAGES
from aps.workflow.plan import RULE_OF_TARGET as JOB_RULES
from aps.workflow.plan import Plan

pytestmark = pytest.mark.end_to_end

TARGETS = ("data", *STAGES, "report", "all")
ORDER = (
    "input",
    "output",
    "params",
    "log",
    "benchmark",
    "wildcard_constraints",
    "priority",
    "threads",
    "resources",
    "conda",
    "container",
    "shell",
)
HEAVY = ("torch", "torchvision", "timm", "mlflow", "sklearn", "matplotlib")


def snakemake(folder: Path, *arguments: str, check: bool = True, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        timeout=120,
        text=True,
    )
    assert not check or run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def plan(folder: Path, *arguments: str, **changes: object) -> set[str]:
    """`RULE EXPERIMENT` of every job that `snakemake -n` would run, without the targets' own; `changes` by dotted key."""
    study = STUDY
    for key, value in changes.items():
        study = put(study, tuple(key.split("__")), value)
    (folder / "changed.yaml").write_text(yaml.safe_dump(study))
    text = snakemake(folder, *arguments, "--configfile", "changed.yaml", "-n")
    jobs = re.findall(r"^(?:local)?rule (\w+):\n((?: +\S.*\n)+)", text, re.MULTILINE)
    assert jobs or "Nothing to be done" in text, text
    named = [(rule, re.search(r"wildcards: (?:experiment|dataset)=([\w-]+)", body)) for rule, body in jobs]
    return {f"{rule} {found.group(1)}" if found else rule for rule, found in named} - {
        "all",
        *STAGES,
        "data",
        "outdated",
    }


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which nothing has run."""
    return checkout(tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which everything seems to have run."""
    folder = checkout(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pretend_finished(load_study(["study.yaml"]))
    return folder


FINETUNINGS = {"finetune_encoder aps", "finetune_encoder floor"}
ON_PRETRAINING = {f"{JOB_RULES[stage]} aps" for stage in STUDY["experiments"]["aps"]["stages"]}


def test_nothing_is_done_where_all_is_finished(finished: Path) -> None:
    assert plan(finished) == set()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("defaults__finetune__lr", 0.5, {*FINETUNINGS, "report"}),
        ("experiments__floor__finetune", {"lr": 0.5}, {"finetune_encoder floor", "report"}),
        ("defaults__pretrain__epochs", 3, {*ON_PRETRAINING, "report"}),
        ("defaults__knn__k", [3], {"knn_encoder aps", "knn_encoder floor", "report"}),
        ("experiments__aps__description", "the method", {"report"}),
        ("resources", {"default": {"threads": 2, "mem_mb": 900, "runtime": 5}, "pretrain": {"gpus": 1}}, set()),
        ("experiments__aps__resources", {"knn": {"workers": 2, "partition": "long"}}, set()),
        ("sources", {"digits": {"path": "/elsewhere", "download": False}}, set()),
        ("tracking_uri", "http://127.0.0.1:9", set()),
    ],
)
def test_a_changed_setting_reruns_what_depends_on_it_and_nothing_else(
    finished: Path, key: str, value: object, expected: set[str]
) -> None:
    assert plan(finished, **{key: value}) == expected


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_as_a_target_is_made_again_like_its_rule(finished: Path, stage: str) -> None:
    target = f"results/tiny/aps/seed0/{stage}/metrics.json"
    assert plan(finished, target) == set()
    own = {f"{JOB_RULES[stage]} aps"}
    assert plan(finished, target, defaults__pretrain__epochs=3) == {"pretrain_encoder aps"} | own
    key, value = ("queries", 3) if stage == "embed" else ("precision", "bf16")
    assert plan(finished, target, **{f"defaults__{stage}__{key}": value}) == own


def test_a_missing_evaluation_makes_its_old_encoder_first(tmp_path: Path, finished: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    shutil.rmtree(folder / "results/tiny/aps/seed0/knn")
    both = {"pretrain_encoder aps", "knn_encoder aps"}
    assert plan(folder, "results/tiny/aps/seed0/knn/metrics.json", defaults__pretrain__epochs=3) == both
    assert plan(folder, "knn", defaults__pretrain__epochs=3) == both


def test_a_report_that_is_missing_is_made_of_results_of_this_study(tmp_path: Path, finished: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    shutil.rmtree(folder / "results/tiny/report")
    for target in ("report", "results/tiny/report/report.html"):
        assert plan(folder, target) == {"report"}
        assert plan(folder, target, defaults__knn__k=[3]) == {"report", "knn_encoder aps", "knn_encoder floor"}


def test_old_images_and_an_old_report_are_made_again_by_their_files(tmp_path: Path, finished: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    assert plan(folder, "results/tiny/report/report.html") == set()
    pretend_prepared(folder / "results/data/digits/manifest.json", "other images")
    assert "report" in plan(folder, "results/tiny/report/report.html")


def test_another_tracking_server_in_the_environment_reruns_no_stage(finished: Path) -> None:
    text = snakemake(finished, "-n", "--configfile", "study.yaml", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert "Nothing to be done" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("finetune", "--forcerun", "finetune"), FINETUNINGS),
        (("all", "--forcerun", "finetune"), {*FINETUNINGS, "report"}),
        (("knn", "--forcerun", "pretrain", "knn"), {"pretrain_encoder aps", "knn_encoder aps", "knn_encoder floor"}),
        (("report", "--forcerun", "report"), {"report"}),
        (("results/tiny/aps/seed0/knn/metrics.json", "--force"), {"knn_encoder aps"}),
    ],
)  # fmt: skip
def test_forcing_a_stage_reruns_its_jobs_and_what_was_asked_for(
    finished: Path, arguments: tuple[str, ...], expected: set[str]
) -> None:
    """The report is made again where it is asked for (`all`, `report`), else it stays as it is."""
    assert plan(finished, *arguments) == expected


def test_results_copied_without_times_and_without_snakemakes_records_are_not_computed_again(
    tmp_path: Path, finished: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "moved", symlinks=True, copy_function=shutil.copy)
    shutil.rmtree(folder / ".snakemake", ignore_errors=True)
    for number, file in enumerate((folder / "results").rglob("*.json")):
        os.utime(file, (1 + number, 1 + number))
    assert plan(folder) == set()


def test_the_plan_says_in_a_line_why_a_result_is_made_again(finished: Path) -> None:
    (finished / "changed.yaml").write_text(yaml.safe_dump(put(STUDY, ("defaults", "pretrain", "epochs"), 999)))
    text = snakemake(finished, "-n", "--configfile", "changed.yaml")
    assert "pretrain aps/seed0: pretrain.epochs 2 -> 999" in text
    assert "knn aps/seed0: its encoder: other settings: pretrain.epochs 2, now 999" in text
    assert '{"dataset"' not in text  # no settings as JSON


def damaged(folder: Path, name: str, content: bytes | None) -> None:
    file = folder / "results/tiny/aps/seed0" / name
    file.write_bytes(content) if content is not None else file.unlink()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("knn/metrics.json", b"", {"knn_encoder aps", "report"}),
        ("knn/metrics.json", b"[1]", {"knn_encoder aps", "report"}),
        ("knn/metrics.json", None, {"knn_encoder aps", "report"}),
        ("finetune/model.safetensors", b"short", {"finetune_encoder aps", "report"}),
        ("pretrain/encoder.safetensors", b"", {*ON_PRETRAINING, "report"}),
    ],
)
def test_a_damaged_result_is_made_again(
    tmp_path: Path, finished: Path, name: str, content: bytes | None, expected: set[str]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    damaged(folder, name, content)
    assert plan(folder) == expected


def test_other_images_run_everything_again_that_was_made_of_them(tmp_path: Path, finished: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    pretend_prepared(folder / "results/data/digits/manifest.json", "other images")
    assert plan(folder) == {*ON_PRETRAINING, "finetune_encoder floor", "knn_encoder floor", "report"}


def test_another_study_in_the_same_folder_is_planned_as_if_it_were_alone(tmp_path: Path, finished: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    everything = plan(folder, study="second")
    assert {
        f"{STAGES[stage].rule} {name}" for name, _, stage in load_study([folder / "study.yaml"]).jobs()
    } < everything
    assert plan(folder) == set()


def test_an_experiment_more_runs_that_experiment_and_the_report(finished: Path) -> None:
    more = {"inherits": "aps", "stages": ["knn"], "encoder": {"weights": "experiment:aps"}, "knn": {"k": [7]}}
    assert plan(finished, experiments__more=more) == {"knn_encoder more", "report"}


FINETUNED = {
    "stages": ["knn"],
    "inherits": "aps",
    "encoder": {"weights": "./results/tiny/floor/seed0/finetune/model.safetensors"},
}


def test_weights_that_a_run_of_the_study_writes_are_made_first(empty: Path, tmp_path: Path) -> None:
    target = "results/tiny/more/seed0/knn/metrics.json"
    assert plan(empty, target, experiments__more=FINETUNED) == {
        "prepare_dataset digits",
        "finetune_encoder floor",
        "knn_encoder more",
    }
    folder = checkout(tmp_path, put(STUDY, ("experiments", "more"), FINETUNED))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pretend_finished(load_study(["study.yaml"]))
    assert plan(folder, target, experiments__more=FINETUNED) == set()
    changed = {"experiments__more": FINETUNED, "experiments__floor__finetune": {"lr": 0.5}}
    assert plan(folder, target, **changed) == {"finetune_encoder floor", "knn_encoder more"}
    shutil.rmtree(folder / "results/tiny/floor/seed0/finetune")
    assert plan(folder, target, experiments__more=FINETUNED) == set()  # what was asked for is there and right
    metrics = json.loads((folder / target).read_text())  # a real one says what its encoder was made by
    metrics["encoder"]["settings_digest"] = (
        load_study([folder / "study.yaml"]).stage_settings("floor", 0, "finetune").digest
    )
    (folder / target).write_text(json.dumps(seal(metrics)))
    assert plan(folder, target, experiments__more=FINETUNED) == set()
    assert plan(folder, target, **changed) == {"finetune_encoder floor", "knn_encoder more"}
    pretend_prepared(folder / "results/data/digits/manifest.json", "other images")
    assert plan(folder, target, experiments__more=FINETUNED) == {"finetune_encoder floor", "knn_encoder more"}


# --------------------------------------------------------------------------------------------------
# Planning.


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_planned_without_data(empty: Path, target: str) -> None:
    jobs = plan(empty, target)
    rules = {job.split()[0] for job in jobs}
    if target == "data":
        assert jobs == {"prepare_dataset digits", "prepare_dataset digits_coco"}
    elif target in STAGES:
        upstream = {"prepare_dataset", "pretrain_encoder", JOB_RULES[target]}
        assert rules == upstream
    else:
        assert rules == {*JOB_RULES.values(), "report"}


def test_every_result_file_is_a_target(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(empty)
    whole = Plan.load(["study.yaml"], {})
    stages = [file for stage in STAGES for file in whole.outputs(stage)]
    report = ["results/tiny/report/report.html", "results/tiny/report/results.csv"]
    assert plan(empty, *whole.manifests(), *stages, *report) == plan(empty)
    floor = plan(empty, "results/tiny/floor/seed0/knn/metrics.json")
    assert floor == {"prepare_dataset digits", "knn_encoder floor"}


@pytest.mark.parametrize("option", ["--dag", "--rulegraph"])
def test_the_graph_is_drawn_without_data(empty: Path, option: str) -> None:
    text = snakemake(empty, option, "dot", "--configfile", "study.yaml")
    assert "digraph" in text and all(rule in text for rule in JOB_RULES.values())


def test_planning_imports_nothing_heavy(empty: Path) -> None:
    code = (
        "import sys; from snakemake.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print('heavy:', [m for m in {HEAVY} if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "-n", "--quiet", "--configfile", "study.yaml"],
        cwd=empty, capture_output=True, text=True,
    )  # fmt: skip
    assert "heavy: []" in run.stdout, run.stdout + run.stderr


def test_every_study_of_the_project_is_planned(empty: Path) -> None:
    studies = sorted(file.name for file in (empty / "config").glob("*.yaml") if file.name != "published.yaml")
    assert "paper.yaml" in studies
    text = snakemake(empty, "-n", "--quiet", "rules", "--configfile", "config/paper.yaml")
    assert re.search(r"^all +1$", text, re.MULTILINE), text


def test_config_given_to_snakemake_reaches_the_stages(empty: Path) -> None:
    arguments = ("--config", "defaults={knn: {k: [11], temperature: 1e-2}}", "study=other")
    text = snakemake(empty, "-n", "-p", "--configfile", "study.yaml", *arguments)
    given = """--set 'defaults={"knn": {"k": [11], "temperature": 0.01}}' 'study="other"'"""
    assert all(given in line for line in re.findall(r"-m aps knn .*", text)) and "-m aps knn" in text
    assert "results/other/report/report.html" in text
    (report,) = re.findall(r"-m aps (report .*) --out", text)
    assert """--set 'defaults={"knn": {"k": [11], "temperature": 0.01}}' 'study="other"'""" in report


def test_a_wrong_setting_stops_before_the_first_job_with_its_sentence(empty: Path) -> None:
    text = snakemake(empty, "-n", "--configfile", "study.yaml", "--config", "defaults={knn: {kk: 3}}", check=False)
    assert "study.yaml: experiment 'aps': unknown key 'knn.kk'; did you mean 'knn.k'?" in text
    assert "Traceback" not in text


def test_too_few_images_are_refused_when_they_are_prepared_and_before_anything_trains(tmp_path: Path) -> None:
    held = {"stages": ["pretrain", "finetune"], "finetune": {"batch_size": 2, "holdout": 0.1}}
    study = {"study": "few", "datasets": {"few": {"arrays": "few.npz"}}, "defaults": STUDY["defaults"]}
    small = {"dataset": {"name": "few", "train_limit": None}, "pretrain": {"batch_size": 2}}
    folder = checkout(tmp_path, study | {"experiments": {"e": held | small}})
    labels = np.arange(10) % 2
    np.savez(folder / "few.npz", images=np.arange(640).reshape(10, 8, 8).astype(np.uint8), labels=labels)
    sentence = "experiment 'e': finetune.holdout 0.05 of 8 training images keeps none aside; raise it"
    share = ("--config", "experiments={e: {finetune: {holdout: 0.05}}}")
    text = snakemake(folder, "all", "--cores", "1", "--configfile", "study.yaml", *share, check=False)
    assert f"error: {sentence}" in text and "rule pretrain_encoder:" not in text, text
    assert not (folder / "results/few/e").exists()
    (copy,) = (folder / "results/data").glob("few-*/prepared.json")
    shutil.copy(copy, copy.with_name("manifest.json"))
    text = snakemake(folder, "all", "-n", "--configfile", "study.yaml", *share, check=False)
    assert sentence in text and "Traceback" not in text, text


def test_every_rule_of_a_job_declares_all_of_it(empty: Path) -> None:
    """Log, benchmark, threads, resources, params; the command is one verb."""
    for file in sorted((empty / "workflow/rules").glob("*.smk")):
        for name, body in re.findall(r"^rule (\w+):\n((?:    .*\n|\n)+)", file.read_text(), re.MULTILINE):
            if "shell:" not in body or name == "outdated":
                continue  # a target, and what only marks others
            parts = [part for part in re.findall(r"^    (\w+):", body, re.MULTILINE) if part != "localrule"]
            needed = {"output", "params", "log", "benchmark", "threads", "resources", "shell"}
            assert needed <= set(parts), (name, needed - set(parts))
            assert len(re.findall(r"-m aps (?:\w+|\{wildcards\.stage\}) ", body)) == 1 and "| tee {log:q}" in body, name
            assert parts == [part for part in ORDER if part in parts], name


def test_stages_that_others_wait_for_and_the_longest_start_first(empty: Path) -> None:
    text = snakemake(empty, "all", "-n", "--cores", "2")
    jobs = re.findall(r"^rule (\w+_encoder):\n((?: +\S.*\n)+)", text, re.MULTILINE)
    first = {rule for rule, body in jobs if "priority: 1" in body}
    assert first == {"pretrain_encoder", "detection_encoder"} and {rule for rule, _ in jobs} > first


def test_resources_and_threads_come_from_the_study(empty: Path) -> None:
    resources = {"default": {"mem_mb": 700, "runtime": 7}, "knn": {"threads": 2, "mem_mb": 900}}
    (empty / "resources.yaml").write_text(yaml.safe_dump(STUDY | {"resources": resources}))
    text = snakemake(
        empty, "results/tiny/floor/seed0/knn/metrics.json", "-n", "--cores", "2", "--configfile", "resources.yaml"
    )
    body = re.search(r"rule knn_encoder:\n((?: +\S.*\n)+)", text).group(1)  # type: ignore[union-attr]
    assert "threads: 2" in body and "mem_mb=900" in body and "runtime=7" in body
    assert "log: results/tiny/logs/floor/seed0/knn.log" in body
    assert "benchmark: results/tiny/benchmarks/floor/seed0/knn.tsv" in body


# --------------------------------------------------------------------------------------------------
# The plan itself.


def test_options_are_quoted_for_the_shell(tmp_path: Path) -> None:
    study = tmp_path / "a study.yaml"
    study.write_text(yaml.safe_dump(STUDY | {"sources": {"digits": {"path": "/my images", "download": False}}}))
    whole = Plan.load([study], {"defaults": {"knn": {"k": [1]}}})
    assert whole.source_options(SimpleNamespace(dataset="digits"), None) == "--source '/my images' --no-download"
    assert whole.source_options(SimpleNamespace(dataset="digits_coco"), None) == ""
    assert whole.config_options == f"--configfile '{study}' --set 'defaults={{\"knn\": {{\"k\": [1]}}}}'"


def test_text_that_is_no_yaml_in_config_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    with pytest.raises(UserError, match="--config defaults: not valid YAML"):
        Plan.load([tmp_path / "study.yaml"], {"defaults": {"knn": "[1"}})


def test_a_process_that_runs_one_job_looks_at_no_result_and_no_folder_of_images(empty: Path) -> None:
    """On a cluster each job reads the Snakefile again, and with it what all targets need."""
    made = Plan.load([empty / "study.yaml"], {})
    made.is_main, made.findings = False, None  # type: ignore[assignment]
    assert made.manifests() and made.everything() and made.pages()


SLURM = ("--profile", "slurm", "-n", "knn", "--configfile", "sweep.yaml")


def test_a_sweep_over_one_encoder_is_jobs_of_ten_runs_at_most(tmp_path: Path) -> None:
    """By the line of the Slurm profile, and of those that users have written after it."""
    folder = checkout(tmp_path)
    knn = {"stages": ["knn"], "encoder": {"weights": "experiment:p"}}
    experiments = {f"k{k}": knn | {"knn": {"k": [k]}} for k in range(1, 14)}
    experiments["k13"] = experiments["k13"] | {"resources": {"knn": {"partition": "long"}}}
    study = {
        "study": "sweep",
        "resources": {"default": {"partition": "normal", "runtime": 3}},
        "defaults": {"dataset": "digits"},
        "experiments": {"p": {"stages": ["pretrain"]}} | experiments,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(study))
    text = snakemake(folder, *SLURM)
    groups = re.findall(r"Group job k1_seed0_evaluation .*\n((?: .*\n|\n)+)", text)
    assert sorted(group.count("rule knn_encoder:") for group in groups) == [2, 10]
    assert all(group.count("turn=1") == group.count("rule knn_encoder:") for group in groups)
    (alone,) = re.findall(r"^rule knn_encoder:\n(?: +\S.*\n)+", text, re.MULTILINE)
    assert "experiment=k13" in alone and "slurm_partition=long" in alone and "turn" not in alone
