"""`check`: what a job would stumble over is said before the first one, and its hints are commands that work as printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_study import STUDY, put

from aps import cli, preflight
from aps.errors import UserError
from aps.findings import Finding, Findings
from aps.layout import manifest_of
from aps.registry import METHODS
from aps.settings.reading import load_study
from aps.settings.study import experiment_model
from aps.stages import STAGES
from aps.training.schedule import finetuning_lr, pretraining_lr
from aps.workflow.plan import Plan

COCO = {
    "train": {"images": "img", "annotations": "train.json"},
    "val": {"images": "img", "annotations": "val.json"},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def check(
    capsys: pytest.CaptureFixture[str], study: dict[str, Any], *arguments: str, file: str = "my study.yaml"
) -> tuple[int, str, list[str]]:
    """Status, what is printed, and the sentences about what is wrong."""
    Path(file).write_text(yaml.safe_dump(study))
    capsys.readouterr()
    status = cli.main(["check", "--configfile", file, *arguments])
    shown = capsys.readouterr()
    return status, shown.out, [line.removeprefix("error: ") for line in shown.err.splitlines()]


def on(dataset: dict[str, Any], labels: bool = True) -> dict[str, Any]:
    """A study of one experiment on a dataset of one's own."""
    stage = "knn" if labels else "pretrain"
    weights = {"weights": "random"} if labels else {}
    experiment = {"dataset": "mine", "stages": [stage], "encoder": {"image_size": 16, "patch_size": 4} | weights}
    return {"study": "own", "datasets": {"mine": dataset}, "experiments": {"e": experiment}}


MISSING: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a folder": (on({"folder": "phtos"}), ["datasets.mine.folder: phtos does not exist; correct the path"]),
    "without labels": (on({"folder": "x", "labels": False}, labels=False), ["datasets.mine.folder: x does not exist"]),
    "arrays": (on({"arrays": "x.npz"}), ["datasets.mine.arrays: x.npz does not exist"]),
    "COCO files": (
        put(
            {"study": "own", "datasets": {"mine": {"coco": COCO}}, "experiments": {"e": STUDY["defaults"]}},
            ("experiments", "e"),
            STUDY["defaults"]
            | {"stages": ["detection"], "encoder": STUDY["defaults"]["encoder"] | {"weights": "random"}}
            | {"detection": STUDY["defaults"]["detection"] | {"dataset": "mine"}},
        ),
        [f"datasets.mine.coco.{split}.{key}: " for split in ("train", "val") for key in ("images", "annotations")],
    ),
    "a known dataset's source": (
        {
            "sources": {"cifar10": {"path": "/nowhere/cifar"}},
            "experiments": {"e": {"dataset": "cifar10", "stages": ["knn"], "encoder": {"weights": "random"}}},
        },
        ["sources.cifar10.path: /nowhere/cifar does not exist; correct the path"],
    ),
    "a source that has to be named": (
        {"experiments": {"e": {"dataset": "folder", "stages": ["knn"], "encoder": {"weights": "random"}}}},
        ["sources.folder.path is not set, and dataset 'folder' can't be downloaded"],
    ),
    "an encoder's file": (
        {"experiments": {"e": {"dataset": "digits", "stages": ["knn"], "encoder": {"weights": "gone.safetensors"}}}},
        ["experiment 'e': encoder.weights: gone.safetensors does not exist"],
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_source_that_is_not_there_is_named_with_its_key(
    case: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, expected = MISSING[case]
    status, _, errors = check(capsys, study)
    assert status == 2 and len(errors) == len(expected)
    for sentence, start in zip(errors, expected, strict=True):
        assert sentence.startswith(start), sentence


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"folder": "file"}, ["folder: file is not a folder"]),
        ({"folder": "file", "trust": True}, ["folder: file is not a folder"]),
        ({"arrays": "tree"}, ["arrays: tree is not a file"]),
        (
            {"coco": {split: {"images": "file", "annotations": "tree"} for split in ("train", "val")}},
            [
                f"coco.{split}.{said}"
                for split in ("train", "val")
                for said in ("images: file is not a folder", "annotations: tree is not a file")
            ],
        ),
    ],
)
def test_a_file_in_place_of_a_folder_is_named_and_the_other_way_round(
    entry: dict[str, Any], expected: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    Path("tree").mkdir()
    study = MISSING["COCO files" if "coco" in entry else "arrays"][0]
    status, _, errors = check(capsys, put(study, ("datasets", "mine"), entry))
    assert status == 2 and errors == [f"datasets.mine.{said}; correct the path" for said in expected]


HOMES = {
    "datasets.mine.folder": on({"folder": "~nobody-here/x"}),
    "datasets.mine.arrays": on({"arrays": "~nobody-here/x"}),
    "datasets.mine.coco.train.images": put(
        MISSING["COCO files"][0], ("datasets", "mine", "coco", "train", "images"), "~nobody-here/x"
    ),
    "sources.cifar10.path": put(
        MISSING["a known dataset's source"][0], ("sources",), {"cifar10": {"path": "~nobody-here/x"}}
    ),
    "experiment 'e': encoder.weights": put(
        MISSING["an encoder's file"][0], ("experiments", "e", "encoder", "weights"), "~nobody-here/x.safetensors"
    ),
    "tracking_uri (or MLFLOW_TRACKING_URI)": STUDY | {"tracking_uri": "sqlite:///~nobody-here/x"},
}


@pytest.mark.parametrize("key", HOMES)
def test_a_home_folder_of_nobody_is_named_with_its_key(
    key: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, errors = check(capsys, HOMES[key])
    path = "~nobody-here/x.safetensors" if "weights" in key else "~nobody-here/x"
    said = f"{key}: {path}: there is no user 'nobody-here' on this machine; write the path in full"
    assert status == 2 and said in errors, errors
    if key.startswith(("datasets", "sources")):
        name = "mine" if "mine" in key else "cifar10"
        assert cli.main(["data", name, "--configfile", "my study.yaml"]) == 2 and said in capsys.readouterr().err


def test_a_file_that_is_no_npz_file_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, errors = check(capsys, on({"arrays": "my study.yaml"}))
    assert status == 2
    assert errors == ["datasets.mine.arrays: my study.yaml is no readable .npz file; save its arrays by np.savez"]
    np.savez("a.npz", images=np.zeros((10, 8, 8), np.uint8), labels=np.arange(10) % 2)
    assert check(capsys, on({"arrays": "a.npz"}))[0] == 0


def test_a_password_in_a_wrong_address_is_not_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, errors = check(capsys, STUDY | {"tracking_uri": "htp://me:hush@127.0.0.1:5000"})
    assert status == 2 and "did you mean 'http'" in errors[0] and "hush" not in errors[0]


def test_everything_that_is_wrong_is_said_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = on({"folder": "phtos"}) | {"tracking_uri": "htp://127.0.0.1:5000"}
    status, _, errors = check(capsys, study)
    assert status == 2 and len(errors) == 2


def test_a_damaged_manifest_is_told_once_however_many_stages_read_it(
    here: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Path("results/data/digits/manifest.json")
    manifest.parent.mkdir(parents=True)
    manifest.write_bytes(digits.read_bytes()[:100])
    stages = {"stages": ["pretrain", "finetune", "linear_probe", "knn"]}
    status, _, errors = check(capsys, put(STUDY, ("experiments",), {"a": stages, "b": stages}))
    assert status == 2 and len(errors) == 1 and f"{manifest}: not a manifest of this version" in errors[0]


SMALL: dict[str, tuple[dict[str, Any], str]] = {
    "pretrain": (
        {"pretrain": {"batch_size": 2000}},
        "pretrain.batch_size 2000 exceeds the 1438 training images; lower it",
    ),
    "finetune, held out": (
        {"finetune": {"batch_size": 1300, "holdout": 0.1}},
        "finetune.batch_size 1300 exceeds the 1294 training images (144 of 1438 are held out); lower it",
    ),
    "limit": (
        {"dataset": {"name": "digits", "train_limit": 5000}},
        "dataset.train_limit 5000 exceeds the 1438 training images of dataset 'digits'; lower it",
    ),
    "a stage's limit": (
        {"finetune": {"dataset": {"name": "digits", "train_limit": 5000}}},
        "finetune.dataset.train_limit 5000 exceeds the 1438 training images of dataset 'digits'; lower it",
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_a_batch_that_the_prepared_images_cannot_fill_is_refused(
    case: str, here: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks, sentence = SMALL[case]
    stage = next((name for name in blocks if name in STAGES), "pretrain")
    study = {"experiments": {"e": {"dataset": "digits", **blocks, "stages": sorted({"pretrain", stage})}}}
    assert check(capsys, study)[0] == 0  # before the data are prepared nobody knows
    Path("results/data").mkdir(parents=True)
    Path("results/data/digits").symlink_to(digits.parent)
    status, _, errors = check(capsys, study)
    assert status == 2 and any(f"experiment 'e': {sentence}" == error for error in errors), errors


@pytest.mark.parametrize("case", SMALL)
def test_planning_refuses_what_the_prepared_images_cannot_fill_unless_it_is_finished_or_the_images_change(
    case: str, here: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, sentence = SMALL[case]
    stages = sorted({"pretrain", next((name for name in blocks if name in STAGES), "pretrain")})
    study = {"study": "s", "experiments": {"e": {"dataset": "digits", **blocks, "stages": stages}}}
    Path("s.yaml").write_text(yaml.safe_dump(study))
    Plan.load(["s.yaml"], {}).check_images()  # before the data are prepared nobody knows
    Path("results/data").mkdir(parents=True)
    Path("results/data/digits").symlink_to(digits.parent)
    with pytest.raises(UserError, match=re.escape(f"experiment 'e': {sentence}")):
        Plan.load(["s.yaml"], {}).check_images()
    monkeypatch.setattr(Findings, "_why_outdated", lambda self, dataset: "2 images new")
    Plan.load(["s.yaml"], {}).check_images()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(Findings, "_find", lambda self, *job: Finding(*job, Path(), {}, None))
    Plan.load(["s.yaml"], {}).check_images()


def test_a_batch_that_the_processes_cannot_share_is_a_problem_of_its_job_alone(here: Path) -> None:
    """Resources differ from machine to machine, and other jobs can go on: `check` tells, planning does not refuse."""
    experiment = {"dataset": "digits", "stages": ["pretrain", "finetune"], "finetune": {"batch_size": 6}}
    for processes, words in (
        (4, "finetune.batch_size 6 is not a multiple of the 4 processes"),
        (2, "finetune.batch_size 6 gives each of the 2 processes an odd number of images, and mixup pairs them"),
    ):
        study = {"resources": {"finetune": {"processes": processes}}, "experiments": {"e": experiment}}
        Path("s.yaml").write_text(yaml.safe_dump(study))
        assert any(words in problem for problem in preflight.problems(load_study(["s.yaml"])))
        Plan.load(["s.yaml"], {}).check_images()


@pytest.mark.parametrize("method", sorted(METHODS.names()))
@pytest.mark.parametrize("way", ["own", "defaults", "inherited"])
def test_settings_that_a_method_does_not_read_are_told(
    method: str, way: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own: dict[str, Any] = {"dataset": "digits", "stages": ["pretrain"], "pretrain": {"method": method}}
    own |= {"encoder": {"arch": "micro", "image_size": 16, "patch_size": 4}}
    sampling = {"sampling": {"strategy": "random", "ratio": 0.2}}
    study: dict[str, Any] = {"experiments": {"e": own | (sampling if way == "own" else {})}}
    if way == "defaults":
        study["defaults"] = sampling
    if way == "inherited":
        study["experiments"] |= {"a": {"dataset": "digits", "stages": ["pretrain"], **sampling}}
        study["experiments"]["e"]["inherits"] = "a"
    status, out, errors = check(capsys, study)
    said = f"warning: experiment 'e': pretrain.method {method} reads no sampling, so sampling.ratio, sampling.strategy change nothing"
    assert status == 0 and (said in "\n".join([out, *errors])) == (method != "aps"), (out, errors)


def test_a_budget_of_less_than_a_batch_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flops, right in ((1e3, False), (1e12, True)):
        budget = {"budget": {"flops": flops}, "batch_size": 8}
        encoder = {"arch": "micro", "image_size": 16, "patch_size": 4}
        experiment = {"dataset": "digits", "stages": ["pretrain"], "pretrain": budget, "encoder": encoder}
        status, _, errors = check(capsys, {"experiments": {"e": experiment}})
        sentence = "experiment 'e': pretrain.budget.flops 1000 is less than the "
        assert (status == 0) == right and (right or errors[0].startswith(sentence)), errors


@pytest.mark.parametrize(
    ("pretrain", "rate"),
    [
        ({"schedule": "cosine", "warmup_epochs": 1, "budget": {"flops": 1e7}}, "0"),
        ({"schedule": "cosine", "warmup_epochs": 0, "budget": {"flops": 1e7}}, None),
        ({"schedule": "cosine", "warmup_epochs": 1, "budget": {"flops": 1e12}}, None),
        ({"schedule": "release", "warmup_epochs": 20, "budget": {"flops": 1e7}}, "1.56e-06"),
        ({"schedule": "release", "warmup_epochs": 10, "budget": {"flops": 1e7}}, None),
    ],
)
def test_a_pretraining_of_one_step_that_the_warmup_takes_is_refused_or_warned_of(
    pretrain: dict[str, Any], rate: str | None, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"batch_size": 8, "epochs": 100, "projector": [16, 16, 8], "predictor": [16, 16, 8]}
    encoder = {"arch": "micro", "dim": 24, "depth": 2, "image_size": 16, "patch_size": 4}
    e = {"dataset": "digits", "stages": ["pretrain"], "encoder": encoder, "sampling": {"samplings": 1}}
    status, said, errors = check(capsys, {"experiments": {"e": e | {"pretrain": own | pretrain}}})
    expected = (
        f"experiment 'e': pretrain.budget leaves only the start of pretrain.warmup_epochs {pretrain['warmup_epochs']}, where the "
        f"learning rate is {rate} instead of 3.13e-05; raise pretrain.budget or set pretrain.warmup_epochs: 0"
    )
    assert (status, errors) == ((2, [expected]) if rate == "0" else (0, [])), errors
    warnings = [line for line in said.splitlines() if line.startswith("warning")]
    assert warnings == [f"warning: {expected}"] * (rate not in (None, "0"))


def test_finetuning_and_detection_whose_warmup_takes_all_are_told(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    e: dict[str, Any] = {"dataset": "digits", "stages": ["finetune"], "encoder": {"weights": "random"}}
    for epochs, refused in ((1, True), (2, False)):
        changed = {"finetune": {"epochs": epochs, "warmup_epochs": 1, "warmup_lr": 0}}
        status, _, errors = check(capsys, {"experiments": {"e": e | changed}})
        assert (status == 2) == refused == ("so the learning rate of every step is 0" in " ".join(errors)), errors
    for iterations, told in ((5, True), (6, False)):
        changed = {"stages": ["detection"], "detection": {"warmup_iterations": 5, "iterations": iterations}}
        detector = {"image_size": 64, "window": 4, "global_blocks": [0], "pyramid_scales": [1.0]}
        changed["detection"] |= detector  # type: ignore[operator]
        status, said, errors = check(capsys, {"experiments": {"e": e | changed}})
        words = "detection.warmup_iterations 5 takes all of detection.iterations 5, so the learning rate stays below detection.lr"
        assert status == 0 and (words in said) == told, (said, errors)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"gpus": 3, "nodes": 2}, "gpus 3 don't spread evenly over nodes 2"),
        ({"processes": 5, "nodes": 2}, "processes 5 don't spread evenly over nodes 2"),
        ({"local": True}, "only data and report have a choice"),
        ({"processes": 3}, "batch_size 256 is not a multiple of the 3 processes"),
    ],
)
def test_resources_that_snakemake_would_refuse_are_said(
    asked: dict[str, Any], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = {"dataset": "digits", "stages": ["pretrain"], "pretrain": {"batch_size": 256}}
    status, _, errors = check(capsys, {"resources": {"pretrain": asked}, "experiments": {"e": experiment}})
    assert status == 2 and words in " ".join(errors), errors


ADDRESSES = {
    "htp://127.0.0.1:5000": "did you mean 'http'?",
    "sqllite:///x.db": "did you mean 'sqlite'?",
    "sqlite://x.db": "with three slashes",
    "http:/127.0.0.1:5000": "with two slashes",
    "127.0.0.1:5000": "write http://127.0.0.1:5000",
    "http://:5000": "names no host",
    "http://127.0.0.1:port": "write http://HOST:PORT",
    "mlflow": "is no address and no folder",
    "http://no-such-host.invalid:5000": "no host 'no-such-host.invalid' is known from here",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_misspelt_tracking_address_is_said(address: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, errors = check(capsys, STUDY | {"tracking_uri": address})
    assert status == 2 and len(errors) == 1 and ADDRESSES[address] in errors[0], errors


@pytest.mark.parametrize("address", ["http://127.0.0.1:5000", "sqlite:///x.db", "none", "./mlruns", None])
def test_an_address_that_can_be_one_is_not(address: str | None, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(capsys, STUDY | {"tracking_uri": address})[0] == 0


@pytest.mark.parametrize(
    ("block", "settings", "says"),
    [
        ("pretrain", {"epochs": 2, "warmup_epochs": 99}, "stays below pretrain.lr"),
        ("pretrain", {"epochs": 2, "warmup_epochs": 2}, "stays below pretrain.lr"),
        ("pretrain", {"epochs": 2, "warmup_epochs": 1}, None),
        ("pretrain", {"epochs": 1, "warmup_epochs": 1}, None),
        ("pretrain", {"epochs": 1, "warmup_epochs": 1, "schedule": "cosine"}, "never falls"),
        ("pretrain", {"epochs": 3, "warmup_epochs": 2, "schedule": "cosine"}, None),
        ("finetune", {"epochs": 1, "warmup_epochs": 1}, "stays below finetune.lr"),
        ("finetune", {"epochs": 6, "warmup_epochs": 5}, None),
    ],
)
def test_a_warmup_that_takes_all_of_a_training_is_a_warning_which_says_what_the_schedule_does(
    block: str, settings: dict[str, Any], says: str | None, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {"pretrain": ["pretrain"], "finetune": ["pretrain", "finetune"]}[block]
    experiment = {"dataset": "digits", "stages": stages, block: settings}
    status, said, _ = check(capsys, {"experiments": {"e": experiment}})
    warnings = [line for line in said.splitlines() if line.startswith("warning")]
    epochs, warmup = settings["epochs"], settings["warmup_epochs"]
    expected = (
        f"warning: experiment 'e': {block}.warmup_epochs {warmup} takes all of {block}.epochs {epochs}, so the learning rate "
        f"{says}; lower {block}.warmup_epochs or raise {block}.epochs"
    )
    assert status == 0 and warnings == [expected] * (says is not None)
    rates = rates_of(block, settings)
    peak = max(rates_of(block, settings | {"epochs": 1000, "warmup_epochs": 0}))
    if says is not None:
        assert rates == sorted(rates) if says == "never falls" else max(rates) < peak


def test_a_learning_rate_that_rises_where_it_should_fall_is_a_warning(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ends of finetuning's schedule are absolute, its peak is scaled by the batch."""
    small = {"epochs": 4, "batch_size": 32, "lr": 1e-5}
    rises = (
        "warning: experiment 'e': finetune.min_lr 1e-05 is above the peak finetune.lr 1e-05 x 32/512 = 6.25e-07, so the learning "
        "rate rises; lower finetune.min_lr or raise finetune.lr"
    )
    falls = (
        "warning: experiment 'e': finetune.warmup_lr 1e-06 is above the peak finetune.lr 1e-05 x 32/512 = 6.25e-07, so the warmup "
        "lowers the learning rate; lower finetune.warmup_lr or raise finetune.lr"
    )
    for settings, expected in (
        (small | {"warmup_epochs": 0}, [rises]),
        (small | {"warmup_epochs": 1}, [falls, rises]),
        (small | {"warmup_epochs": 1, "warmup_lr": 0, "min_lr": 0}, []),
        (small | {"warmup_epochs": 0, "lr": 1e-3}, []),
    ):
        experiment = {
            "dataset": "digits",
            "encoder": {"weights": "random"},
            "stages": ["finetune"],
            "finetune": settings,
        }
        status, said, _ = check(capsys, {"experiments": {"e": experiment}})
        assert status == 0 and [line for line in said.splitlines() if line.startswith("warning")] == expected
    experiment["finetune"] = small | {"warmup_epochs": 9}
    _, said, _ = check(capsys, {"experiments": {"e": experiment}})
    assert "takes all of finetune.epochs 4, so the learning rate stays above finetune.lr" in said


@pytest.mark.parametrize(
    ("weights", "seeds", "told"),
    [("timm:vit_tiny", [0, 1], True), ("e.safetensors", [0, 1], True), ("e.safetensors", [0], False),
     ("random", [0, 1], False), ("experiment:a", [0, 1], False)],
)  # fmt: skip
def test_seeds_that_share_one_encoder_are_a_warning(
    weights: str, seeds: list[int], told: bool, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "e.safetensors").touch()
    e = {"dataset": "digits", "stages": ["knn"], "encoder": {"weights": weights}, "seeds": seeds}
    a = {"dataset": "digits", "stages": ["pretrain"], "seeds": [0, 1]}
    status, said, _ = check(capsys, {"experiments": {"e": e, "a": a}})
    expected = (
        f"warning: experiment 'e': all 2 seeds start from one encoder ({weights}), so their spread is the evaluation's alone, and "
        "it counts as one seed"
    )
    assert status == 0 and (expected in said.splitlines()) == told and ("one encoder" in said) == told


def rates_of(block: str, settings: dict[str, Any]) -> list[float]:
    """The learning rate at each of ten steps an epoch."""
    model = experiment_model("aps").model_validate({"dataset": "digits", block: settings})
    steps = range(10 * getattr(model, block).epochs)
    if block == "pretrain":
        return [pretraining_lr(model.pretrain, step, 10) for step in steps]
    return [finetuning_lr(model.finetune, step // 10) for step in steps]


def test_hints_are_commands_that_work_as_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a study whose file has a space in its name, with settings laid over it: the datasets they prepare are the study's."""
    (here / "Snakefile").touch()
    for number in range(8):
        (here / f"images/{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), 20 * number, np.uint8)).save(here / f"images/{number % 2}/{number}.png")
    overrides = ("--set", "results=out", "datasets.mine.folder=images")
    status, said, _ = check(capsys, on({"folder": "elsewhere"}), *overrides)
    assert status == 0
    prepare, everything = re.findall(r"`([^`]+)`", said)
    words = shlex.split(prepare)
    assert words[:3] == ["python", "-m", "aps"] and cli.main(words[3:]) == 0
    study = load_study(["my study.yaml"], {"results": "out", "datasets": {"mine": {"folder": "images"}}})
    assert manifest_of(study, "mine").exists()
    status, said, _ = check(capsys, on({"folder": "elsewhere"}), *overrides)
    assert status == 0 and "not prepared" not in said
    from snakemake.cli import get_argument_parser

    arguments = get_argument_parser().parse_args(shlex.split(everything)[1:])
    assert [str(file) for file in arguments.configfile] == ["my study.yaml"] and arguments.targets == ["all"]
    assert len(arguments.config) == 2
    (here / "images/0/new.png").write_bytes((here / "images/0/0.png").read_bytes())
    _, said, _ = check(capsys, on({"folder": "elsewhere"}), *overrides)
    assert "dataset 'mine' will be prepared again (folder images: 1 image new)" in said
    assert re.findall(r"`([^`]+)`", said)[0] == prepare


# --------------------------------------------------------------------------------------------------
# `data`.


def test_data_again_prepares_from_scratch(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra, words in (
        ([], "digits: prepared:"),
        ([], "already prepared and verified"),
        (["--again"], "digits: prepared:"),
    ):
        assert cli.main(["data", "digits", *extra]) == 0
        assert words in capsys.readouterr().out


def test_what_a_study_cannot_do_with_so_few_images_is_said_when_they_have_been_prepared(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        for split in ("train", "test"):
            (here / f"photos/{split}/{number % 2}").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(here / f"photos/{split}/{number % 2}/{number}.png")
    study = on({"folder": "photos"})
    study["experiments"]["e"] |= {"stages": ["finetune"], "finetune": {"batch_size": 2, "holdout": 0.1}}
    Path("s.yaml").write_text(yaml.safe_dump(study))
    entry = ["--entry", '{"folder": "photos"}', "--out", str(manifest_of(load_study(["s.yaml"]), "mine").parent)]
    for arguments in ([], entry):  # a person's command, and a rule's
        assert cli.main(["data", "mine", "--configfile", "s.yaml", *arguments]) == 2
        sentence = "error: experiment 'e': finetune.holdout 0.1 of 4 training images keeps none aside; raise it"
        assert capsys.readouterr().err.splitlines()[-1] == sentence
    assert cli.main(["data", "mine", "--configfile", "s.yaml", "--out", "elsewhere"]) == 0


def test_an_entry_stands_in_for_a_study(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("a.npz", images=np.zeros((10, 8, 8), np.uint8), labels=np.arange(10) % 2)
    assert cli.main(["data", "mine", "--entry", '{"arrays": "a.npz"}', "--out", "here"]) == 0
    assert "mine: prepared: 8 train, 2 test images of 2 classes" in capsys.readouterr().out
    assert (here / "here/manifest.json").exists()
    for arguments, words in (
        (["--entry", '{"arays": "a.npz"}'], "--entry: not an entry of `datasets`"),
        (["--entry", "{}"], "--entry: not an entry of `datasets`"),
        (["--entry", '{"arrays": "a.npz"}', "--source", "b.npz"], "--source is for published datasets"),
    ):
        assert cli.main(["data", "mine", *arguments]) == 2
        assert words in capsys.readouterr().err
