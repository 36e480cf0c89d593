from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import image, jpeg, png, tree

from aps.data.load import load_split
from aps.data.prepare import prepare
from aps.errors import UserError
from aps.settings.blocks import SourceSettings


def run(tmp_path: Path, root: str = "mine", out: str = "folder"):  # type: ignore[no-untyped-def]
    return prepare("folder", tmp_path / out, SourceSettings(path=str(tmp_path / root)))


@pytest.fixture()
def mine(tmp_path: Path) -> Path:
    tree(tmp_path / "mine" / "train", ["cat", "dog"], 5)
    tree(tmp_path / "mine" / "test", ["cat", "dog"], 2, start=50)
    return tmp_path / "mine"


def test_a_tree_with_train_and_test_is_used_in_place(mine: Path, tmp_path: Path) -> None:
    manifest = run(tmp_path)
    assert manifest.classes == ("cat", "dog") and manifest.image_size == (12, 16)
    assert (manifest.splits["train"].count, manifest.splits["test"].count) == (10, 4)
    assert manifest.splits["train"].images == str((mine / "train").resolve())
    assert {file.name for file in (tmp_path / "folder").iterdir()} == {
        ".lock",
        "files.tsv",
        "manifest.json",
        "prepared.json",
        "test.tsv",
        "train.tsv",
    }


def test_its_statistics_are_those_of_the_decoded_train_images(mine: Path, tmp_path: Path) -> None:
    run_ = run(tmp_path)
    pixels = torch.stack([image(100 * c + i) for c in range(2) for i in range(5)]).double() / 255
    mean, std = run_.normalization()
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), atol=1e-14)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3), correction=0), atol=1e-12)


def test_val_is_the_test_split_where_there_is_no_test(mine: Path, tmp_path: Path) -> None:
    (mine / "test").rename(mine / "val")
    assert run(tmp_path).splits["test"].images == str((mine / "val").resolve())


def test_a_single_tree_is_split_by_class_and_always_alike(tmp_path: Path) -> None:
    tree(tmp_path / "mine", ["cat", "dog", "emu"], 10)
    manifest = run(tmp_path)
    assert (manifest.splits["train"].count, manifest.splits["test"].count) == (24, 6)
    train, test = (load_split(tmp_path / "folder" / "manifest.json", split) for split in ("train", "test"))
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert not set(train.paths) & set(test.paths) and len({*train.paths, *test.paths}) == 30
    assert run(tmp_path, out="again").digest == manifest.digest


def test_the_digest_follows_contents_and_labels_but_not_the_place(mine: Path, tmp_path: Path) -> None:
    first = run(tmp_path).digest
    mine.rename(tmp_path / "moved")
    assert run(tmp_path, "moved", "b").digest == first
    (tmp_path / "moved" / "train" / "cat" / "0.png").write_bytes(png(image(999)))
    changed = run(tmp_path, "moved", "c").digest
    assert changed != first
    (tmp_path / "moved" / "train" / "cat" / "1.png").rename(tmp_path / "moved" / "train" / "dog" / "x1.png")
    assert run(tmp_path, "moved", "d").digest not in (first, changed)


def test_another_path_in_the_study_prepares_it_again(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path)
    tree(tmp_path / "others", ["ant", "bee"], 5)
    assert run(tmp_path, "others").classes == ("ant", "bee")
    assert "its source is now" in capsys.readouterr().out


def test_an_image_that_vanished_is_noticed_before_training(mine: Path, tmp_path: Path) -> None:
    run(tmp_path)
    (mine / "train" / "dog" / "2.png").unlink()
    assert run(tmp_path).splits["train"].count == 9


def test_unreadable_images_are_all_listed(mine: Path, tmp_path: Path) -> None:
    (mine / "train" / "cat" / "bad 1.jpg").write_bytes(jpeg(0)[:150])
    (mine / "train" / "dog" / "bad2.png").write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"cat/bad 1.jpg: cannot be read .* \(2 such files, listed in .*unreadable.txt\)"
    ):
        run(tmp_path)
    listed = (tmp_path / "folder" / "unreadable.txt").read_text()
    assert "bad 1.jpg" in listed and "bad2.png" in listed
    assert not (tmp_path / "folder" / "manifest.json").exists()
    for bad in ("cat/bad 1.jpg", "dog/bad2.png"):
        (mine / "train" / bad).unlink()
    assert run(tmp_path).splits["train"].count == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: (m / "test" / "dog").rename(m / "test" / "cow"), r"test: class folder 'dog' is missing; add it"),
        (lambda m: (m / "test" / "cow").mkdir(), r"test: class folder 'cow' is in this split only"),
        (lambda m: (m / "train" / "ant").mkdir(), r"train/ant: class folder has no images"),
        (lambda m: (m / "train" / "cat" / "a.TIFF").touch(), r"train/cat/a.TIFF: images of this format can't be read"),
        (lambda m: (m / "test").rename(m / "evaluate"), r"mine: has train/ but neither test/ nor val/"),
    ],
)
def test_a_wrong_tree_is_one_sentence(change, message: str, mine: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    change(mine)
    with pytest.raises(UserError, match=message):
        run(tmp_path)


def test_a_wrong_path_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"sources.folder.path is not set; set sources.folder.path to a folder with train/"
    ):
        prepare("folder", tmp_path / "folder", SourceSettings())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"sources.folder.path: .*file is not a folder"):
        run(tmp_path, "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: has no class folders"):
        run(tmp_path, "empty")
    tree(tmp_path / "single", ["cat"], 1)
    with pytest.raises(UserError, match=r"single/cat: one image can't be split"):
        run(tmp_path, "single")


def test_images_below_a_class_and_of_many_sizes_are_found(tmp_path: Path) -> None:
    tree(tmp_path / "mine" / "train", ["cat"], 2)
    (tmp_path / "mine" / "train" / "cat" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "cat" / "deep" / "er" / "big.JPG").write_bytes(jpeg(1, 40, 30))
    (tmp_path / "mine" / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "mine" / "train" / ".cache").mkdir()
    tree(tmp_path / "mine" / "val", ["cat"], 1)
    manifest = run(tmp_path)
    assert manifest.splits["train"].count == 3 and manifest.image_size is None
    assert load_split(tmp_path / "folder" / "manifest.json", "train").read(2).shape == (3, 40, 30)
