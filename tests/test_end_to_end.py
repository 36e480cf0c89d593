"""A tiny study run by Snakemake as a user runs it, every stage and the report, and what it leaves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from tiny_study import STUDY, checkout, put

from aps.data.load import load_split
from aps.data.manifest import Manifest
from aps.errors import UserError
from aps.findings import Findings
from aps.journal import read_history
from aps.layout import stage_folder
from aps.models.weights import read_tensors
from aps.settings.reading import load_study
from aps.stages import STAGES
from aps.tracking.describing import finals, metric_name
from aps.tracking.server import Server

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("end_to_end")]

STUDY_OBJECT = load_study([], STUDY)
JOBS = STUDY_OBJECT.jobs()
PICTURES = {
    "pretrain": ["views.png"], "finetune": ["confusion.png"], "knn": ["neighbours.png"], "embed": ["map.png"],
    "detection": ["predictions.png"],
}  # fmt: skip
FIELDS = {
    "stage", "experiment", "seed", "metrics", "settings", "settings_digest", "dataset", "encoder", "started", "finished",
    "wall_seconds", "mlflow_run_id", "mlflow_complete", "version", "commit", "command", "hardware", "packages",
}  # fmt: skip


def snakemake(folder: Path, *arguments: str, status: int = 0) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    run = subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments, "--cores", "2"],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200,
    )  # fmt: skip
    assert run.returncode == status, run.stdout[-6000:]
    return run.stdout


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout in which the study has run; its output is in out.txt."""
    folder = checkout(tmp_path_factory.mktemp("tiny"))
    (folder / "out.txt").write_text(snakemake(folder, "all", "--configfile", "study.yaml"))
    return folder


def of(study: Path, experiment: str, seed: int, stage: str) -> Path:
    return stage_folder(study / "results" / "tiny", experiment, seed, stage)


def metrics(study: Path, *job: Any) -> dict[str, Any]:
    return dict(json.loads((of(study, *job) / "metrics.json").read_text()))


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_a_stage_leaves_its_files_and_metrics_that_say_how_they_came_about(
    study: Path, job: tuple[str, int, str]
) -> None:
    expected = {*STAGES[job[2]].files, *PICTURES.get(job[2], ()), "tracking.json"}
    assert {file.name for file in of(study, *job).iterdir()} == expected
    found = metrics(study, *job)
    settings = STUDY_OBJECT.stage_settings(*job)
    assert set(found) >= FIELDS
    assert (found["experiment"], found["seed"], found["stage"]) == job
    assert found["settings"] == settings.relevant() and found["settings_digest"] == settings.digest
    manifest = json.loads((study / f"results/data/{settings.dataset_name}/manifest.json").read_text())
    assert found["dataset"] == {"name": settings.dataset_name, "digest": manifest["digest"]}
    assert found["metrics"] and found["wall_seconds"] > 0 and found["hardware"]["processes"] == 1


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_the_journal_has_steps_in_order_and_times(study: Path, job: tuple[str, int, str]) -> None:
    lines = read_history(of(study, *job) / "history.jsonl")
    steps = [line["step"] for line in lines]
    assert lines and steps == sorted(steps) and all(line["time"] > 1.7e9 and len(line) > 2 for line in lines)


def test_weights_are_safetensors_under_timms_names(study: Path) -> None:
    encoder = load_file(of(study, "aps", 0, "pretrain") / "encoder.safetensors")
    assert encoder["cls_token"].shape == (1, 1, 24) and "blocks.0.attn.qkv.weight" in encoder
    for job in JOBS:
        for name in STAGES[job[2]].files:
            if name.endswith(".safetensors"):
                assert all(tensor.isfinite().all() for tensor in load_file(of(study, *job) / name).values())


def test_downstream_stages_name_the_pretraining_they_came_from(study: Path) -> None:
    source = metrics(study, "aps", 0, "pretrain")
    for experiment, seed, stage in JOBS:
        if stage != "pretrain":
            encoder = metrics(study, experiment, seed, stage)["encoder"]
            expected = source["settings_digest"] if experiment == "aps" else None
            assert encoder["settings_digest"] == expected, (experiment, stage)


def test_mlflow_has_a_run_of_each_stage_with_params_curves_final_metrics_and_figures(study: Path) -> None:
    client = Server(f"sqlite:///{study}/results/mlflow.db").client
    experiment = client.get_experiment_by_name("tiny")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {f"{name}/seed{seed}/{stage}" for name, seed, stage in JOBS} | {"report"}
    for job in JOBS:
        name, seed, stage = job
        run, found = runs[f"{name}/seed{seed}/{stage}"], metrics(study, *job)
        assert run.info.status == "FINISHED" and run.info.run_id == found["mlflow_run_id"] and found["mlflow_complete"]
        stage_settings = {f"{stage}.{key}" for key, value in found["settings"][stage].items() if value is not None}
        assert run.data.params["seed"] == "0" and stage_settings <= {*run.data.params}
        final = finals(found)
        assert {key: run.data.metrics[key] for key in final} == pytest.approx(final) and "cost/flops" in final
        first = read_history(of(study, *job) / "history.jsonl")[0]
        key = next(key for key in first if key not in ("step", "time"))
        history = client.get_metric_history(run.info.run_id, metric_name(stage, key))
        assert history[0].value == pytest.approx(first[key])
        tag = run.data.tags.get("encoder_run_id")
        expected = runs["aps/seed0/pretrain"].info.run_id if name == "aps" and stage != "pretrain" else None
        assert tag == expected
        assert run.data.tags["dataset"] == ("digits_coco" if stage == "detection" else "digits")
        figures = study / "results" / "mlartifacts" / "tiny" / run.info.run_id / "artifacts" / "figures"
        assert (
            [file.name for file in figures.iterdir()] == PICTURES[stage] if stage in PICTURES else not figures.exists()
        )


def test_the_report_shows_every_run(study: Path) -> None:
    page = (study / "results/tiny/report/report.html").read_text()
    assert "<html" in page and "aps" in page and "floor" in page
    assert len((study / "results/tiny/report/results.csv").read_text().splitlines()) > 1


def test_each_job_left_a_log_and_a_benchmark(study: Path) -> None:
    for name, seed, stage in JOBS:
        log = (study / f"results/tiny/logs/{name}/seed{seed}/{stage}.log").read_text()
        assert "Traceback" not in log and (stage == "detection" or "[####################] 100%" in log), log
        assert (study / f"results/tiny/benchmarks/{name}/seed{seed}/{stage}.tsv").exists()


def test_the_user_sees_progress_and_no_warning(study: Path) -> None:
    text = (study / "out.txt").read_text()
    assert re.search(r"^pretrain aps/seed0 +\[#{20}\] 100%  4/4 batches +[\d,]+ images/s", text, re.MULTILINE)
    assert not [line for line in text.splitlines() if "warning" in line.lower()]


def test_run_again_it_does_nothing_and_says_so(study: Path) -> None:
    assert "Nothing to be done" in snakemake(study, "all", "--configfile", "study.yaml")


def test_a_failing_stage_stops_only_what_needs_it_and_shows_its_sentence(study: Path) -> None:
    more = put(STUDY, ("experiments", "wrong"), {"inherits": "aps", "stages": ["pretrain", "knn"], "pretrain": {"lr": 1e30}})  # fmt: skip
    more = put(more, ("experiments", "right"), {"inherits": "floor", "stages": ["knn"], "knn": {"k": [2]}})
    (study / "more.yaml").write_text(yaml.safe_dump(more))
    text = snakemake(study, "knn", "--configfile", "more.yaml", status=1)
    assert re.search(r"^error: the pretraining loss became \w+.*lower pretrain\.lr", text, re.MULTILINE), text
    assert "Traceback" not in text
    assert metrics(study, "right", 0, "knn")["metrics"] and not of(study, "wrong", 0, "knn").exists()
    assert metrics(study, "aps", 0, "pretrain")


def test_a_forced_stage_is_computed_again_and_nothing_else(study: Path) -> None:
    before = {job: metrics(study, *job)["finished"] for job in JOBS}
    text = snakemake(study, "knn", "--forcerun", "knn", "--configfile", "study.yaml")
    assert "finished before with these settings" not in text
    after = {job: metrics(study, *job)["finished"] for job in JOBS}
    assert {job for job in JOBS if before[job] != after[job]} == {job for job in JOBS if job[2] == "knn"}
    # And once more, though no report has read what was just finished.
    text = snakemake(study, "knn", "--forcerun", "knn", "--configfile", "study.yaml")
    assert "finished before with these settings" not in text
    assert {job for job in JOBS if after[job] != metrics(study, *job)["finished"]} == {j for j in JOBS if j[2] == "knn"}


def test_a_result_that_is_forced_by_its_file_is_computed_again(study: Path) -> None:
    """And a target that names no file forces none."""
    file = "results/tiny/floor/seed0/knn/metrics.json"
    for target, again in ((file, {("floor", 0, "knn")}), ("all", set())):
        before = {job: metrics(study, *job)["finished"] for job in JOBS}
        text = snakemake(study, "--force", target, "--configfile", "study.yaml")
        assert "finished before with these settings" not in text and "Error" not in text
        assert {job for job in JOBS if before[job] != metrics(study, *job)["finished"]} == again


def test_every_stage_is_in_the_study() -> None:
    assert {stage for _, _, stage in JOBS} == set(STAGES)


# --------------------------------------------------------------------------------------------------
# Every figure is its study's. The last tests: they change the study's files.


def table(folder: Path, *overrides: str) -> str:
    command = [sys.executable, "-m", "aps", "results", "--configfile", "study.yaml"]
    command += ["--set", *overrides] if overrides else []
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_results_of_other_settings_are_named_instead_of_shown(study: Path) -> None:
    assert "8 of 8 runs finished" in table(study)
    text = table(study, "defaults.pretrain.epochs=999")
    assert "2 of 8 runs finished" in text
    assert "pretrain aps/seed0: other settings: pretrain.epochs 2, now 999" in text
    assert "knn aps/seed0: its encoder: other settings: pretrain.epochs 2, now 999" in text


def test_a_stage_by_hand_refuses_an_encoder_of_other_settings(study: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "aps",
        "knn",
        "--configfile",
        "study.yaml",
        "--set",
        "defaults.pretrain.epochs=999",
    ]
    done = subprocess.run(command, cwd=study, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "is not this study's (other settings: pretrain.epochs 2, now 999); run pretrain first" in done.stderr


def test_settings_changed_by_hand_and_back_are_planned_right_without_snakemakes_records(study: Path) -> None:
    shutil.rmtree(study / ".snakemake")
    by_hand = [sys.executable, "-m", "aps", "knn", "--configfile", "study.yaml", "--experiment", "floor"]
    subprocess.run([*by_hand, "--set", "experiments.floor.knn.k=[3]"], cwd=study, check=True, capture_output=True)
    assert "knn_top1_k3" in metrics(study, "floor", 0, "knn")["metrics"]
    text = snakemake(study, "all", "--configfile", "study.yaml")
    assert "knn floor/seed0: knn.k [3] -> [1, 5]" in text
    assert "finished before with these settings" in text  # nothing was computed twice
    assert "knn_top1_k5" in metrics(study, "floor", 0, "knn")["metrics"]
    assert "Nothing to be done" in snakemake(study, "all", "--configfile", "study.yaml")


def test_a_second_study_computes_nothing_twice_and_leaves_the_first_alone(study: Path) -> None:
    before = {file: file.read_bytes() for file in (study / "results/tiny").rglob("*") if file.is_file()}
    renamed = {"floor-of-mine" if name == "floor" else "mine": e for name, e in STUDY["experiments"].items()}
    renamed["floor-of-mine"] = renamed["floor-of-mine"] | {"inherits": "mine"}
    (study / "second.yaml").write_text(yaml.safe_dump(STUDY | {"study": "second", "experiments": renamed}))
    text = snakemake(study, "knn", "--configfile", "second.yaml")
    assert text.count("finished before with these settings") == 3  # pretraining and both kNN
    assert (
        metrics(study, "aps", 0, "knn")["metrics"]
        == json.loads((study / "results/second/mine/seed0/knn/metrics.json").read_text())["metrics"]
    )
    assert before == {file: file.read_bytes() for file in (study / "results/tiny").rglob("*") if file.is_file()}


def test_a_flipped_byte_anywhere_is_recognized_or_changes_nothing(study: Path, tmp_path: Path) -> None:
    """What is read of results is read as a stage, a table and a restart read it; half a minute of random bytes."""
    folder = tmp_path / "copy"
    shutil.copytree(study, folder, symlinks=True)
    undisturbed = read_all(folder)
    files = [f for f in sorted((folder / "results").rglob("*")) if f.is_file() and f.stat().st_size and judged(f)]
    generator, until, tried = random.Random(0), time.monotonic() + 30, 0
    while time.monotonic() < until or tried < 40:
        file = generator.choice(files)
        content = bytearray(file.read_bytes())
        place = generator.randrange(len(content))
        content[place] ^= 1 << generator.randrange(8)
        original = file.read_bytes()
        file.write_bytes(content)
        found = read_all(folder)
        for what, value in found.items():
            assert value == undisturbed[what] or value.startswith("recognized"), (file, place, what)
        file.write_bytes(original)
        tried += 1


def judged(file: Path) -> bool:
    """Results, saved runs and prepared data; not MLflow's store, logs, timings and the page made of results."""
    inside = file.relative_to(file.parents[len(file.parents) - 1]).parts
    return (
        not {"logs", "benchmarks", "mlartifacts"} & set(inside)
        and not file.name.startswith(("mlflow", "."))
        and (file.name not in ("tracking.json", "run.json", "report.html", "results.csv"))
    )


def read_all(folder: Path) -> dict[str, str]:
    """What every figure, weight, image and saved run is read as, or `recognized` with the sentence that says otherwise."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        study = load_study(["study.yaml"])
        for finding in Findings(study):
            found[f"figures of {finding.label}"] = (
                json.dumps(finding.metrics["metrics"], sort_keys=True)
                if finding.metrics
                else f"recognized: {finding.problem}"
            )
        readers: dict[str, Callable[[], str]] = {}
        for file in sorted(Path("results").rglob("*.safetensors")):
            if "data" not in file.parts:
                readers[str(file)] = partial(weights, file)
        for split in ("train", "test"):
            readers[f"digits {split}"] = partial(images, Path("results/data/digits/manifest.json"), split)
        for name, read in readers.items():
            try:
                found[name] = read()
            except UserError as error:
                found[name] = f"recognized: {error}"
    return found


def weights(file: Path) -> str:
    tensors, metadata = read_tensors(file)
    content = b"".join(tensors[name].contiguous().numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(content + json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def images(manifest: Path, split: str) -> str:
    loaded = load_split(manifest, split)
    statistics = Manifest.read(manifest).normalization()
    return hashlib.sha256(
        loaded.images.contiguous().numpy().tobytes() + repr((loaded.labels, statistics)).encode()
    ).hexdigest()
