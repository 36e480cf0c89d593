"""A dataset of one's own that does not keep the contract is refused when it is prepared, in a sentence that names its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from aps.data import arrays
from aps.data.load import load_split
from aps.data.manifest import Manifest, with_sizes
from aps.data.prepare import prepare
from aps.errors import UserError
from aps.registry import DATASETS
from aps.settings.blocks import SourceSettings

HERE = SourceSettings()
X, Y = np.zeros((8, 1, 4, 4), np.uint8), np.arange(8) % 2
GOOD = {"train": (X, Y), "test": (X, Y)}
OURS = r"^dataset 'ours' \(.*/ours_data\.py\)"


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Prepares a dataset `ours` whose function returns what `splits` and `classes` make, or `returned`."""
    (tmp_path / "ours_data.py").write_text(
        "def prepare(folder, source, name):\n    return made(folder, source, name)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(DATASETS, "_rows", DATASETS._rows | {"ours": "ours_data:prepare"})

    def prepared(splits: Any = None, classes: tuple[str, ...] = ("a", "b"), returned: Any = None) -> Manifest:
        import ours_data

        def made(folder: Path, source: SourceSettings, name: str) -> Any:
            return arrays.store(folder, name, splits, classes, "made up", source) if splits is not None else returned

        monkeypatch.setattr(ours_data, "made", made, raising=False)
        return prepare("ours", tmp_path / "data" / "ours", HERE)

    yield prepared
    import sys

    sys.modules.pop("ours_data", None)


@pytest.mark.parametrize(
    ("splits", "classes", "sentence"),
    [
        ({"train": (X, None), "test": (X, None)}, "ab", "split 'train': it has classes but no labels"),
        ({"train": (X, Y), "test": (X, None)}, "ab", "split 'test': it has classes but no labels"),
        ({"train": (X, Y)}, "", "split 'train': it has labels but no classes"),
        ({"train": (X, Y)}, "ab", "has train and no test, which a dataset for classification needs"),
        ({"test": (X, Y)}, "ab", "has test and no train"),
        ({"train": (X / 255, Y), "test": (X, Y)}, "ab", r"split 'train': its images are float64 of shape \(8, 1, 4, 4\)"),
        ({"train": (X.repeat(4, 1), Y)}, "ab", r"its images are uint8 of shape \(8, 4, 4, 4\)"),
        ({"train": (np.zeros((8, 4, 4, 3), np.uint8), Y)}, "ab", r"its images are uint8 of shape \(8, 4, 4, 3\)"),
        ({"train": (X[:, 0], Y)}, "ab", r"its images are uint8 of shape \(8, 4, 4\)"),
        ({"train": (X[:0], Y[:0])}, "ab", r"shape \(0, 1, 4, 4\)"),
        ({"train": (X, Y[:5])}, "ab", r"its labels are int64 of shape \(5,\) for 8 images"),
        ({"train": (X, Y / 2)}, "ab", "its labels are float64"),
        ({"train": (X, Y.astype(str))}, "ab", "its labels are <U21"),
        ({"train": (X, Y + 5)}, "ab", "its labels go from 5 to 6; give 0 to 1"),
        ({"train": (X, Y - 1)}, "ab", "its labels go from -1 to 0"),
    ],
)  # fmt: skip
def test_arrays_that_no_loader_could_use_are_one_sentence(make: Any, splits: Any, classes: str, sentence: str) -> None:
    with pytest.raises(UserError, match=f"{OURS}.*{sentence}"):
        make(splits, tuple(classes))


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        (("a", "a"), "classes 0 and 1 have one name, 'a'"),
        (("a", ""), "class 1 has an empty name"),
        (("a", b"b"), "the name of class 1 is b'b'; write it as text"),
    ],
)
def test_names_of_classes_that_cannot_be_told_apart_are_one_sentence(make: Any, classes: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=f"{OURS}: {sentence}"):
        make(GOOD, classes)


@pytest.mark.parametrize("returned", [None, {}, "manifest.json"])
def test_a_function_that_returns_no_manifest_is_one_sentence(make: Any, returned: Any) -> None:
    with pytest.raises(UserError, match=f"{OURS}: its function returned {type(returned).__name__}"):
        make(returned=returned)


def test_one_class_is_a_warning_and_no_test_split_without_labels_is_none(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make({split: (X, Y * 0) for split in GOOD}, ("a",)).classes == ("a",)
    assert "warning: it has one class, 'a', so kNN, linear_probe and finetune score 100 %" in capsys.readouterr().out
    for splits, classes in ((GOOD, ("a", "b")), ({"train": (X, None)}, ())):
        for file in (tmp_path / "data" / "ours").glob("*.json"):
            file.unlink()
        make(splits, classes)
        assert "warning" not in capsys.readouterr().out


def test_what_an_earlier_version_prepared_is_prepared_again_and_refused(make: Any, tmp_path: Path) -> None:
    manifest = make(GOOD)
    for file in ("manifest.json", "prepared.json"):
        whole = manifest.model_copy(update={"splits": {"train": manifest.splits["train"]}})
        whole.write(tmp_path / "data" / "ours" / file)
    assert set(make(GOOD).splits) == {"train", "test"}


def test_classes_without_labels_of_an_earlier_version_say_what_is_wrong(make: Any, tmp_path: Path) -> None:
    manifest, folder = make(GOOD), tmp_path / "data" / "ours"
    save_file({"images": torch.zeros(8, 1, 4, 4, dtype=torch.uint8)}, folder / "train.safetensors")
    with_sizes(manifest, folder).write(folder / "manifest.json")
    with pytest.raises(
        UserError, match="dataset 'ours' has classes and no labels; give it both or neither in its file"
    ):
        load_split(folder / "manifest.json", "train")
