"""The command line: its help, its exit statuses, and one sentence for each mistake."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from pretended_gpus import pretend_gpus
from tiny_study import fake_job, working_folder

from aps import cli
from aps.cli.stage import stage_job
from aps.errors import Preempted, UserError
from aps.layout import manifest_path
from aps.results import StageJob, StageRun, images_digest
from aps.runtime import gpus, launch
from aps.settings.reading import load_study
from aps.stages import STAGES

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with config/config.yaml."""
    return working_folder(tmp_path, monkeypatch)


@pytest.fixture
def played(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[StageJob]:
    """kNN is a stage that only writes its results; the jobs it was called with."""
    jobs: list[StageJob] = []

    def run(job: StageJob) -> None:
        jobs.append(job)
        with StageRun(job) as stage:
            stage.finish({"top1": 1.0})

    module = ModuleType("played_knn")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "played_knn", module)
    monkeypatch.setitem(STAGES, "knn", dataclasses.replace(STAGES["knn"], module="played_knn"))
    fake_job(folder / "results")  # writes a manifest
    return jobs


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """The one sentence of a command that ends with `status`."""
    assert cli.main(list(arguments)) == status
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    *_, sentence = shown.err.splitlines()
    return sentence


# --------------------------------------------------------------------------------------------------
# Help.


def verbs() -> dict[str, argparse.ArgumentParser]:
    (action,) = [a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


def options() -> Iterator[tuple[str, argparse.Action]]:
    for verb, parser in verbs().items():
        for action in parser._actions:
            yield verb, action


def test_there_is_a_verb_for_each_stage_and_tool() -> None:
    tools = {"data", "report", "results", "check", "estimate", "sync", "export", "import-weights", "show-views"}  # fmt: skip
    assert set(STAGES) | tools <= set(verbs())


def test_the_top_help_lists_every_verb_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "snakemake all" in text
    for verb in verbs():
        assert re.search(rf"^ +{verb}\s+\w", text, re.MULTILINE), verb


@pytest.mark.parametrize("verb", verbs())
def test_the_help_of_a_verb_reads_well(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    text = capsys.readouterr().out
    description = verbs()[verb].description or ""
    assert ended.value.code == 0 and text.startswith(f"usage: python -m aps {verb}")
    assert description[0].isupper() and description.endswith(".") and "None" not in text


def test_every_option_says_what_it_is() -> None:
    for verb, action in options():
        assert action.help, f"{verb} {action.dest}"
        assert not action.help.endswith("."), f"{verb} {action.dest}"


def test_defaults_in_the_help_are_true() -> None:
    for verb, action in options():
        default = re.search(r"\(default: ([\w/.-]+)[,)]", action.help or "")
        if action.default not in (None, False, argparse.SUPPRESS, []):
            given = action.default[0] if isinstance(action.default, list) else action.default
            assert default is not None, f"{verb} --{action.dest} does not say its default {given}"
            assert default.group(1) in (str(given), f"{given:g}" if isinstance(given, float) else ""), verb


def test_no_verb_and_an_unknown_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["pretrian"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2 and "usage: python -m aps" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Exit statuses.


def test_a_stage_run_by_hand_writes_where_snakemake_would(folder: Path, played: list[StageJob]) -> None:
    assert cli.main(["knn", "--experiment", "floor"]) == 0
    (job,) = played
    study = load_study(["config/config.yaml"])
    assert job.settings == study.stage_settings("floor", 0, "knn") and job.study == "tiny"
    assert job.out == Path("results/tiny/floor/seed0/knn") and (job.out / "metrics.json").exists()
    assert job.manifest == manifest_path("results", "digits") and job.encoder is None


def test_a_rule_gives_all_of_it_and_needs_no_study(folder: Path, played: list[StageJob], tmp_path: Path) -> None:
    settings = load_study(["config/config.yaml"]).stage_settings("floor", 0, "knn")
    (folder / "config/config.yaml").unlink()
    arguments = ["--settings", settings.to_json(), "--manifest", "results/data/digits/manifest.json"]
    arguments += ["--results", "results", "--out", "elsewhere", "--study", "s", "--workers", "2"]
    assert cli.main(["knn", *arguments]) == 0
    (job,) = played
    assert job.settings == settings and (job.study, job.workers, job.out) == ("s", 2, Path("elsewhere"))


def test_the_same_command_again_restores_and_with_again_computes(
    folder: Path, played: list[StageJob], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["knn", "--experiment", "floor"]
    assert cli.main(command) == cli.main(command) == 0
    assert len(played) == 1 and "finished before with these settings" in capsys.readouterr().err
    assert cli.main([*command, "--again"]) == 0
    assert len(played) == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stage_and_the_processes_that_it_starts_see_the_gpus_that_are_free(
    processes: int, folder: Path, played: list[StageJob], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_gpus(tmp_path / "bin", ["GPU-a", "GPU-b", "GPU-c"], monkeypatch)
    monkeypatch.setattr(gpus, "LOCKS", tmp_path)
    computed, seen = sys.modules["played_knn"].run, list[str]()

    def compute(job: StageJob) -> None:
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        computed(job)

    monkeypatch.setattr(sys.modules["played_knn"], "run", compute)
    monkeypatch.setattr(launch, "run", lambda *_: compute(played_job))
    command = ["knn", "--experiment", "floor", "--processes", str(processes)]
    played_job = stage_job(STAGES["knn"], cli.parser().parse_args(command))
    with ExitStack() as another_stage:
        assert gpus._lock("GPU-a", another_stage)
        assert cli.main(command) == 0
    assert seen == [["1"], ["1,2"]][processes - 1] and "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize("option, value", [("--results", "elsewhere"), ("--study", "other")])
def test_what_a_study_says_itself_is_not_given_beside_it(
    option: str, value: str, folder: Path, played: list[StageJob], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["knn", "--experiment", "floor", option, value]) == 2 and not played
    assert f"give `--set {option[2:]}={value}` instead" in capsys.readouterr().err


def test_options_that_are_given_again_add_up(folder: Path, played: list[StageJob], tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("defaults: {knn: {k: [4]}}\n")
    files = ["--configfile", "config/config.yaml", "--configfile", str(over)]
    settings = ["--set", "defaults.encoder.depth=1", "--set", "defaults.knn.temperature=0.2"]
    assert cli.main(["knn", "--experiment", "floor", *files, *settings]) == 0
    (job,) = played
    assert job.settings.knn.k == (4,) and job.settings.knn.temperature == 0.2 and job.settings.encoder.depth == 1


def test_set_reaches_the_stage(folder: Path, played: list[StageJob]) -> None:
    assert (
        cli.main(["knn", "--experiment", "floor", "--set", "defaults.knn.k=[3]", "results=other"]) == 2
    )  # no data there
    assert (
        cli.main(["knn", "--experiment", "floor", "--set", "defaults.knn.k=[3]", "defaults.knn.temperature=1e-2"]) == 0
    )
    assert (played[0].settings.knn.k, played[0].settings.knn.temperature) == ((3,), 0.01)


def test_preempted_is_status_75_and_a_crash_is_a_traceback(
    folder: Path, played: list[StageJob], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(job: StageJob) -> None:
        raise Preempted(f"{job.label} after 3 of 8 batches")

    def broken(job: StageJob) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["played_knn"], "run", stopped)
    sentence = fails(capsys, "knn", "--experiment", "floor", status=75)
    assert sentence == "stopped: knn floor/seed0 after 3 of 8 batches"
    monkeypatch.setattr(sys.modules["played_knn"], "run", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["knn", "--experiment", "floor"])


def test_the_keyboard_ends_with_130_and_says_how_to_go_on(
    folder: Path, played: list[StageJob], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(job: StageJob) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["played_knn"], "run", interrupted)
    sentence = fails(capsys, "knn", "--experiment", "floor", status=130)
    assert "the same command goes on from the last checkpoint" in sentence


@pytest.mark.parametrize(
    ("verb", "told"),
    [
        ("knn", ", if it left one"),
        ("data", "run the same command again, it keeps the downloads and the images"),
        ("check", "again"),
    ],
)
def test_only_a_stage_promises_a_checkpoint_after_the_keyboard(
    verb: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", interrupted)
    sentence = fails(capsys, verb, status=130)
    assert sentence.startswith("stopped by the keyboard; ") and told in sentence
    assert ("checkpoint" in sentence) == (verb in STAGES)


def test_the_keyboard_ends_it_while_options_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", interrupted)
    assert "stopped by the keyboard" in fails(capsys, "knn", status=130)


def test_the_process_itself_ends_with_the_status_and_one_line(folder: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "aps", "check", "--set", "defaults.knn.kk=3"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "error: config/config.yaml: experiment 'aps': unknown key 'knn.kk'; did you mean 'knn.k'?\n"


# --------------------------------------------------------------------------------------------------
# Mistakes.

SETTINGS = '{"stage":"knn","experiment":"e","seed":0,"dataset":{"name":"digits"},"encoder":{"weights":"random"}}'
MISTAKES: dict[str, tuple[list[str], str]] = {
    "no study": (["check", "--configfile", "gone.yaml"], r"gone.yaml: cannot be read \(No such file or directory\)"),
    "experiment": (["knn", "--experiment", "flor"], "study 'tiny' has no experiment 'flor'; did you mean 'floor'?"),
    "seed": (["knn", "--seed", "3"], r"experiment 'aps' has no seed 3; its seeds are \[0\]"),
    "stage of the experiment": (["pretrain", "--experiment", "floor"], "experiment 'floor' has no stage pretrain"),
    "dataset": (["data", "digts"], "dataset 'digts' is unknown; known: cifar10"),
    "manifest": (["pretrain"], r"results/data/digits/manifest.json is missing; run the stage that makes it \(`snakemake"),
    "JSON": (["knn", "--settings", "{"], "--settings: "),
    "JSON's key": (["knn", "--settings", SETTINGS[:-1] + ',"knn":{"kk":1}}'], "unknown key 'knn.kk'; did you mean 'knn.k'"),
    "JSON of another stage": (["finetune", "--settings", SETTINGS], "--settings are for stage knn, but the verb is finetune"),
    "set": (["check", "--set", "epochs"], "--set epochs: write KEY=VALUE"),
    "show-views' experiment": (["show-views", "--out", "x.png", "--experiment", "x"], "has no experiment 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_status_2(mistake: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, said = MISTAKES[mistake]
    sentence = fails(capsys, *arguments)
    assert sentence.startswith("error: ") and re.search(said, sentence), sentence


def test_a_missing_encoder_says_which_stage_makes_it(
    folder: Path, played: list[StageJob], capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = fails(capsys, "knn")
    assert "results/tiny/aps/seed0/pretrain/encoder.safetensors is missing; run the stage that makes it" in sentence


@pytest.mark.parametrize("verb", ["knn", "data"])
def test_a_results_folder_that_cannot_be_written_is_one_sentence(
    verb: str, folder: Path, played: list[StageJob], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (folder / "file").write_text("")
    arguments = (
        ["--manifest", "results/data/digits/manifest.json", "--experiment", "floor"] if verb == "knn" else ["digits"]
    )
    sentence = fails(capsys, verb, *arguments, "--set", "results=file")
    assert "file" in sentence and re.search(r"Not a directory|File exists", sentence)


def test_only_the_first_rank_speaks(
    folder: Path, played: list[StageJob], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(job: StageJob) -> None:
        raise UserError("wrong")

    monkeypatch.setattr(sys.modules["played_knn"], "run", wrong)
    for rank, said in (("0", "error: wrong\n"), ("1", "")):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "x")):
            monkeypatch.setenv(name, value)
        assert cli.main(["knn", "--experiment", "floor"]) == 2
        assert capsys.readouterr().err == said


def test_a_rank_left_over_in_the_shell_changes_nothing(
    folder: Path, played: list[StageJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert cli.main(["knn", "--experiment", "floor"]) == 0
    assert (played[0].out / "metrics.json").exists()


def test_check_lists_what_would_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "study 'tiny': 2 experiments, 8 runs, results in results/"
    assert [line.split()[:2] for line in lines[1:3]] == [["aps", "digits"], ["floor", "digits"]]
    assert "pretrain, finetune, linear_probe, knn, embed, detection" in lines[1]
    assert lines[-1].startswith("nothing speaks against it: `snakemake all")


def test_planning_and_help_import_nothing_heavy(folder: Path) -> None:
    code = (
        "import sys; from aps.cli import main\n"
        "main(['check'])\n"
        "try: main(['pretrain', '--help'])\nexcept SystemExit: pass\n"
        "print('heavy:', [m for m in ('torch', 'mlflow', 'timm', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "heavy: []" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "knn: not enough memory; lower encoder.image_size"),
        (RuntimeError("CUDA out of memory"), "knn: not enough memory (CUDA out of memory)"),
        (RuntimeError("unable to mmap 9 bytes from file </torch_1>"), "set --workers 0"),
        (OSError(errno.ENOSPC, "No space left on device", "f.npy"), "f.npy: No space left on device; free space"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free space"),
        (RuntimeError("Could not determine home directory."), "HOME is not set; set HOME"),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(
    error: Exception,
    says: str,
    played: list[StageJob],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(job: StageJob) -> None:
        raise error

    monkeypatch.setattr(sys.modules["played_knn"], "run", fail)
    assert says in fails(capsys, "knn", "--experiment", "floor")


OWN = """
study: own
datasets: {im: {folder: tr}}
experiments: {floor: {dataset: im, stages: [knn], encoder: {arch: micro, image_size: 16, patch_size: 4, weights: random}, knn: {k: [1]}}}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without a Snakefile, with a study of a prepared folder of images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    for i in range(8):
        folder = tmp_path / "tr" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (30 * i, 0, 255 * (i % 2))).save(folder / f"{i}.png")
    (tmp_path / "own.yaml").write_text(OWN)
    assert cli.main(["data", "im", "--configfile", "own.yaml"]) == 0
    return tmp_path


def test_a_stage_run_by_hand_refuses_images_that_changed_since_they_were_prepared(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The digest in its metrics.json would name the images of before."""
    Image.new("RGB", (20, 20)).save(own / "tr/a/0.png")
    said = fails(capsys, "knn", "--configfile", "own.yaml")
    assert said.startswith(
        "error: dataset 'im' is not as it was prepared (folder tr: 1 image changed); run `python -m aps data im"
    )
    assert not (own / "results/own/floor").exists()
    assert cli.main(["data", "im", "--configfile", "own.yaml"]) == 0
    assert cli.main(["knn", "--configfile", "own.yaml"]) == 0


@pytest.mark.parametrize("content", ["{}", "[]", '{"digest": 3}'])
def test_a_damaged_manifest_is_one_sentence_that_names_it(
    content: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (manifest,) = {file.resolve() for file in (own / "results/data").glob("*/manifest.json")}
    manifest.write_text(content)
    assert "manifest.json" in fails(capsys, "knn", "--configfile", "own.yaml")
    with pytest.raises(UserError, match=f"{manifest}: damaged"):
        images_digest(manifest)


def test_hints_work_as_printed_where_there_is_no_snakefile(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--configfile", "own.yaml"]) == 0
    assert "`python -m aps run all --configfile own.yaml`" in capsys.readouterr().out
    (own / "Snakefile").touch()
    assert cli.main(["check", "--configfile", "own.yaml"]) == 0
    assert "`snakemake all --configfile own.yaml`" in capsys.readouterr().out


def test_a_typo_in_the_experiment_of_a_setting_is_one_sentence(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, "knn", "--configfile", "own.yaml", "--set", "experiments.flor.knn.k=[3]")
    assert "the study has no experiment \"flor\"; did you mean 'floor'?" in said
