"""`aps.run` and `aps.pretrain`: the same studies and settings as on the command line, from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import aps
from aps import api
from aps.errors import UserError

ENCODER = {"arch": "micro", "image_size": 16, "patch_size": 4, "dim": 24, "depth": 1, "heads": 3}
PRETRAIN = {"epochs": 1, "batch_size": 16, "warmup_epochs": 0}
STUDY: dict[str, Any] = {
    "study": "tiny",
    "defaults": {"dataset": {"name": "digits", "train_limit": 64}, "encoder": ENCODER | {"weights": "random"}},
    "experiments": {"floor": {"stages": ["knn"], "knn": {"k": (1, 5)}}},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    return tmp_path


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been started."""
    found: list[list[str]] = []
    monkeypatch.setattr(api, "_stream", lambda arguments: found.append(arguments) or 0)
    return found


def test_a_dictionary_becomes_the_studys_file_and_snakemake_gets_it(here: Path, commands: list[list[str]]) -> None:
    assert aps.run(STUDY, "knn", cores=1) == []
    written = yaml.safe_load((here / "results/tiny/study.yaml").read_text())
    assert written == json.loads(json.dumps(STUDY))  # lists for tuples
    (command,) = commands
    assert command[1:4] == ["-m", "snakemake", "knn"] and command[-4:][0] == "--snakefile"
    assert command[4:8] == ["--configfile", "results/tiny/study.yaml", "--cores", "1"]


def test_a_file_is_run_as_it_is_and_everything_is_the_default(here: Path, commands: list[list[str]]) -> None:
    (here / "mine.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(STUDY))))
    aps.run("mine.yaml")
    assert commands[0][3:8] == ["all", "--configfile", "mine.yaml", "--cores", "all"]
    assert not (here / "results").exists()


def test_wrong_settings_are_refused_before_anything_is_written(here: Path, commands: list[list[str]]) -> None:
    with pytest.raises(UserError, match=r"unknown key 'knn\.kk'; did you mean 'knn\.k'"):
        aps.run(STUDY | {"experiments": {"floor": {"stages": ["knn"], "knn": {"kk": 3}}}})
    with pytest.raises(UserError, match=r"unknown key 'pretrain\.epoch'"):
        aps.pretrain("digits", pretrain={"epoch": 3})
    assert not commands and not list(here.iterdir())


def test_numbers_and_names_of_numpy_and_torch_are_those_of_python(here: Path, commands: list[list[str]]) -> None:
    given: dict[str, Any] = {
        "study": np.str_("tiny"),
        "defaults": {
            "dataset": {"name": np.str_("digits"), "train_limit": np.int64(64)},
            "encoder": ENCODER,
            "seeds": np.arange(2),
            "stages": ("pretrain", "knn"),
            "pretrain": PRETRAIN | {"lr": np.float64(1e-3), "weight_decay": np.float32(0.5), "epochs": torch.tensor(1)},
            "views": {"flip": np.float64(0.5), "crop_scale": np.array([0.25, 1.0])},
            "sampling": {"flip_aware": np.bool_(False)},
        },
        "experiments": {np.str_("one"): {"knn": {"k": [np.int32(1), np.uint8(5)]}}},
    }
    assert aps.run(given) == []
    written = yaml.safe_load((here / "results/tiny/study.yaml").read_text())
    assert written["defaults"]["pretrain"] == PRETRAIN | {"lr": 1e-3, "weight_decay": 0.5}
    assert written["defaults"]["seeds"] == [0, 1] and written["defaults"]["views"]["crop_scale"] == [0.25, 1.0]
    assert (
        written["defaults"]["sampling"] == {"flip_aware": False} and written["defaults"]["dataset"]["train_limit"] == 64
    )
    assert written["experiments"] == {"one": {"knn": {"k": [1, 5]}}}


@pytest.mark.parametrize("value", [None, 5, b"mine.yaml", ["mine.yaml"]])
def test_a_study_or_data_of_another_type_is_one_sentence(value: Any, commands: list[list[str]]) -> None:
    with pytest.raises(UserError, match=r"study is .*; give a YAML file or a dictionary"):
        aps.run(value)
    with pytest.raises(UserError, match=r"data is .*; give a dataset's name or a folder of images"):
        aps.pretrain(value)
    loop: dict[str, Any] = {"study": "loop"}
    loop["experiments"] = loop
    with pytest.raises(UserError, match="study: a block holds itself"):
        aps.run(loop)
    assert not commands


def test_a_run_that_fails_says_so_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_stream", lambda arguments: 1)
    with pytest.raises(UserError, match=r"study 'tiny' did not finish \(Snakemake ended with status 1\)"):
        aps.run(STUDY)


def test_lines_of_the_process_are_shown_and_its_status_is_returned(capsys: pytest.CaptureFixture[str]) -> None:
    assert api._stream(["bash", "-c", "echo one; echo two >&2; exit 3"]) == 3
    assert capsys.readouterr().out == "one\ntwo\n"


@pytest.mark.slow
@pytest.mark.end_to_end
def test_a_study_from_python_returns_its_runs_and_computes_nothing_twice(here: Path) -> None:
    (run,) = aps.run(STUDY, "knn", cores=1)
    assert (run["experiment"], run["seed"], run["stage"]) == ("floor", 0, "knn")
    assert 10 < run["metrics"]["knn_top1_k1"] <= 100
    assert aps.run(STUDY, "knn", cores=1) == [run]


@pytest.mark.slow
@pytest.mark.end_to_end
@pytest.mark.parametrize("settings", [{"shrink": 64}, {"labels": False}])
def test_what_is_for_a_folder_is_refused_beside_a_datasets_name(
    here: Path, commands: list[list[str]], settings: dict
) -> None:
    with pytest.raises(UserError, match="digits is a dataset's name, and labels and shrink are for a folder"):
        aps.pretrain("digits", **settings)
    assert commands == []


def test_a_datasets_name_wins_over_a_folder_aloud_and_a_path_is_a_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "digits").mkdir()
    studies: list[dict] = []
    monkeypatch.setattr(aps.api, "run", lambda study, *_, **__: studies.append(study))
    monkeypatch.setattr("aps.inference.load.load", lambda path: path)
    aps.pretrain("digits")
    assert "for the folder write ./digits" in capsys.readouterr().err
    aps.pretrain("./digits")
    aps.pretrain(Path("digits"))
    assert [study["defaults"]["dataset"] for study in studies] == ["digits", "images", "images"]
    assert [study.get("datasets", {}).get("images", {}).get("folder") for study in studies] == [None] + 2 * [
        str(here / "digits")
    ]


def test_pretraining_a_tree_without_classes_from_python_gives_its_encoder(here: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(24):
        file = here / "images" / str(number % 3) / "deeper" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3)).astype(np.uint8)).save(file)
    model: Any = aps.pretrain("images", labels=False, shrink=18, encoder=ENCODER, pretrain=PRETRAIN, cores=1)
    (copy,) = (here / "results/data/images").glob("shrunk-*/train/0/deeper/0.png")
    assert Image.open(copy).size == (21, 18)
    assert model.embed([here / "images/0/deeper/0.png", np.zeros((9, 9, 3), np.uint8)]).shape == (2, 24)
    assert model.source.stage == "pretrain" and model.provenance["dataset"]["name"] == "images"
