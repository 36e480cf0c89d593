"""The user's own COCO files: mended where that is harmless and counted, else refused with the annotation named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from aps.data.coco_files import Files, describe
from aps.data.fingerprint import changed
from aps.data.manifest import Manifest
from aps.detection.annotations import CocoSplit, result_rows
from aps.detection.score import coco_metrics
from aps.errors import UserError

HEIGHT, WIDTH = 40, 60
SQUARE = [5.0, 6.0, 20.0, 10.0]  # left, top, width, height
POLYGON = [5.0, 6.0, 25.0, 6.0, 25.0, 16.0, 5.0, 16.0]
Content = dict[str, Any]


def content() -> Content:
    """Three images with an instance each; real category ids have gaps."""
    return {
        "images": [{"id": 10 + i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(3)],
        "annotations": [
            {"id": 100 + i, "image_id": 10 + i, "category_id": (3, 7, 3)[i], "bbox": list(SQUARE), "area": 200.0,
             "iscrowd": 0, "segmentation": [list(POLYGON)]}
            for i in range(3)
        ],
        "categories": [{"id": 3, "name": "cell"}, {"id": 7, "name": "nucleus"}],
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """images/{train,val}/{0,1,2}.png, noise of its own each."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for number in range(3):
            pixels = generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{number}.png")
    return tmp_path


def run(
    folder: Path, change: Callable[[Content], Any] | None = None, val: Content | None = None, masks: bool = True
) -> Manifest:
    """Prepares content(), changed in train."""
    files = {}
    for split, own in (("train", content()), ("val", val or content())):
        if split == "train" and change is not None:
            change(own)
        (folder / f"{split}.json").write_text(json.dumps(own))
        files[split] = Files(folder / "images" / split, folder / f"{split}.json")
    out = folder / "out"
    out.mkdir(exist_ok=True)
    manifest = describe(out, "cells", files, "datasets.cells.coco", masks)
    manifest.write(out / "manifest.json")
    return manifest


def written(folder: Path, split: str = "train") -> Content:
    return dict(json.loads((folder / "out" / f"instances_{split}.json").read_text()))


def train(folder: Path) -> CocoSplit:
    return CocoSplit(folder / "out" / "manifest.json", "train", training=False)


def mask_of(folder: Path, number: int) -> np.ndarray:
    split = train(folder)
    return np.asarray(split.coco.annToMask(split.coco.anns[number]))


def test_a_whole_file_is_taken_as_it_is_with_annotations_counted_from_one(folder: Path) -> None:
    manifest = run(folder)
    assert manifest.kind == "detection" and manifest.classes == ("cell", "nucleus") and manifest.masks
    assert {split: own.count for split, own in manifest.splits.items()} == {"train": 3, "val": 3}
    assert manifest.image_size == (HEIGHT, WIDTH) and manifest.notes == ()
    found, given = written(folder), content()
    assert [a["id"] for a in found["annotations"]] == [1, 2, 3]
    for mine, theirs in zip(found["annotations"], given["annotations"], strict=True):
        assert {**mine, "id": 0} == {**theirs, "id": 0}
    assert found["images"] == given["images"] and found["categories"] == given["categories"]


@pytest.mark.parametrize("ids", [[0, 1, 2], [5, 5, 5], [None, None, None], ["a", "b", "c"], [0, 0, 7]])
def test_perfect_detections_score_100_whatever_the_annotations_ids_were(folder: Path, ids: list[Any]) -> None:
    def renumber(c: Content) -> None:
        for annotation, number in zip(c["annotations"], ids, strict=True):
            annotation.update(id=number) if number is not None else annotation.pop("id")

    given = content()
    renumber(given)
    run(folder, val=given)
    val = CocoSplit(folder / "out" / "manifest.json", "val", training=False)
    rows: list[dict[str, Any]] = []
    for index in range(len(val)):
        target = val.target(index)
        assert target.masks is not None
        rows += result_rows(
            val, val.ids[index], target.boxes, torch.ones(len(target.labels)), target.labels, target.masks.bool()
        )
    metrics = coco_metrics(val, rows)
    assert metrics["box_AP"] == pytest.approx(100) and metrics["mask_AP"] == pytest.approx(100)
    assert metrics["per_class"]["box_AP"] == pytest.approx({"cell": 100, "nucleus": 100})


def edit(number: int = 1, **keys: Any) -> Callable[[Content], None]:
    """Changes one annotation; None takes a key away."""

    def change(c: Content) -> None:
        for key, value in keys.items():
            c["annotations"][number].pop(key) if value is None else c["annotations"][number].update({key: value})

    return change


def edit_image(number: int = 1, **keys: Any) -> Callable[[Content], None]:
    def change(c: Content) -> None:
        for key, value in keys.items():
            c["images"][number].pop(key) if value is None else c["images"][number].update({key: value})

    return change


BEYOND = [50.0, 30.0, 15.0, 15.0]
MENDED: list[tuple[Callable[[Content], Any], str, dict[str, Any]]] = [
    (edit(iscrowd=None), "annotations without iscrowd (taken as 0): 1", {"iscrowd": 0}),
    (edit(iscrowd=True), "", {"iscrowd": 1}),
    (edit(area=None), "areas missing (computed): 1", {"area": 200.0}),
    (edit(area=0), "areas missing (computed): 1", {"area": 200.0}),
    (edit(area="big"), "areas missing (computed): 1", {"area": 200.0}),
    (edit(area=123.0), "", {"area": 123.0}),
    (edit(bbox=None), "boxes missing (computed from masks): 1", {"bbox": SQUARE}),
    (edit(bbox=[1, 1, 0, 5]), "boxes missing (computed from masks): 1", {"bbox": SQUARE}),
    (edit(bbox=[5, 6, 25, 16]), "boxes that don't fit their masks (computed from those): 1", {"bbox": SQUARE}),
    (edit(id=100), "annotations with a missing or repeated id (numbered anew): 1", {"id": 2}),
    (edit(segmentation=list(POLYGON)), "polygons outside a list (put into one): 1", {"segmentation": [POLYGON]}),
    (edit(segmentation=[POLYGON, [1.0, 1.0, 2.0, 2.0]]), "polygons of fewer than three points (left out): 1", {"segmentation": [POLYGON]}),
    (edit(segmentation=[[50.0, 30.0, 65.0, 30.0, 65.0, 45.0, 50.0, 45.0]], bbox=BEYOND), "polygons that reach beyond their images (cut): 1; boxes that reach beyond their images (cut): 1", {"bbox": [50.0, 30.0, 10.0, 10.0]}),
    (edit(bbox=[5, 6, 20, 10.5]), "", {"bbox": [5, 6, 20, 10.5]}),
    (lambda c: c["images"].append({**c["images"][1], "id": 99}), "images listed twice (joined): 1", {}),
    (lambda c: c["images"].append({"id": 99, "file_name": "gone.png"}), "images without a file and without annotations (left out): 1", {}),
    (edit_image(file_name="C:\\data\\1.png"), "file names with another path (found in the folder): 1", {}),
    (edit_image(file_name="some/where/1.png"), "file names with another path (found in the folder): 1", {}),
    (edit_image(height=None, width=None), "images recorded without their size or with another (corrected): 1", {}),
    (lambda c: c["categories"].append({"id": 8, "name": "cell"}), "names that several categories share (told apart by id): 2", {}),
]  # fmt: skip


@pytest.mark.parametrize(("change", "note", "expected"), MENDED)
def test_what_is_harmless_is_mended_and_counted(
    folder: Path, change: Callable[[Content], Any], note: str, expected: dict[str, Any]
) -> None:
    manifest = run(folder, change)
    notes = [n for n in manifest.notes if not n.startswith("no training instance")]
    assert notes == ([f"{folder / 'train.json'} mended: {note}"] if note else [])
    found = written(folder)
    assert len(found["images"]) == 3 and len(found["annotations"]) == 3
    second = found["annotations"][1]
    assert {key: second[key] for key in expected} == expected
    assert [image["file_name"] for image in found["images"]] == ["0.png", "1.png", "2.png"]
    assert all((image["height"], image["width"]) == (HEIGHT, WIDTH) for image in found["images"])
    train(folder)


REFUSED: list[tuple[Callable[[Content], Any], str]] = [
    (edit(segmentation=[]), r"annotation 101 has no segmentation while 5 others have; add it, or train boxes only \(masks: false\)"),
    (edit(segmentation=None), r"annotation 101 has no segmentation while 5 others have"),
    (edit(segmentation=[[1, 2, 3, 4]]), r"annotation 101 has no polygon of three points or more inside its image"),
    (edit(segmentation=[[1, 2, 3, 4, 5]]), r"annotation 101 has a polygon that is no list of x, y, x, y"),
    (edit(segmentation=[["a"] * 6]), r"annotation 101 has a polygon that is no list"),
    (edit(segmentation=[[1, 2, 3, 4, float("nan"), 6]]), r"annotation 101 has a polygon that is no list"),
    (edit(segmentation=[[100, 100, 120, 100, 120, 120]]), r"annotation 101 has no polygon .* inside its image"),
    (edit(segmentation={"size": [HEIGHT, WIDTH], "counts": "abc"}), r"annotation 101 has a mask whose run lengths are broken"),
    (edit(segmentation={"size": [HEIGHT, WIDTH], "counts": "\u732b"}), r"annotation 101 has a mask whose run lengths are broken"),
    (edit(segmentation={"size": [HEIGHT, WIDTH], "counts": [5, 10]}), r"annotation 101 has a mask whose run lengths are broken"),
    (edit(segmentation={"size": [HEIGHT, WIDTH], "counts": [-5, 2405]}), r"annotation 101 has a mask whose run lengths are broken"),
    (edit(segmentation={"size": [WIDTH, HEIGHT], "counts": [2400]}), r"annotation 101 has a mask of size \[60, 40\] \(height, width\), but its image is recorded as \[40, 60\]"),
    (edit(segmentation={"size": [HEIGHT, WIDTH], "counts": [2400]}), r"annotation 101 has a segmentation that covers no pixel"),
    (edit(bbox=[100, 100, 20, 20], segmentation=[[100, 100, 120, 100, 120, 120]]), r"annotation 101 has no polygon"),
    (edit(iscrowd=2), r"annotation 101 has iscrowd 2; set it to 0 or 1"),
    (edit(image_id=77), r"annotation 101 refers to image 77, which is not listed"),
    (edit(image_id=None), r"annotation 101 refers to image None, which is not listed"),
    (edit(category_id=4), r"annotation 101 refers to category 4, which is not listed"),
    (edit(category_id=[3]), r"annotation 101 refers to category \[3\], which is not listed"),
    (edit(id=None, image_id=77), r"annotation without an id, number 1 of the list, refers to image 77"),
    (edit_image(file_name="gone.png"), r"annotation 101 belongs to image 11, whose file gone.png is missing in .*train"),
    (edit_image(height=WIDTH, width=HEIGHT), r"annotation 101 belongs to image 11, recorded as 40x60 pixels, but .*1.png has 60x40"),
    (edit_image(height=2 * HEIGHT, width=2 * WIDTH), r"annotation 101 belongs to image 11, recorded as 120x80 pixels"),
    (edit_image(id=10), r"image 10 stands twice, as 0.png and 1.png; give one another id"),
    (edit_image(id=[1]), r"image 1 of the list has id \[1\]"),
    (edit_image(file_name=None), r"image 11 has file_name None; give it the name of its file"),
    (lambda c: c["categories"][1].update(id=3), r"category 3 stands twice, as 'cell' and 'nucleus'"),
    (lambda c: c["categories"][1].update(name=" "), r"category 7 has name ''; give it one"),
    (lambda c: c["categories"][1].pop("id"), r"category 1 of the list has id None"),
    (lambda c: c.update(categories=[]), r"lists no categories"),
    (lambda c: c.update(annotations=[]), r"train.json: has no instance; add annotations"),
    (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], r"train.json: has no instance"),
    (lambda c: c.pop("images"), r"has no list of records 'images', so it is no COCO instance file"),
    (lambda c: c.update(annotations={"1": {}}), r"has no list of records 'annotations'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_could_mean_two_things_is_refused_with_the_annotation_named(
    folder: Path, change: Callable[[Content], Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"train.json: {message}" if not message.startswith("train") else message):
        run(folder, change)
    assert not (folder / "out" / "manifest.json").exists()


def bare(c: Content) -> Content:
    for annotation in c["annotations"]:
        annotation.pop("segmentation")
    return c


def test_boxes_without_any_mask_make_a_dataset_of_boxes(folder: Path) -> None:
    manifest = run(folder, bare, val=bare(content()))
    assert not manifest.masks
    assert manifest.notes == (
        "instances have boxes and no masks: detection trains boxes only, and there is no mask AP",
    )
    split = train(folder)
    target = split.target(1)
    assert target.masks is None and target.boxes.tolist() == [[5.0, 6.0, 25.0, 16.0]]
    assert "segmentation" not in written(folder)["annotations"][0]


def test_masks_can_be_left_out_by_setting(folder: Path) -> None:
    manifest = run(folder, edit(segmentation=None), masks=False)
    assert not manifest.masks and "segmentation" not in written(folder)["annotations"][0]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([50, 30, 15, 12], [50.0, 30.0, 10.0, 10.0]),
        ([-2, -1, 20, 10], [0.0, 0.0, 18.0, 9.0]),
        ([40, 20, 60, 40], None),
        ([70, 10, 5, 5], None),
        ([1, 1, 0, 5], None),
        ([1, 1, -3, 5], None),
        ([1, 1, 5], None),
        ([1, 1, 5, float("nan")], None),
        ("box", None),
        (None, None),
    ],
)
def test_a_box_without_a_mask_is_cut_to_its_image_or_refused(folder: Path, box: Any, expected: list[float] | None) -> None:  # fmt: skip
    def change(c: Content) -> None:
        bare(c)
        edit(bbox=box)(c)

    if expected is None:
        with pytest.raises(UserError, match=r"train.json: annotation 101 has bbox"):
            run(folder, change, val=bare(content()))
    else:
        manifest = run(folder, change, val=bare(content()))
        assert written(folder)["annotations"][1]["bbox"] == expected
        assert "boxes that reach beyond their images (cut): 1" in manifest.notes[0]


def test_run_lengths_of_both_forms_are_the_mask(folder: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[6:16, 5:25] = np.random.default_rng(1).integers(0, 2, (10, 20))
    mask[6, 5] = mask[15, 24] = 1
    encoded = rle.encode(mask)
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges.tolist(), flat.size]).tolist()
    lengths = lengths if flat[0] == 0 else [0, *lengths]
    for counts in (encoded["counts"].decode(), lengths):
        run(folder, edit(segmentation={"size": [HEIGHT, WIDTH], "counts": counts}))
        assert np.array_equal(mask_of(folder, 2), mask)


def test_a_polygon_beyond_its_image_is_cut_exactly(folder: Path) -> None:
    """Against the mask drawn on a larger canvas."""
    generator = np.random.default_rng(2)
    for _ in range(10):
        points = generator.uniform([-15, -15], [WIDTH + 15, HEIGHT + 15], (6, 2)).round(1)
        points = points[np.argsort(np.arctan2(*(points - points.mean(0)).T))]  # no edge crosses another
        run(folder, edit(segmentation=[points.flatten().tolist()], bbox=None))
        big = rle.decode(rle.frPyObjects([(points + 20).flatten().tolist()], HEIGHT + 40, WIDTH + 40))[:, :, 0]
        differ = mask_of(folder, 2) != big[20 : 20 + HEIGHT, 20 : 20 + WIDTH]
        assert differ.mean() < 0.01


@pytest.mark.parametrize("kind", ["polygon", "run lengths"])
@pytest.mark.parametrize("number", [5, 6, 7, 8])
def test_annotations_recorded_before_the_exif_orientation_are_turned_with_the_image(
    folder: Path, number: int, kind: str
) -> None:
    """A white patch is annotated on the image as it is stored; after reading, the mask is where the patch is."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[6:16, 5:25] = 255
    exif = Image.Exif()
    exif[0x0112] = number
    Image.fromarray(pixels).save(folder / "images" / "train" / "1.png", exif=exif)
    mask = np.asfortranarray(pixels[:, :, 0] // 255)
    encoded = rle.encode(mask)
    segmentation = (
        {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()} if kind == "run lengths" else [POLYGON]
    )
    manifest = run(folder, edit(segmentation=segmentation))
    assert "images recorded before their EXIF orientation (annotations turned with them): 1" in manifest.notes[0]
    split = train(folder)
    image, target = split.read(1), split.target(1)
    assert image.shape == (3, WIDTH, HEIGHT) and target.masks is not None
    assert torch.equal(target.masks[0].bool(), image[0] > 128)
    left, top, right, bottom = target.boxes[0].int().tolist()
    assert (image[0, top:bottom, left:right] > 128).all() and (bottom - top) * (right - left) == 200


def test_annotations_recorded_as_the_image_is_seen_stay_as_they_are(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.open(folder / "images" / "train" / "1.png").transpose(Image.Transpose.ROTATE_90)
    stored.save(folder / "images" / "train" / "1.png", exif=exif)
    assert run(folder).notes == () and written(folder)["annotations"][1]["bbox"] == SQUARE


def test_categories_of_val_are_those_of_train_by_id_or_by_name(folder: Path) -> None:
    val = content()
    for category, number in zip(val["categories"], (1, 2), strict=True):
        category["id"] = number
    for annotation, number in zip(val["annotations"], (1, 2, 1), strict=True):
        annotation["category_id"] = number
    manifest = run(folder, val=val)
    assert "categories with other ids than in train (matched by name): 2" in manifest.notes[0]
    assert [a["category_id"] for a in written(folder, "val")["annotations"]] == [3, 7, 3]
    assert written(folder, "val")["categories"] == written(folder)["categories"]
    val["categories"][1]["name"] = "else"
    with pytest.raises(UserError, match=r"val.json: category 2 'else' is none of train's \(cell, nucleus\)"):
        run(folder, val=val)
    val["annotations"].pop(1)
    assert "categories without an instance that train lacks (left out): 1" in run(folder, val=val).notes[0]


def test_names_in_any_script_are_kept_and_shared_ones_told_apart(folder: Path) -> None:
    def change(c: Content) -> None:
        c["categories"] = [{"id": 3, "name": "猫"}, {"id": 7, "name": "猫"}, {"id": 9, "name": "犬"}]

    val = content()
    change(val)
    manifest = run(folder, change, val=val)
    assert manifest.classes == ("猫 (3)", "猫 (7)", "犬")


def test_a_name_with_a_line_break_is_one_sentence(folder: Path) -> None:
    def change(c: Content) -> None:
        c["categories"] = [{"id": 3, "name": "a\nb"}, {"id": 7, "name": "b"}, {"id": 9, "name": "c"}]

    with pytest.raises(
        UserError, match=r"json: of its categories, counted from 0, class 0 has name 'a.nb' with a line"
    ):
        run(folder, change)


def test_ids_that_are_text_are_counted_anew(folder: Path) -> None:
    def change(c: Content) -> None:
        for image in c["images"]:
            image["id"] = f"image {image['id']}"
        for annotation in c["annotations"]:
            annotation["image_id"] = f"image {annotation['image_id']}"

    run(folder, change)
    assert [image["id"] for image in written(folder)["images"]] == [1, 2, 3]
    assert [a["image_id"] for a in written(folder)["annotations"]] == [1, 2, 3]


def test_instances_too_small_to_be_seen_are_left_out_and_counted(folder: Path) -> None:
    manifest = run(folder, edit(segmentation=[[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]], bbox=[5.1, 5.1, 0.1, 0.1]))
    assert "instances smaller than a pixel (left out): 1" in manifest.notes[0]
    assert len(written(folder)["annotations"]) == 2


def test_a_crowd_without_a_mask_is_its_box(folder: Path) -> None:
    manifest = run(folder, edit(segmentation=[], iscrowd=1))
    assert "crowds without a mask (taken as their boxes): 1" in manifest.notes[0]
    assert mask_of(folder, 2).sum() == 200 and len(train(folder).target(1).labels) == 0


def test_damaged_images_are_all_listed(folder: Path) -> None:
    for number in (0, 2):
        (folder / "images" / "train" / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0.png: cannot be read as an image .* \(2 such files, listed in .*unreadable.txt\)"):  # fmt: skip
        run(folder)


def test_images_of_12_bits_in_files_of_16_are_reported(folder: Path) -> None:
    for number, file in enumerate(sorted((folder / "images").rglob("*.png"))):
        Image.fromarray(np.full((HEIGHT, WIDTH), 600 + number, dtype=np.uint16)).save(file)
    assert any(note.startswith("no value of 6 images of 16 bits is above 605 of 65,535") for note in run(folder).notes)


def test_images_that_stand_in_train_and_val_alike_are_reported(folder: Path) -> None:
    whole = (folder / "images" / "train" / "0.png").read_bytes()
    (folder / "images" / "val" / "2.png").write_bytes(whole)
    assert run(folder).notes[0].startswith("1 image of val stands in train too, with the same content")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"images": 3}', "\ud83d"])
def test_a_broken_or_missing_file_is_one_sentence(folder: Path, text: str) -> None:
    run(folder)
    (folder / "val.json").write_bytes(text.encode("utf-8", errors="surrogatepass"))
    files = {s: Files(folder / "images" / s, folder / f"{s}.json") for s in ("train", "val")}
    with pytest.raises(UserError, match=r"val.json: (no whole JSON file|has no list of records)"):
        describe(folder / "out", "cells", files, "datasets.cells.coco")
    (folder / "val.json").unlink()
    with pytest.raises(UserError, match=r"datasets.cells.coco.val.annotations: .*val.json is no file"):
        describe(folder / "out", "cells", files, "datasets.cells.coco")
    files["train"] = files["train"]._replace(images=folder / "nowhere")
    with pytest.raises(UserError, match=r"datasets.cells.coco.train.images: .*nowhere is no folder"):
        describe(folder / "out", "cells", files, "datasets.cells.coco")


def test_changed_images_and_annotations_are_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    manifest = run(folder)
    assert changed(manifest, folder / "out") is None
    (folder / "images" / "train" / "0.png").write_bytes(b"other")
    (folder / "val.json").write_text("{}")
    assert changed(manifest, folder / "out") == "folder images/train: 1 image changed; file val.json: changed"


def test_the_digest_covers_what_was_mended_and_not_where_it_lies(folder: Path) -> None:
    first = run(folder).digest
    assert run(folder, edit(iscrowd=None)).digest == first
    assert run(folder, edit(category_id=3)).digest != first
    assert copy.deepcopy(run(folder)).digest == first


def test_what_preparing_wrote_is_verified_when_it_is_read(folder: Path) -> None:
    run(folder)
    file = folder / "out" / "instances_train.json"
    file.write_text(file.read_text().replace("20.0", "21.0"))
    with pytest.raises(UserError, match=r"instances_train.json: cannot be read \(damaged or altered since"):
        train(folder)
