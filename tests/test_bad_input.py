"""What people get wrong, one table: exit status 2, one sentence that names place, value and remedy, nothing left behind.

Run in this process, in an empty folder with a study that is right; each row spoils one thing.
"""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_study import STUDY, put, working_folder

from aps import cli

REMEDY = re.compile(
    r";|should be|did you mean|known:|write |give |set |choose |use |remove |lower |raise |make |run |must be|is above|add |"
    r"required|arguments|expected",
    re.IGNORECASE,
)
D = "defaults."
LONG, GONE = "n" * 300, object()
SETTINGS: list[tuple[str, Any, tuple[str, ...]]] = [
    # numbers that are none, or out of range
    *((f"{D}{block}.{key}", value, (f"{block}.{key}", json.dumps(value)))
      for block, keys in {
          "pretrain": ("epochs", "batch_size", "accumulate"),
          "finetune": ("epochs", "batch_size"),
          "linear_probe": ("epochs", "batch_size"),
          "detection": ("iterations", "batch_size", "proposals", "rois"),
          "encoder": ("image_size", "patch_size", "dim", "depth", "heads"),
          "sampling": ("samplings",),
      }.items() for key in keys for value in (0, -1, 1.5, "many")),
    *((f"{D}{key}", value, (key, "less than or equal to 1000000000"))
      for key in ("pretrain.epochs", "pretrain.warmup_epochs", "finetune.epochs", "detection.iterations", "encoder.dim",
                  "dataset.train_limit") for value in (10**9 + 1, 10**20, 10**300)),
    *((f"{D}{block}.lr", value, (f"{block}.lr", "greater than 0"))
      for block in ("pretrain", "finetune", "detection") for value in (0, -0.1)),
    *((f"{D}{key}", value, (key, "should be"))
      for key in ("pretrain.weight_decay", "finetune.mixup", "finetune.flip", "linear_probe.momentum", "sampling.gamma",
                  "sampling.ratio", "finetune.label_smoothing", "detection.drop_path", "finetune.ema")
      for value in (-1, "x", [1])),
    *((f"{D}{key}", float(value), (key, "finite number"))
      for key in ("pretrain.lr", "finetune.lr", "detection.lr", "knn.temperature", "sampling.ratio", "encoder.mlp_ratio")
      for value in ("nan", "inf")),
    # what can't work
    (f"{D}pretrain.batch_size", 1, ("pretrain.batch_size 1", "1 image", "raise pretrain.batch_size")),
    *((f"{D}pretrain", {"method": method, "batch_size": 1, **heads},
       ("pretrain.batch_size 1", "1 image", method, "raise pretrain.batch_size"))
      for method, heads in {
          "byol": {"projector": [16, 8], "predictor": [16, 8]},
          "mocov3": {"predictor": [16, 8]},
          "simclr": {"projector": [16, 8], "predictor": GONE},
      }.items()),
    (f"{D}stages", ["knn", "knn"], ("defaults", "stages lists knn twice", "remove one")),
    (f"{D}stages", ["knnn"], ("defaults", "stages.0", "knnn", "'knn'")),
    (f"{D}seeds", [7, 7], ("seeds lists 7 twice", "remove one")),
    (f"{D}pretrain.accumulate", 64, ("pretrain.batch_size 64", "accumulate 64", "lower pretrain.accumulate")),
    (f"{D}pretrain.accumulate", 3, ("pretrain.accumulate 3", "does not divide", "64")),
    (f"{D}linear_probe", {"batch_size": 1, "batch_norm": True}, ("linear_probe", "batch_size 1", "batch_norm: false")),
    (f"{D}finetune.batch_size", 63, ("finetune", "63", "odd", "make it even")),
    (f"{D}dataset.train_limit", 63, ("pretrain.batch_size 64", "dataset.train_limit 63", "lower the batch")),
    (f"{D}dataset.train_limit", 0, ("dataset.train_limit", "0", "greater than 0")),
    (f"{D}", {"dataset": {"name": "digits", "train_limit": 9}, "pretrain": {"batch_size": 8, "knn_every": 1}},
     ("train_limit 9", "knn_every", "10")),
    (f"{D}", {"dataset": {"name": "digits", "train_limit": 9}, "pretrain": {"batch_size": 8, "knn_readings": 2}},
     ("train_limit 9 leaves pretrain.knn_readings none", "raise it to 10", "set pretrain.knn_readings: null")),
    (f"{D}", {"dataset": {"name": "digits", "train_limit": 64}, "finetune": {"batch_size": 64, "holdout": 0.1}},
     ("finetune.batch_size 64", "train_limit 64", "6 held out")),
    (f"{D}", {"dataset": {"name": "digits", "train_limit": 64}, "finetune": {"batch_size": 2, "holdout": 0.001}},
     ("finetune.holdout 0.001", "keeps no image aside")),
    (f"{D}seeds", [2**64], ("seeds.0", str(2**64), "less than")),
    (f"{D}seeds", [-1], ("seeds.0", "-1", "greater than or equal to 0")),
    (f"{D}seeds", [], ("seeds", "[]", "at least 1")),
    (f"{D}seeds", [3, 3], ("seeds lists 3 twice", "remove one")),
    (f"{D}linear_probe.lrs", [0.1, 0.2, 0.1], ("linear_probe", "lrs lists 0.1 twice", "remove one")),
    (f"{D}linear_probe.lrs", [], ("linear_probe.lrs", "[]")),
    (f"{D}knn.k", [5, 5], ("knn", "k lists 5 twice", "remove one")),
    (f"{D}knn.k", [0], ("knn.k.0", "0")),
    (f"{D}detection.global_blocks", [0, 0], ("global_blocks lists 0 twice",)),
    *((f"{D}{key}", value, (key, "should be"))
      for key in ("knn.temperature", "pretrain.temperature") for value in (1e-30, 0, 1e30)),
    *((f"{D}{key}", 400_000, (key, "400000", "less than or equal to"))
      for key in ("encoder.image_size", "detection.image_size")),
    (f"{D}encoder", {"image_size": 4096, "patch_size": 2}, ("image_size 4096", "4,194,304 cells", "raise patch_size")),
    (f"{D}encoder.image_size", 17, ("image_size 17", "not a multiple of patch_size 4")),
    (f"{D}encoder.heads", 5, ("width 24", "5 heads")),
    (f"{D}encoder.arch", "tinny", ("arch 'tinny'", "did you mean 'tiny'")),
    (f"{D}pretrain.method", "apps", ("method 'apps'", "did you mean 'aps'")),
    (f"{D}sampling.strategy", "rondom", ("strategy 'rondom'", "did you mean 'random'")),
    (f"{D}dataset.name", "digit", ("dataset 'digit'", "did you mean")),
    (f"{D}dataset.name", LONG, ("dataset", "is unknown", "nnn...")),
    (f"{D}views.crop_scale", [0.9, 0.1], ("crop_scale", "low <= high")),
    (f"{D}views.crop_scale", [0.5, 2.0], ("crop_scale", "2.0 is above 1")),
    (f"{D}views.blur", [0.5], ("views.blur",)),
    (f"{D}sampling", {"ratio": 0.5, "samplings": 4}, ("sampling.samplings 4", "lower")),
    (f"{D}pretrian", {}, ("unknown key 'pretrian'", "did you mean 'pretrain'")),
    (f"{D}pretrain.epoch", 3, ("unknown key 'pretrain.epoch'", "did you mean 'pretrain.epochs'")),
    (f"{D}epochs", 3, ("unknown key 'epochs'", "did you mean")),
    (f"{D}finetune.rand_augment", "rand-x", ("finetune.rand_augment", "rand-x")),
    *((f"{D}{block}", {**method, "drop_path": 1.0}, (f"{block}.drop_path", "1.0", "less than 1"))
      for block, method in (("pretrain", {"method": "dino", "projector": GONE, "predictor": GONE}), ("finetune", {}), ("detection", {}))),
    (f"{D}pretrain.precision", "fp8", ("pretrain.precision", "fp8", "'bf16'")),
    (f"{D}pretrain", 5, ("pretrain", "5", "block of settings")),
    # names and the study's own keys
    ("study", LONG, ("study", "at most 100")),
    ("study", "a/b", ("study", "a/b", "letters")),
    ("study", 5, ("study", "5", "text")),
    (f"experiments.{LONG}", {}, ("experiment name 'nnn", "at most 100")),
    ("experiments.a/b", {}, ("experiment name 'a/b'",)),
    ("experiments.logs", {}, ("experiment name 'logs'",)),
    ("experiments.aps.inherits", "flor", ("inherits 'flor'", "did you mean 'floor'")),
    ("experiments.aps.inherits", "floor", ("inherits itself through",)),
    ("experiments.aps", 7, ("experiment 'aps'", "7", "block")),
    ("experiments.floor.encoder.weights", "experiment:no", ("names experiment 'no'", "known: aps, floor")),
    ("experiments.aps.encoder", {"weights": "random"}, ("encoder.weights is 'random'", "remove pretrain")),
    ("results", "a b", ("results", "a b")),
    ("results", "r\x00", ("results",)),
    ("sources", {"digit": {}}, ("sources names dataset 'digit'", "did you mean 'digits'")),
    ("datasets", {"mine": {}}, ("datasets.mine", "no source", "give one of")),
    ("datasets", {"digits": {"folder": "x"}}, ("datasets.digits", "known dataset", "choose another name")),
    *((f"resources.pretrain.{key}", -1, (f"resources.pretrain.{key}", "-1"))
      for key in ("workers", "processes", "gpus", "nodes", "threads", "mem_mb", "checkpoint_minutes")),
    ("resources.pretrain.checkpoint_minutes", float("nan"), ("resources.pretrain.checkpoint_minutes", "finite")),
    ("resources.pretrain.runtime", "soon", ("resources.pretrain.runtime", "soon", "write minutes")),
    ("resources.pretrane.gpus", 1, ("pretrane",)),
]  # fmt: skip


def key_path(key: str) -> tuple[str, ...]:
    return tuple(part for part in key.split(".") if part)


def spoiled(key: str, value: Any) -> dict[str, Any]:
    path = key_path(key)
    if isinstance(value, dict) and path:  # laid over what is there
        study = STUDY
        for inner, block in value.items():
            if isinstance(block, dict) and path == ("defaults",):
                for last, x in block.items():
                    study = put(study, (*path, inner, last), x)
            elif block is GONE:
                study = put(study, path, {k: v for k, v in study["defaults"][path[-1]].items() if k != inner})
            else:
                study = put(study, (*path, inner), block)
        return study if value else put(STUDY, path, {})
    return dict(put(STUDY, path, value))


OPTIONS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    *((("knn", option, value), (option, value)) for option, values in {
        "--workers": ("-1", "x", "1.5"),
        "--processes": ("0", "-2", "many"),
        "--nodes": ("0", "-2"),
        "--checkpoint-minutes": ("nan", "inf", "-1", "soon"),
        "--seed": ("-1", str(2**64), "x"),
    }.items() for value in values),
    (("ui", "--port", "0"), ("--port", "from 1 to 65535")),
    (("ui", "--port", "65536"), ("--port", "from 1 to 65535")),
    (("show-views", "--out", "x.png", "--images", "0"), ("--images", "0")),
    (("show-views", "--out", "x.png", "--seed", "-1"), ("--seed", "-1")),
    (("import-weights", "x.pth", "--out", "y", "--attention-heads", "0"), ("--attention-heads", "0")),
    (("estimate", "--utilization", "2"), ("--utilization 2", "(0, 1]")),
    (("estimate", "--gpu", "abacus"), ("abacus", "known")),
    (("knn", "--experiment", "flor"), ("no experiment 'flor'", "did you mean 'floor'")),
    (("knn", "--experiment", "floor", "--seed", "7"), ("no seed 7", "[0]")),
    (("pretrain", "--experiment", "floor"), ("no stage pretrain", "finetune, knn")),
    (("knn", "--experiment", "floor"), ("manifest.json is missing", "run")),
    (("knn", "--settings", "{"), ("--settings", "not valid JSON")),
    (("knn", "--settings", "[" * 5000), ("--settings", "not valid JSON")),
    (("knn", "--settings", "{}"), ("--settings", "is missing")),
    (("knn", "--profile", "t.json"), ("--profile", "leave it out")),
    (("check", "--set", "study"), ("--set study", "KEY=VALUE")),
    (("check", "--set", "=1"), ("--set =1", "KEY=VALUE")),
    (("check", "--set", "study=[1"), ("--set study=[1", "not valid YAML")),
    (("check", "--set", f"study={'[' * 3000}"), ("--set", "nested more than 50")),
    (("check", "--set", f"{'a.' * 3000}b=1"), ("--set", "nested more than 50")),
    (("check", "--set", "defaults.pretrain.lr=nan"), ("pretrain.lr", "nan")),
    (("check", "--configfile", "none.yaml"), ("none.yaml", "cannot be read", "give an existing")),
    (("check", "--configfile", "."), (".", "cannot be read")),
    (("check", "--configfile", LONG), ("nnn", "cannot be read")),
    (("data", "nothing"), ("nothing", "known")),
    (("data", "digits", "--entry", "{"), ("--entry",)),
    (("export", "none.safetensors", "--out", "x.safetensors"), ("none.safetensors",)),
    (("gc", "none.yaml"), ("none.yaml", "cannot be read")),
    (("knnn",), ("knnn", "choose from")),
]  # fmt: skip
TEXTS: list[tuple[str, str | bytes, tuple[str, ...]]] = [
    ("nothing", "", ("no experiments", "add an 'experiments:' block")),
    ("list", "- a", ("block of keys", "list")),
    ("text", "hello", ("block of keys", "str")),
    ("open bracket", "a: [1", ("not valid YAML", 'in "study.yaml", line 1')),
    ("tab", "a:\n\tb: 1", ("not valid YAML",)),
    ("latin-1", b"a: \xe9\xff", ("not valid YAML", "UTF-8")),
    ("key twice", "study: a\nstudy: b", ("'study' is given twice",)),
    ("number for a key", "1: a", ("not text", "quote it")),
    ("python object", "a: !!python/object:os.system x", ("not valid YAML",)),
    ("deep blocks", "a: " + "{a: " * 3000 + "1" + "}" * 3000, ("nested more than 50",)),
    ("deep lists", "a: " + "[" * 3000 + "]" * 3000, ("nested more than 50",)),
    ("deep, but within Python's limit", "a: " + "[" * 60 + "]" * 60, ("nested more than 50",)),
    ("block that holds itself", "a: &a [*a]", ("hold themselves",)),
    ("date that is none", "study: 2024-13-45", ("study.yaml", "month")),
    ("number of 9,000 digits", "study: " + "9" * 9000, ("study.yaml", "digits")),
    ("include that is not there", "include: [no.yaml]", ("no.yaml", "cannot be read")),
    ("include of itself", "include: [study.yaml]", ("includes itself", "remove one include")),
    ("include that is text", "include: other", ("include = \"other\"", "list of files")),
    ("no experiments", "experiments: {}", ("no experiments",)),
    ("null byte", b"study: a\x00b", ("not valid YAML", 'in "study.yaml"')),
]  # fmt: skip


def names(rows: list[Any]) -> list[str]:
    return [re.sub(r"\s+", " ", str(row[0]))[:40] + f" {str(row[1])[:20]}" for row in rows]


def test_the_table_has_150_cases() -> None:
    assert len(SETTINGS) + len(OPTIONS) + len(TEXTS) >= 150


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return working_folder(tmp_path, monkeypatch)


def refused(capsys: pytest.CaptureFixture[str], folder: Path, command: tuple[str, ...], says: tuple[str, ...]) -> None:
    before = sorted(folder.rglob("*"))
    try:
        status: Any = cli.main(list(command))
    except SystemExit as left:  # argparse's way
        status = left.code
    shown = capsys.readouterr().err
    *_, sentence = shown.splitlines()
    assert status == 2, shown
    assert "Traceback" not in shown and "error: " in sentence
    assert all(word in sentence for word in says), sentence
    assert REMEDY.search(sentence) and "\\n" not in sentence, sentence
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("key", "value", "says"), SETTINGS, ids=names(SETTINGS))
def test_a_setting_that_cannot_work_is_one_sentence(
    key: str, value: Any, says: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "study.yaml").write_text(yaml.safe_dump(spoiled(key, value)))
    refused(capsys, folder, ("check", "--configfile", "study.yaml"), ("study.yaml", *says))


@pytest.mark.parametrize(("command", "says"), OPTIONS, ids=names(OPTIONS))
def test_an_option_that_is_wrong_is_one_sentence(
    command: tuple[str, ...], says: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, folder, command, says)


@pytest.mark.parametrize("results", ["/proc/x", "closed", "closed/a/b", "file", "file/x"])
@pytest.mark.parametrize("verb", ["check", "data", "knn", "report"])
def test_a_results_folder_that_cannot_be_made_is_one_sentence(
    verb: str, results: str, digits: Path, folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (folder / "closed").mkdir()
    (folder / "file").touch()
    make = os.mkdir

    def mkdir(path: Any, *more: Any, **named: Any) -> None:
        if "closed" in str(path):  # a read-only file system, which no permission of root's opens
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        make(path, *more, **named)

    monkeypatch.setattr(os, "mkdir", mkdir)
    more = {"data": ("digits",), "knn": ("--experiment", "floor", "--manifest", str(digits))}
    refused(capsys, folder, (verb, *more.get(verb, ()), "--set", f"results={results}"), ("results", results))


@pytest.mark.parametrize(("name", "text", "says"), TEXTS, ids=[row[0] for row in TEXTS])
def test_a_file_that_is_no_study_is_one_sentence(
    name: str, text: str | bytes, says: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "study.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    refused(capsys, folder, ("check", "--configfile", "study.yaml"), says)


@pytest.mark.parametrize(("name", "text", "says"), TEXTS, ids=[row[0] for row in TEXTS])
def test_run_refuses_a_file_that_is_no_study_with_the_same_sentence_before_snakemake_starts(
    name: str, text: str | bytes, says: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (folder / "study.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    started: list[Any] = []
    monkeypatch.setattr("os.execv", lambda *of: started.append(of))
    if name == "no experiments":  # which is YAML: the Snakefile says it
        assert cli.main(["run", "-n", "--configfile", "study.yaml"]) == 0 and started
        return
    refused(capsys, folder, ("run", "-n", "--configfile", "study.yaml"), says)
    assert not started


@pytest.mark.parametrize("verb", ["check", "results", "run"])
def test_a_study_that_is_not_there_is_the_same_sentence_in_every_verb(
    verb: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, folder, (verb, "--configfile", "nofile.yaml"), ("nofile.yaml: cannot be read", "No such file"))


@pytest.mark.parametrize("verb", ["check", "results", "knn", "estimate", "sync", "show-views"])
def test_every_verb_refuses_a_study_with_the_same_sentence(
    verb: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "study.yaml").write_text(yaml.safe_dump(spoiled(f"{D}pretrain.batch_size", 1)))
    more = ("--out", "x.png") if verb == "show-views" else ()
    refused(
        capsys, folder, (verb, *more, "--configfile", "study.yaml"), ("pretrain.batch_size 1 leaves a step 1 image",)
    )
