import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from miniatures import coco as miniature
from miniatures import coco_annotations, jpeg, md5, zipped

from aps.data import coco
from aps.data.load import load_split
from aps.data.manifest import Manifest
from aps.data.prepare import prepare
from aps.detection.annotations import CocoSplit
from aps.errors import UserError
from aps.settings.blocks import SourceSettings

TRAIN, VAL, INSTANCES, CLASSES = 5, 3, 2, 4


@pytest.fixture()
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sums = miniature(tmp_path / "raw", TRAIN, VAL, INSTANCES, CLASSES)
    folder = tmp_path / "raw"

    def here(file: Any) -> Any:
        return file._replace(md5=sums[file.name], url=(folder / file.name).as_uri())

    monkeypatch.setattr(coco, "ANNOTATIONS", here(coco.ANNOTATIONS))
    monkeypatch.setattr(coco, "IMAGES", {split: here(file) for split, file in coco.IMAGES.items()})
    monkeypatch.setattr(coco, "COUNTS", {"train": TRAIN, "val": VAL})
    monkeypatch.setattr(coco, "INSTANCES", {"train": INSTANCES * TRAIN, "val": INSTANCES * VAL})
    monkeypatch.setattr(coco, "CLASSES", CLASSES)
    return folder


def run(tmp_path: Path, path: Path | None, out: str = "coco2017") -> Manifest:
    return prepare("coco2017", tmp_path / out, SourceSettings(path=str(path) if path else None))


def unpack(raw: Path, target: Path) -> Path:
    for file in raw.glob("*.zip"):
        with zipfile.ZipFile(file) as archive:
            archive.extractall(target)
    return target


def replace(raw: Path, name: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another zip, whose checksum is expected."""
    (raw / name).write_bytes(content)
    if name == coco.ANNOTATIONS.name:
        monkeypatch.setattr(coco, "ANNOTATIONS", coco.ANNOTATIONS._replace(md5=md5(content)))
    else:
        split = name.removesuffix("2017.zip")
        monkeypatch.setitem(coco.IMAGES, split, coco.IMAGES[split]._replace(md5=md5(content)))


def test_zips_a_tree_and_a_download_give_the_same_manifest(raw: Path, tmp_path: Path) -> None:
    manifest = run(tmp_path, raw)
    assert manifest.kind == "detection" and manifest.classes == tuple(f"thing {c}" for c in range(CLASSES))
    assert {split: s.count for split, s in manifest.splits.items()} == {"train": TRAIN, "val": VAL}
    assert manifest.splits["train"].images == "train2017"
    assert manifest.splits["val"].annotations == "annotations/instances_val2017.json"
    out = tmp_path / "coco2017"
    assert (out / "train2017" / "000000000004.jpg").read_bytes() == jpeg(4)
    assert not (out / "annotations" / "captions_train2017.json").exists()  # only instances are needed
    tree = unpack(raw, tmp_path / "tree")
    in_place = run(tmp_path, tree, "in_place")
    assert in_place.digest == manifest.digest
    assert in_place.splits["train"].images == str((tree / "train2017").resolve())
    assert not (tmp_path / "in_place" / "train2017").exists()
    downloaded = run(tmp_path, None, "downloaded")
    assert downloaded.digest == manifest.digest
    assert not list((tmp_path / "downloaded").rglob("*.zip")) and len(list(raw.glob("*.zip"))) == 3


def test_a_mix_of_unpacked_folders_and_zips_works(raw: Path, tmp_path: Path) -> None:
    whole = run(tmp_path, raw)
    unpack(raw, raw)
    (raw / "train2017.zip").unlink()
    for file in (raw / "val2017").iterdir():
        file.unlink()
    (raw / "val2017").rmdir()
    assert run(tmp_path, raw, "mixed").digest == whole.digest


def test_it_is_not_loaded_as_a_classification_dataset(raw: Path, tmp_path: Path) -> None:
    run(tmp_path, raw)
    with pytest.raises(UserError, match=r"dataset 'coco2017' is for detection"):
        load_split(tmp_path / "coco2017" / "manifest.json", "train")


def test_an_interrupted_extraction_keeps_whole_files_and_writes_half_ones_again(raw: Path, tmp_path: Path) -> None:
    part = tmp_path / "coco2017" / ".train2017.part" / "train2017"
    part.mkdir(parents=True)
    (part / "000000000000.jpg").write_bytes(jpeg(0))
    (part / "000000000001.jpg").write_bytes(jpeg(1)[:50])
    before = (part / "000000000000.jpg").stat().st_mtime_ns
    run(tmp_path, raw)
    images = tmp_path / "coco2017" / "train2017"
    assert (images / "000000000000.jpg").stat().st_mtime_ns == before
    assert (images / "000000000001.jpg").read_bytes() == jpeg(1)
    assert not part.parent.exists()


@pytest.mark.parametrize("name", ["train2017.zip", "val2017.zip", "annotations_trainval2017.zip"])
def test_a_truncated_or_missing_zip_is_named(
    name: str, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = (raw / name).read_bytes()[:-60]
    (raw / name).write_bytes(half)
    with pytest.raises(UserError, match=f"{name}: its md5 is .* truncated or altered"):
        run(tmp_path, raw)
    replace(raw, name, half, monkeypatch)
    with pytest.raises(UserError, match=f"{name}: truncated or damaged archive"):
        run(tmp_path, raw)
    (raw / name).unlink()
    with pytest.raises(UserError, match=f"raw: has neither .* nor {name}; put one of them there"):
        run(tmp_path, raw)


def test_an_image_that_was_altered_in_the_zip_fails_its_crc(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray((raw / "val2017.zip").read_bytes())
    at = content.find(jpeg(1)[100:120])
    content[at] ^= 0xFF
    replace(raw, "val2017.zip", bytes(content), monkeypatch)
    with pytest.raises(UserError, match=r"val2017.zip: truncated or damaged archive .*CRC"):
        run(tmp_path, raw)


def test_a_member_that_points_outside_is_refused(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(raw, "val2017.zip", zipped({"val2017/../../../escaped.jpg": jpeg(0)}), monkeypatch)
    with pytest.raises(UserError, match=r"escaped.jpg' points outside its folder; refused"):
        run(tmp_path, raw)
    assert not list(tmp_path.rglob("*escaped*"))


def test_a_zip_of_something_else_is_refused(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(raw, "val2017.zip", zipped({"val2014/0.jpg": jpeg(0)}), monkeypatch)
    with pytest.raises(UserError, match=r"val2017.zip: holds no val2017/\*"):
        run(tmp_path, raw)


def change(content: dict[str, Any], what: str) -> Any:
    if what == "fewer images":
        content["images"] = content["images"][:-1]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 102]
    elif what == "fewer instances":
        content["annotations"].pop()
    elif what == "fewer classes":
        content["categories"].pop()
        content["annotations"] = [a | {"category_id": 1} for a in content["annotations"]]
    elif what == "other classes":
        content["categories"][0]["name"] = "else"
    elif what == "stray image":
        content["annotations"][0]["image_id"] = 7
    elif what == "stray category":
        content["annotations"][0]["category_id"] = 2
    elif what == "no instances":
        del content["annotations"]
    return content


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("fewer images", "lists 2 images instead of 3"),
        ("fewer instances", "lists 5 instances instead of 6"),
        ("fewer classes", "lists 3 classes instead of 4"),
        ("other classes", "its classes are not those of the train annotations"),
        ("stray image", "annotation 9000 refers to image 7, which is not listed"),
        ("stray category", "annotation 9000 refers to category 2, which is not listed"),
        ("no instances", "not a COCO instance file .*annotations"),
        ("truncated", "truncated or not a COCO instance file"),
        ("missing", "instances_val2017.json is missing"),
    ],
)
def test_annotations_that_are_not_whole_are_refused(what: str, message: str, raw: Path, tmp_path: Path) -> None:
    tree = unpack(raw, tmp_path / "tree")
    file = tree / "annotations" / "instances_val2017.json"
    content = coco_annotations([f"{i:012d}.jpg" for i in range(VAL)], INSTANCES * VAL, CLASSES)
    file.write_text(json.dumps(change(content, what))[: -10 if what == "truncated" else None])
    if what == "missing":
        file.unlink()
    with pytest.raises(UserError, match=message):
        run(tmp_path, tree)


def test_missing_and_empty_images_are_named(raw: Path, tmp_path: Path) -> None:
    tree = unpack(raw, tmp_path / "tree")
    (tree / "val2017" / "000000000002.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"000000000002.jpg is empty"):
        run(tmp_path, tree)
    (tree / "val2017" / "000000000001.jpg").unlink()
    with pytest.raises(UserError, match=r"000000000001.jpg is missing \(of 1 missing images\)"):
        run(tmp_path, tree)


def test_the_counts_are_those_of_the_whole_data_set() -> None:
    assert (coco.COUNTS, coco.CLASSES) == ({"train": 118_287, "val": 5_000}, 80)


@pytest.mark.parametrize("damage", ["gone", "empty"])
def test_a_lost_image_is_mended_by_the_command_that_is_named(raw: Path, tmp_path: Path, damage: str) -> None:
    before = run(tmp_path, raw)
    image = tmp_path / "coco2017" / "train2017" / "000000000004.jpg"
    image.unlink() if damage == "gone" else image.write_bytes(b"")
    for file in ("manifest.json", "prepared.json"):
        (tmp_path / "coco2017" / file).rename(tmp_path / file)
    with pytest.raises(UserError, match=r"004\.jpg is .*; prepare it again: `python -m aps data coco2017 --again`$"):
        run(tmp_path, raw)
    for file in ("manifest.json", "prepared.json"):
        (tmp_path / file).rename(tmp_path / "coco2017" / file)
    assert prepare("coco2017", tmp_path / "coco2017", SourceSettings(path=str(raw)), force=True) == before
    assert image.read_bytes() == jpeg(4)


@pytest.mark.parametrize("size", ["the same size", "another size"])
def test_another_image_in_the_place_of_an_unpacked_one_is_refused(raw: Path, tmp_path: Path, size: str) -> None:
    before, out = run(tmp_path, raw), tmp_path / "coco2017"
    image = out / "train2017" / "000000000004.jpg"
    image.write_bytes(jpeg(3) if size == "another size" else image.read_bytes()[:-1] + b"x")
    split = CocoSplit(out / "manifest.json", "train", training=True)
    with pytest.raises(
        UserError, match=r"004\.jpg: .*its content is not what was prepared\); prepare .* coco2017 --again`$"
    ):
        split.read(split.ids.index(next(i for i in split.ids if split.path(split.ids.index(i)) == image)))
    if size == "another size":
        assert "004.jpg has" in str(Manifest.read(out / "manifest.json").altered_image(out))
        with pytest.raises(UserError, match=r"004\.jpg has \d+ bytes instead of \d+; prepare it again: .* --again`$"):
            run(tmp_path, raw)
    assert prepare("coco2017", out, SourceSettings(path=str(raw)), force=True) == before
    assert all(split.read(i).shape[0] == 3 for i in range(len(split)))
