import json
from pathlib import Path

import pytest

from aps.data.manifest import (
    ChannelStatistics,
    Manifest,
    Split,
    Statistics,
    content_digest,
    preparing,
    read_checksums,
    read_index,
    write_index,
)
from aps.errors import UserError
from aps.layout import data_folder, dataset_of
from aps.settings.blocks import UserDataset


def manifest(**changes: object) -> Manifest:
    measured = ChannelStatistics(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), over="all")
    fields = dict(
        name="toy",
        kind="classification",
        classes=("a", "b"),
        image_size=(8, 8),
        splits={"train": Split(count=2, tensors="train.safetensors")},
        statistics=Statistics(measured=measured),
        digest="0" * 64,
        digest_of="pixels",
        origin="here",
    )
    return Manifest(**(fields | changes))  # type: ignore[arg-type]


def test_a_manifest_read_back_equals_the_one_written(tmp_path: Path) -> None:
    manifest().write(tmp_path / "toy" / "manifest.json")
    assert Manifest.read(tmp_path / "toy" / "manifest.json") == manifest()
    assert [file.name for file in (tmp_path / "toy").iterdir()] == ["manifest.json"]


def test_a_missing_manifest_says_how_to_prepare_the_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'cifar10' is not prepared; prepare it by `python -m aps data cifar10`"):
        Manifest.read(tmp_path / "cifar10" / "manifest.json")


@pytest.mark.parametrize("broken", [False, True])
def test_messages_name_a_users_dataset_as_the_user_does(tmp_path: Path, broken: bool) -> None:
    path = tmp_path / "photos-d7c5509d" / "manifest.json"
    path.parent.mkdir()
    if broken:
        path.write_text("{")
    with pytest.raises(UserError) as found:
        Manifest.read(path)
    assert str(found.value).endswith("prepare it by `python -m aps data photos --configfile STUDY.yaml`")
    assert "photos-d7c5509d" not in str(found.value).replace(str(path), "")


def test_a_folder_leads_back_to_the_name_that_it_was_made_of() -> None:
    for name in ("photos", "a-b", "x-0123abcd"):
        assert dataset_of(Path("results/data") / data_folder(name, UserDataset(folder="a"))) == name
    assert dataset_of(Path("results/data/cifar10")) == "cifar10"
    assert "--configfile" in preparing("photos") and "--configfile" not in preparing("digits")


@pytest.mark.parametrize(
    "change", [{"kind": "sound"}, {"extra": 1}, {"splits": {"train": {"count": "many"}}}, {"statistics": None}]
)
def test_a_manifest_of_another_version_is_refused_with_the_key(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "toy" / "manifest.json"
    path.parent.mkdir()
    path.write_text(json.dumps(manifest().model_dump(mode="json") | change))
    with pytest.raises(UserError, match=rf"not a manifest of this version \({next(iter(change))}.*aps data toy"):
        Manifest.read(path)


def test_a_half_written_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy" / "manifest.json"
    manifest().write(path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match=r"not a manifest"):
        Manifest.read(path)


def test_statistics_that_the_dataset_lacks_are_refused_by_name() -> None:
    assert manifest().normalization("measured") == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(UserError, match=r"'toy' has no published channel statistics; set dataset.statistics: measured"):
        manifest().normalization("published")


def test_an_index_keeps_names_with_spaces_and_any_bytes(tmp_path: Path) -> None:
    names = ["a/plain.png", "b c/ünï 1.jpg", "d/raw\udcff.png"]
    write_index(tmp_path / "i.tsv", names, [0, 1, 2])
    assert read_index(tmp_path / "i.tsv") == (names, [0, 1, 2])
    with pytest.raises(UserError, match=r"tab or line break"):
        write_index(tmp_path / "i.tsv", ["a/b\nc.png"], [0])


def test_a_digest_tells_where_one_part_ends_and_the_next_begins() -> None:
    assert content_digest(b"ab", b"c") != content_digest(b"a", b"bc")
    assert content_digest(b"ab", b"c") == content_digest(memoryview(b"ab"), b"c")
    assert content_digest({"a": 1, "b": 2}) == content_digest({"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("key", "values"),
    [("mean", [128.0, 0.1, 0.1]), ("mean", [-0.5, 0.1, 0.1]), ("std", [0.2, -0.1, 0.2]), ("std", [0.2, 0.2, 1.5])],
)
def test_statistics_that_can_not_be_those_of_pixels_are_refused(tmp_path: Path, key: str, values: list[float]) -> None:
    content = manifest().model_dump(mode="json")
    content["statistics"]["measured"][key] = values
    path = tmp_path / "toy" / "manifest.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    wrong = next(value for value in values if not 0 <= value <= 1)
    with pytest.raises(UserError, match=rf"statistics.measured: Value error, {key} {wrong} is not between 0 and 1"):
        Manifest.read(path)
    path.write_text(json.dumps(content).replace(str(wrong), "NaN"))
    with pytest.raises(UserError, match=r"not a manifest of this version"):
        Manifest.read(path)


def test_an_index_without_labels_reads_back_as_no_label(tmp_path: Path) -> None:
    write_index(tmp_path / "i.tsv", ["a b.png", "c/d.png"], None)
    assert read_index(tmp_path / "i.tsv") == (["a b.png", "c/d.png"], [-1, -1])


def test_an_index_keeps_the_checksums_of_images_and_one_without_has_none(tmp_path: Path) -> None:
    for labels, found in (([3, 4], [3, 4]), (None, [-1, -1])):
        write_index(tmp_path / "i.tsv", ["a b.png", "c/d.png"], labels, [10, 20], ["00" * 32, "ff" * 32])
        assert read_index(tmp_path / "i.tsv") == (["a b.png", "c/d.png"], found)
        assert read_checksums(tmp_path / "i.tsv") == [b"\0" * 32, b"\xff" * 32]
        write_index(tmp_path / "i.tsv", ["a b.png", "c/d.png"], labels, [10, 20])
        assert read_checksums(tmp_path / "i.tsv") == []


def test_an_index_with_bytes_reads_back_as_one_without(tmp_path: Path) -> None:
    for labels, found in (([3, 4], [3, 4]), (None, [-1, -1])):
        write_index(tmp_path / "i.tsv", ["a b.png", "c/d.png"], labels, [10, 20])
        assert read_index(tmp_path / "i.tsv") == (["a b.png", "c/d.png"], found)
        assert [line.split("\t")[2] for line in (tmp_path / "i.tsv").read_text().splitlines()] == ["10", "20"]
