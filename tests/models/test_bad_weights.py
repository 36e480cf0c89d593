"""Weights files that are none: one table, each row one sentence that names the file and fits a user's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_study import STUDY
from torch import Tensor

from aps import cli
from aps.models.encoder import build_encoder
from aps.models.weights import INFO_KEY, SETTINGS_KEY, load_encoder
from aps.settings.blocks import EncoderSettings

SETTINGS = EncoderSettings(**STUDY["defaults"]["encoder"])
State = dict[str, Tensor]


def state(**changed: Any) -> State:
    torch.manual_seed(0)
    plain = {name: x.clone() for name, x in build_encoder(SETTINGS).state_dict().items()}
    return {name: x for name, x in {**plain, **changed}.items() if x is not None}


def tensors(*, metadata: dict[str, str] | None = None, **changed: Any) -> Callable[[Path], None]:
    return lambda file: save_file({k: v.contiguous() for k, v in state(**changed).items()}, file, metadata)


def raw(content: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(content)


def header(text: str) -> Callable[[Path], Any]:
    return raw(len(text).to_bytes(8, "little") + text.encode() + bytes(64))


def cut(share: float) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        tensors()(file)
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])

    return write


ENTRY = '"cls_token": {"dtype": "F32", "shape": [1, 1, 4], "data_offsets": [0, 16]}'
TABLE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing": (lambda file: None, ("does not exist", "give the path")),
    "a folder": (lambda file: file.mkdir(), ("is a folder", "give the path")),
    "a link to nothing": (lambda file: file.symlink_to("nowhere"), ("does not exist", "give the path")),
    "a link to itself": (lambda file: file.symlink_to(file), ("cannot be read", "give the path")),
    "empty": (raw(b""), ("not a whole safetensors file", "copy or make it again")),
    "text": (raw(b"hello, these are no weights at all"), ("not a whole safetensors file", "copy or make it again")),
    "a zip": (raw(b"PK" + bytes(300)), ("not a whole safetensors file", "copy or make it again")),
    "a quarter": (cut(0.25), ("not a whole safetensors file", "copy or make it again")),
    "all but the end": (cut(0.99), ("not a whole safetensors file", "copy or make it again")),
    "header of no JSON": (header("{"), ("not a whole safetensors file", "copy or make it again")),
    "header that is a list": (header("[]"), ("not a whole safetensors file", "copy or make it again")),
    "header of nothing": (header("{}"), ("copy or make it again",)),
    "header longer than the file": (raw((2**40).to_bytes(8, "little") + b"{}"), ("not a whole", "copy or make it again")),
    "unknown type": (header("{" + ENTRY.replace("F32", "F3") + "}"), ("not a whole", "copy or make it again")),
    "offsets that overlap": (header("{" + ENTRY + "," + ENTRY.replace("cls", "pos") + "}"), ("not a whole", "copy or make it again")),
    "negative shape": (header("{" + ENTRY.replace("4]", "-4]") + "}"), ("not a whole", "copy or make it again")),
    "wrong shape": (tensors(**{"norm.bias": torch.ones(23)}), ("'norm.bias' has shape (23,)", "(24,)", "give a file that fits")),
    "another width": (tensors(cls_token=torch.zeros(1, 1, 48)), ("dim 48", "encoder.dim 24", "set them alike")),
    "scalar class token": (tensors(cls_token=torch.tensor(1.0)), ("'cls_token' has shape ()", "give another file")),
    "empty class token": (tensors(cls_token=torch.zeros(1, 1, 0)), ("'cls_token' has shape (1, 1, 0)", "give another file")),
    "empty positions": (tensors(pos_embed=torch.zeros(1, 0, 24)), ("'pos_embed' has shape (1, 0, 24)", "give another file")),
    "flat positions": (tensors(pos_embed=torch.zeros(24)), ("'pos_embed' has shape (24,)", "give another file")),
    "flat patches": (tensors(**{"patch_embed.proj.weight": torch.zeros(24)}), ("'patch_embed.proj.weight' has shape (24,)",)),
    "scalar elsewhere": (tensors(**{"norm.weight": torch.tensor(1.0)}), ("'norm.weight' has shape ()", "give a file that fits")),
    "empty elsewhere": (tensors(**{"norm.weight": torch.ones(0)}), ("'norm.weight' has shape (0,)", "give a file that fits")),
    "one tensor missing": (tensors(**{"norm.bias": None}), ("'norm.bias' is missing", "give one that is")),
    "no class token": (tensors(cls_token=None), ("'cls_token' is missing", "give another file")),
    "one tensor more": (tensors(gamma=torch.ones(2)), ("'gamma' has no place", "give the weights")),
    "blocks without number": (tensors(**{"blocks.x.norm1.bias": torch.ones(24)}), ("'blocks.x.norm1.bias' has no place",)),
    "a million blocks": (tensors(**{"blocks.9999.norm1.bias": torch.ones(24)}), ("depth 10000", "encoder.depth 1")),
    **{f"{kind}": (tensors(**{"norm.weight": torch.ones(24).to(kind)}), ("'norm.weight' holds", str(kind)[6:], "again"))
       for kind in (torch.int8, torch.int64, torch.uint8, torch.bool)},
    **{f"{kind}": (tensors(**{"norm.weight": torch.ones(24).to(kind)}), ("'norm.weight' holds", str(kind)[6:], "store it as float32"))
       for kind in (torch.float8_e4m3fn, torch.float8_e5m2)},
    **{f"{value}": (tensors(**{"norm.weight": torch.full((24,), value)}), ("'norm.weight': 24 of 24", "NaN or infinite", "again"))
       for value in (float("nan"), float("inf"))},
    "stored settings of no JSON": (tensors(metadata={SETTINGS_KEY: "{"}), ("stored encoder settings are not valid", "again")),
    "stored settings of another kind": (tensors(metadata={SETTINGS_KEY: "[]"}), ("stored encoder settings are not valid", "again")),
    "stored settings out of range": (tensors(metadata={SETTINGS_KEY: json.dumps({"heads": 0})}), ("not valid", "again")),
    **{f"stored images: {text}": (tensors(metadata={INFO_KEY: text}), (f"({INFO_KEY}) is damaged", "again"))
       for text in ("{", "[]", "7", '{"mean": 1, "std": 2}', '{"mean": [1], "std": [1]}', '{"mean": ["a","b","c"], "std": [1,1,1]}',
                    '{"mean": [NaN, 0, 0], "std": [1, 1, 1]}')},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    (tmp_path / "home").mkdir()
    return tmp_path


def knn(capsys: pytest.CaptureFixture[str], digits: Path, weights: str) -> tuple[int, str]:
    """kNN of a study whose encoder is the user's own file -> exit status, last line on standard error."""
    study = {**STUDY, "experiments": {"own": {
        "encoder": {"weights": weights}, "stages": ["knn"], "dataset": {"statistics": "encoder"},
    }}}  # fmt: skip
    Path("study.yaml").write_text(yaml.safe_dump(study))
    status = cli.main(["knn", "--configfile", "study.yaml", "--manifest", str(digits)])
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return status, (shown.splitlines() or [""])[-1]


@pytest.mark.parametrize("name", TABLE)
def test_a_file_that_holds_no_such_encoder_is_one_sentence_that_fits_a_file_of_ones_own(
    name: str, folder: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = TABLE[name]
    make(folder / "mine.safetensors")
    status, sentence = knn(capsys, digits, "mine.safetensors")
    assert status == 2 and sentence.startswith("error: ") and "mine.safetensors" in sentence, sentence
    assert all(word in sentence for word in words), sentence
    assert "run the stage" not in sentence and "\\n" not in sentence and len(sentence) < 400, sentence


def test_a_file_that_may_not_be_read_is_one_sentence(
    folder: Path, digits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors()(folder / "mine.safetensors")
    opened = Path.open

    def refuse(self: Path, *how: Any, **more: Any) -> Any:
        if self.name == "mine.safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *how, **more)

    monkeypatch.setattr(Path, "open", refuse)  # root may read whatever its mode is
    status, sentence = knn(capsys, digits, "mine.safetensors")
    assert status == 2 and "cannot be read (Permission denied); give the path" in sentence


def test_a_path_from_home_is_found(folder: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors()(folder / "home" / "mine.safetensors")
    status, sentence = knn(capsys, digits, "~/mine.safetensors")
    assert status == 0, sentence
    assert torch.equal(load_encoder("~/mine.safetensors", SETTINGS).cls_token, state()["cls_token"])


def test_an_encoder_that_a_stage_makes_is_asked_of_the_stage(
    folder: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, sentence = knn(capsys, digits, "experiment:own")
    assert status == 2, sentence
    Path("study.yaml").write_text(yaml.safe_dump(STUDY))
    status = cli.main(["knn", "--configfile", "study.yaml", "--manifest", str(digits)])
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and "encoder.safetensors is missing; run the stage that makes it" in sentence
