import re
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import image, jpeg, png, tree
from PIL import Image

from aps.data import trees
from aps.data.folder import describe
from aps.data.load import FileSplit, load_split
from aps.data.manifest import copies_in_train
from aps.data.prepare import prepare
from aps.errors import UserError
from aps.layout import manifest_path
from aps.preflight import problems
from aps.settings.blocks import SourceSettings, UserDataset
from aps.settings.reading import load_study


def run(tmp_path: Path, root: str = "mine", out: str = "folder"):  # type: ignore[no-untyped-def]
    return prepare("folder", tmp_path / out, SourceSettings(path=str(tmp_path / root)))


def check(folder: Path, root: str = "mine", **entry: object) -> list[str]:
    """What `aps check` says of a tree before it is prepared."""
    stages = {"stages": ["knn"], "encoder": {"image_size": 16, "patch_size": 4, "weights": "random"}}
    if entry.get("labels") is False:
        stages = {"stages": ["pretrain"], "encoder": {"image_size": 16, "patch_size": 4}, "pretrain": {"batch_size": 2}}
    study = {
        "study": "own", "results": str(folder / "results"), "tracking_uri": "none",
        "datasets": {"mine": {"folder": str(folder / root), **entry}}, "experiments": {"e": {"dataset": "mine", **stages}},
    }  # fmt: skip
    return list(problems(load_study([], study)))


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
    assert isinstance(train, FileSplit) and isinstance(test, FileSplit)
    paths = [split.path(i) for split in (train, test) for i in range(len(split))]
    assert len(set(paths)) == len(paths) == 30
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
        (
            lambda m: (m / "train" / "cat" / "a.TIFF").touch(),
            r"train/cat/a.TIFF: cannot be read as an image \(it is empty",
        ),
        (lambda m: (m / "test").rename(m / "evaluate"), r"mine: has train/ but neither test/ nor val/"),
    ],
)
def test_a_wrong_tree_is_one_sentence(change, message: str, mine: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    change(mine)
    with pytest.raises(UserError, match=message):
        run(tmp_path)
    found = check(tmp_path)
    assert not found if "cannot be read" in message else [re.search(message, sentence) for sentence in found] != [None]


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
    tree(tmp_path / "single", ["cat", "dog"], 1)
    with pytest.raises(UserError, match=r"single/cat: one image can't be split"):
        run(tmp_path, "single")
    (named,), (empty,), (single,) = (check(tmp_path, root) for root in ("file", "empty", "single"))
    assert named == f"datasets.mine.folder: {tmp_path / 'file'} is not a folder; correct the path"
    assert "empty: has no class folders" in empty and "single/cat: one image can't be split" in single


def test_images_below_a_class_and_of_many_sizes_are_found(tmp_path: Path) -> None:
    tree(tmp_path / "mine" / "train", ["cat", "dog"], 2)
    (tmp_path / "mine" / "train" / "cat" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "cat" / "deep" / "er" / "big.JPG").write_bytes(jpeg(1, 40, 30))
    (tmp_path / "mine" / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "mine" / "train" / ".cache").mkdir()
    tree(tmp_path / "mine" / "val", ["cat", "dog"], 1)
    manifest = run(tmp_path)
    assert manifest.splits["train"].count == 5 and manifest.image_size is None
    assert load_split(tmp_path / "folder" / "manifest.json", "train").read(2).shape == (3, 40, 30)


@pytest.mark.parametrize("test", ["test", "Test", "TESTING", "val", "valid", "Validation"])
@pytest.mark.parametrize("train", ["train", "Train", "training", "TRAINING"])
def test_the_usual_names_of_splits_count_in_any_case(train: str, test: str, tmp_path: Path) -> None:
    tree(tmp_path / "mine" / train, ["cat", "dog"], 3)
    tree(tmp_path / "mine" / test, ["cat", "dog"], 1, start=50)
    manifest = run(tmp_path)
    assert manifest.classes == ("cat", "dog")
    assert (manifest.splits["train"].count, manifest.splits["test"].count) == (6, 2)


def test_a_val_split_beside_test_is_not_used_and_that_is_said(mine: Path, tmp_path: Path) -> None:
    tree(mine / "valid", ["cat", "dog"], 1, start=90)
    tree(mine / "raw", ["x"], 3, start=500)
    notes = run(tmp_path).notes
    assert f"left out: 2 images of {mine / 'valid'} (test/ is the test split)" in notes
    assert f"left out: 3 images of {mine / 'raw'} (it stands beside train/ and test/)" in notes


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (["set/train/cat", "set/train/dog", "set/test/cat", "set/test/dog"], r"mine: its folder set/ holds test/, train/, so it is a dataset, not a class; name .*mine/set"),
        (["set/cat", "set/dog"], r"mine: has one class folder, set/, which holds cat/, dog/; with one class every score is 100, so name .*mine/set"),
        (["a/train/cat", "a/test/cat", "b/train/cat", "b/test/cat"], r"mine: its folder a/ holds test/, train/"),
        (["cat/train", "cat/test", "dog/train", "dog/test"], r"its folder cat/ holds test/, train/.* put the splits above the classes"),
        (["test/cat", "test/dog"], r"mine: has test/ but no train/; put the training images"),
        (["cat", "dog", "test/cat", "test/dog"], r"mine: has test/ but no train/"),
        (["train/cat", "train/dog", "Training/cat", "test/cat"], r"mine: has both Training/ and train/; keep one"),
        (["train/train/cat", "train/test/cat", "test/cat"], r"mine/train: its folders test/, train/ are splits, not classes"),
        (["train_images", "test_images"], r"mine: its folders test_images/, train_images/ look like splits, not classes"),
        (["cat"], r"mine: has one class folder, cat/; with one class every score is 100, so add .*labels: false"),
        (["train/all", "test/all"], r"mine/train: has one class folder, all/"),
        (["train/", "test/"], r"mine/train: holds 2 images and no class folders; put the images of each class .*labels: false"),
        ([""], r"mine: holds 2 images and no class folders"),
    ],
)  # fmt: skip
def test_layouts_whose_figures_would_mean_nothing_are_refused(layout: list[str], message: str, tmp_path: Path) -> None:
    for number, place in enumerate(layout):
        folder = tmp_path / "mine" / place
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(2):
            (folder / f"{i}.png").write_bytes(png(image(10 * number + i)))
    with pytest.raises(UserError, match=message):
        run(tmp_path)
    assert not (tmp_path / "folder" / "manifest.json").exists()
    (sentence,) = check(tmp_path)
    assert re.search(message, sentence), sentence
    assert check(tmp_path, trust=True) == check(tmp_path, labels=False) == []


def test_check_says_nothing_of_a_tree_that_can_be_prepared_and_opens_no_image(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aps.data.trees.read_file", lambda path: pytest.fail("an image was opened"))
    assert check(tmp_path) == []
    (mine / "test" / "dog" / "0.png").write_bytes(b"no image, which only its preparation finds out")
    assert check(tmp_path) == []


def test_check_does_not_list_again_a_tree_that_is_prepared_but_one_that_changed(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = UserDataset(folder=str(mine))
    prepare("mine", manifest_path(tmp_path / "results", "mine", source).parent, source)
    with monkeypatch.context() as patch:
        patch.setattr("aps.data.folder.layout", lambda *given: pytest.fail("it was listed again"))
        assert check(tmp_path) == []
    for file in (mine / "test" / "cat").iterdir():
        file.unlink()
    (sentence,) = check(tmp_path)
    assert "test/cat: class folder has no images" in sentence


def unlabelled(tmp_path: Path, root: str = "mine"):  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    manifest = describe(out, "pool", str(tmp_path / root), "datasets.pool.folder", labels=False)
    manifest.write(out / "manifest.json")
    return manifest


def test_without_labels_every_image_of_the_tree_is_a_training_image(tmp_path: Path) -> None:
    for place in ("", "2021/june", "test/cat", "train"):
        folder = tmp_path / "mine" / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.png").write_bytes(png(image(len(place))))
    manifest = unlabelled(tmp_path)
    assert (manifest.kind, manifest.classes, list(manifest.splits)) == ("images", (), ["train"])
    assert manifest.splits["train"].count == 4 and manifest.statistics.measured is not None
    split = load_split(tmp_path / "out" / "manifest.json", "train")
    assert isinstance(split, FileSplit) and split.labels.tolist() == [-1] * 4 and split.classes == ()
    assert [split.path(i).name for i in range(len(split))] == ["a.png"] * 4
    assert len(load_split(tmp_path / "out" / "manifest.json", "train", limit=3)) == 3
    with pytest.raises(UserError, match=r"dataset 'pool' has no split 'test'; it has train"):
        load_split(tmp_path / "out" / "manifest.json", "test")


def test_an_unlabelled_tree_without_images_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine" / "a").mkdir(parents=True)
    (tmp_path / "mine" / "a" / "x.heic").touch()
    with pytest.raises(UserError, match=r"mine: holds no images \(passed over: 1 .heic\); name a folder with images"):
        unlabelled(tmp_path)
    (sentence,) = check(tmp_path, labels=False)
    assert sentence.endswith("mine: holds no images (passed over: 1 .heic); name a folder with images")


def test_what_is_passed_over_is_said_and_counted(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.heic", "b.heic", "c.npy", ".DS_Store", "._0.png"):
        (mine / "train" / "cat" / name).touch()
    (mine / "train" / "@eaDir").mkdir()
    (mine / "train" / "loose.png").write_bytes(png(image(777)))
    manifest = run(tmp_path)
    assert manifest.splits["train"].count == 10 and manifest.classes == ("cat", "dog")
    said = capsys.readouterr().out
    assert "folder: passed over in " in said and "2 .heic, 2 hidden files, 1 .npy, 1 hidden folder" in said
    assert f"left out: 1 image of {mine / 'train'}, outside its class folders" in said


def test_a_suffix_that_this_pillow_does_not_read_is_passed_over_and_counted(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mine / "train" / "cat" / "a.avif").write_bytes(b"some AVIF")
    monkeypatch.setattr(trees, "supported", lambda suffix: suffix != ".avif")
    manifest = run(tmp_path)
    assert manifest.splits["train"].count == 10 and "1 .avif" in manifest.notes[0]


def test_images_that_stand_in_train_and_test_alike_are_reported(mine: Path, tmp_path: Path) -> None:
    (mine / "test" / "dog" / "copy.png").write_bytes((mine / "train" / "cat" / "3.png").read_bytes())
    manifest = run(tmp_path)
    (note,) = manifest.notes
    assert note.startswith("1 image of test stands in train too, with the same content")
    assert copies_in_train(manifest.notes) == {"test": 1}
    assert (tmp_path / "folder" / "duplicates.txt").read_text() == "train/cat/3.png = test/dog/copy.png\n"


@pytest.mark.parametrize(("most", "dark"), [(4095, True), (4096, False), (0xFFFF, False)])
def test_images_of_12_bits_in_files_of_16_are_reported(most: int, dark: bool, tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "mine" / label).mkdir(parents=True)
        for i in range(4):
            values = np.random.default_rng(i).integers(0, 4000, (8, 8)).astype(np.uint16)
            values[0, 0] = most if label == "dog" and i == 2 else 17 * i + len(label)
            Image.fromarray(values).save(tmp_path / "mine" / label / f"{i}.png")
    (tmp_path / "mine/cat/rgb.png").write_bytes(png(image(7)))
    notes = run(tmp_path).notes
    expected = (
        "no value of 8 images of 16 bits is above 4,095 of 65,535; the upper 8 bits are kept, which leaves 16 levels of "
        "256, nearly black: rescale them to 0 to 65,535, or store 8 bits",
    )
    assert [note for note in notes if "16 bits" in note] == [*expected] * dark


def test_class_folders_in_two_unicode_forms_are_named(mine: Path, tmp_path: Path) -> None:
    tree(mine / "train", ["caf\u00e9"], 1, start=300)
    tree(mine / "test", ["cafe\u0301"], 1, start=400)
    with pytest.raises(UserError, match=r"test: class folder 'caf.' has its name in another Unicode form"):
        run(tmp_path)


def test_what_is_wrong_with_a_tree_is_one_sentence_before_an_image_is_read(mine: Path, tmp_path: Path) -> None:
    (mine / "train" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (mine / "test" / "loop").symlink_to(mine)
    with pytest.raises(UserError, match=r"holds a link to a folder that holds it: test/loop; a link that leads nowhere: train/cat/gone.png"):  # fmt: skip
        run(tmp_path)
    assert len(check(tmp_path)) == 1


def test_a_constant_channel_is_named_and_normalized_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, level in (("cat", 40), ("dog", 200)):
        (tmp_path / "mine" / kind).mkdir(parents=True)
        for number in range(3):
            pixels = torch.full((3, 9, 9), 77, dtype=torch.uint8)
            pixels[0] = level + number
            (tmp_path / "mine" / kind / f"{number}.png").write_bytes(png(pixels))
    manifest = run(tmp_path)
    mean, std = manifest.normalization()
    assert std[1:] == (1.0, 1.0) and 0.1 < std[0] < 0.5 and mean[1] == pytest.approx(77 / 255)
    assert "folder: green and blue: the same in every pixel of train, so normalized by 1" in capsys.readouterr().out


def test_a_changed_tree_is_prepared_again_and_says_what_changed(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = run(tmp_path)
    assert run(tmp_path) == before
    assert "already prepared and verified" in capsys.readouterr().out
    (mine / "train" / "cat" / "9.png").write_bytes(png(image(9999)))
    (mine / "test" / "dog" / "0.png").unlink()
    after = run(tmp_path)
    assert "prepared before, but folder mine: 1 image new, 1 gone; preparing it again" in capsys.readouterr().out
    assert after.splits["train"].count == 11 and after.digest != before.digest
    (mine / "train" / "cat" / "9.png").write_bytes(png(image(5)))
    assert run(tmp_path).digest != after.digest
    assert "1 image changed" in capsys.readouterr().out
