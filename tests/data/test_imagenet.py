import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from miniatures import imagenet as miniature
from miniatures import jpeg, md5, tar, wnids

from aps.data import imagenet
from aps.data.load import FileSplit, load_split, read_image
from aps.data.manifest import Manifest, read_index
from aps.data.prepare import prepare
from aps.errors import UserError
from aps.settings.blocks import SourceSettings

CLASSES, TRAIN, VAL = 6, 4, 2


def expect(archives: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the module expect the miniature's checksums and counts."""
    for file in ("TRAIN", "VAL", "DEVKIT"):
        published = getattr(imagenet, file)
        monkeypatch.setattr(imagenet, file, published._replace(md5=archives[published.name]))
    monkeypatch.setattr(imagenet, "CLASSES", CLASSES)
    monkeypatch.setattr(imagenet, "COUNTS", {"train": CLASSES * TRAIN, "val": CLASSES * VAL})


@pytest.fixture()
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    expect(miniature(tmp_path / "raw", CLASSES, TRAIN, VAL), monkeypatch)
    return tmp_path / "raw"


def replace(raw: Path, file: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another archive, whose checksum is expected: so that what comes after the checksum is tested."""
    published = getattr(imagenet, file)
    (raw / published.name).write_bytes(content)
    monkeypatch.setattr(imagenet, file, published._replace(md5=md5(content)))


def run(tmp_path: Path, path: Path) -> Manifest:
    return prepare("imagenet1k", tmp_path / "imagenet1k", SourceSettings(path=str(path)))


def test_the_archives_become_class_folders_with_every_image_as_it_was(raw: Path, tmp_path: Path) -> None:
    manifest = run(tmp_path, raw)
    out = tmp_path / "imagenet1k"
    ids = wnids(CLASSES)
    assert manifest.classes == tuple(ids)
    assert (manifest.splits["train"].count, manifest.splits["test"].count) == (CLASSES * TRAIN, CLASSES * VAL)
    for c, wnid in enumerate(ids):
        assert sorted(os.listdir(out / "train" / wnid)) == [f"{wnid}_{i + 1}.JPEG" for i in range(TRAIN)]
        assert (out / "train" / wnid / f"{wnid}_2.JPEG").read_bytes() == jpeg(1000 * c + 1, 11, 12)
    # ground truth numbers classes by ILSVRC2012_ID, which runs against the order of the WordNet IDs
    for i in range(CLASSES * VAL):
        name = f"ILSVRC2012_val_{i + 1:08d}.JPEG"
        assert (out / "val" / ids[::-1][i % CLASSES] / name).read_bytes() == jpeg(500_000 + i)
    names, labels = read_index(out / "test.tsv")
    assert [ids[label] for label in labels] == [name.split("/")[0] for name in names]
    assert manifest.splits["train"].images == "train"  # inside the folder: it can be moved
    assert not [entry for entry in os.listdir(out) if entry.endswith(".part")]
    assert sorted(os.listdir(raw)) == sorted(file.name for file in (imagenet.TRAIN, imagenet.VAL, imagenet.DEVKIT))


def test_an_existing_tree_is_used_in_place_and_has_the_same_digest(raw: Path, tmp_path: Path) -> None:
    extracted = run(tmp_path, raw)
    used = prepare("imagenet1k", tmp_path / "other", SourceSettings(path=str(tmp_path / "imagenet1k")))
    assert used.digest == extracted.digest and used.statistics == extracted.statistics
    assert used.splits["train"].images == str((tmp_path / "imagenet1k" / "train").resolve())
    assert not (tmp_path / "other" / "train").exists()


def test_statistics_say_that_they_are_over_a_sample(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "every pixel of the 24 train images" in run(tmp_path, raw).statistics.measured.over
    monkeypatch.setattr(imagenet, "STATISTICS_IMAGES", CLASSES)
    manifest = prepare("imagenet1k", tmp_path / "other", SourceSettings(path=str(tmp_path / "imagenet1k")))
    assert manifest.statistics.measured.over.startswith(
        "every pixel of a seeded, class-balanced sample of 6 train images"
    )
    assert manifest.digest_of == "class names, file names, file sizes and labels"
    assert manifest.normalization("published") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_a_sample_mean_is_close_to_the_mean_of_the_files(raw: Path, tmp_path: Path) -> None:
    mean = run(tmp_path, raw).normalization()[0]
    files = sorted((tmp_path / "imagenet1k" / "train").rglob("*.JPEG"))
    expected = torch.stack([read_image(file).double().mean((1, 2)) / 255 for file in files]).mean(0)
    torch.testing.assert_close(torch.tensor(mean, dtype=torch.float64), expected, atol=1e-12, rtol=0)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from aps.settings.blocks import SourceSettings
    from aps.data import fetch, imagenet
    from aps.data.prepare import prepare

    raw, out, after, classes, counts, sums = eval(sys.argv[1])
    for file in ("TRAIN", "VAL", "DEVKIT"):
        published = getattr(imagenet, file)
        setattr(imagenet, file, published._replace(md5=sums[published.name]))
    imagenet.CLASSES, imagenet.COUNTS, imagenet.WRITERS = classes, counts, 1
    copy, written = fetch.copy_file, []

    def copy_then_die(source, target, size, archive):
        written.append(target)
        if len(written) == after:
            target.write_bytes(source.read(size // 2))
            os.kill(os.getpid(), signal.SIGKILL)
        copy(source, target, size, archive)

    fetch.copy_file = copy_then_die
    prepare("imagenet1k", Path(out), SourceSettings(path=raw))
"""


@pytest.mark.parametrize("after", [5, CLASSES * VAL + 2 * TRAIN + 2])
def test_an_extraction_killed_in_the_middle_of_a_file_goes_on_where_it_was(
    raw: Path, tmp_path: Path, after: int
) -> None:
    out = tmp_path / "imagenet1k"
    sums = {file.name: file.md5 for file in (imagenet.TRAIN, imagenet.VAL, imagenet.DEVKIT)}
    arguments = repr((str(raw), str(out), after, CLASSES, imagenet.COUNTS, sums))
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), arguments], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "manifest.json").exists()
    in_val = after < CLASSES * VAL
    done = sorted((out / (".val.part" if in_val else "train")).glob("n*/*.JPEG"))
    assert len(done) == (after if in_val else 2 * TRAIN)  # of these, a half-written one in val only
    before = {file.name: file.stat().st_mtime_ns for file in done}
    run(tmp_path, raw)
    after_ = {file.name: file.stat().st_mtime_ns for file in out.rglob("*.JPEG")}
    assert len(after_) == CLASSES * (TRAIN + VAL)
    assert sum(after_[name] != before[name] for name in before) == (1 if in_val else 0)  # only the half-written one
    whole = prepare("imagenet1k", tmp_path / "whole", SourceSettings(path=str(raw)))
    assert Manifest.read(out / "manifest.json").digest == whole.digest
    assert not list(out.rglob("*.part"))


def test_a_full_disk_in_the_middle_loses_no_class(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "imagenet1k"
    monkeypatch.setattr(imagenet, "WRITERS", 1)
    real = imagenet.fetch.copy_file
    full = wnids(CLASSES)[3]

    def onto_a_full_disk(source, target, size, archive):  # type: ignore[no-untyped-def]
        if target.name == f"{full}_2.JPEG":
            target.symlink_to("/dev/full")
        real(source, target, size, archive)

    monkeypatch.setattr(imagenet.fetch, "copy_file", onto_a_full_disk)
    with pytest.raises(UserError, match=r"'imagenet1k': .*No space left on device; free the disk"):
        run(tmp_path, raw)
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "train").glob("n*/*.JPEG")}
    classes = {name.split("_")[0] for name in kept}
    assert set(wnids(CLASSES)[:3]) <= classes and full not in classes and len(kept) == TRAIN * len(classes)
    monkeypatch.setattr(imagenet.fetch, "copy_file", real)
    run(tmp_path, raw)
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in (out / "train").glob("n*/*.JPEG")}.items()


def test_it_cannot_be_downloaded_and_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"without a login: sources.imagenet1k.path is not set; set it to a folder with ILSVRC"
    ):
        prepare("imagenet1k", tmp_path / "imagenet1k", SourceSettings())


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"])
def test_a_missing_or_truncated_archive_is_named_before_anything_is_extracted(
    name: str, raw: Path, tmp_path: Path
) -> None:
    whole = (raw / name).read_bytes()
    (raw / name).write_bytes(whole[:-700])
    with pytest.raises(UserError, match=f"{name}: its md5 is .* truncated or altered, get it again"):
        run(tmp_path, raw)
    (raw / name).unlink()
    with pytest.raises(UserError, match=f"raw: has neither train/ nor {name}; put the publisher's file there"):
        run(tmp_path, raw)
    assert not (tmp_path / "imagenet1k" / "train").exists() and not (tmp_path / "imagenet1k" / "val").exists()


def test_a_class_archive_that_is_cut_inside_is_named(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = wnids(CLASSES)
    nested = {f"{w}.tar": tar({f"{w}_{i + 1}.JPEG": jpeg(i) for i in range(TRAIN)}) for w in ids}
    nested[f"{ids[2]}.tar"] = nested[f"{ids[2]}.tar"][:1000]
    replace(raw, "TRAIN", tar(nested), monkeypatch)
    with pytest.raises(UserError, match=rf"ILSVRC2012_img_train.tar: {ids[2]}.tar: truncated"):
        run(tmp_path, raw)
    assert not (tmp_path / "imagenet1k" / "train" / ids[2]).exists()


def test_a_missing_class_archive_is_named(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = wnids(CLASSES)
    replace(raw, "TRAIN", tar({f"{w}.tar": tar({f"{w}_1.JPEG": jpeg(0)}) for w in ids[1:]}), monkeypatch)
    with pytest.raises(UserError, match=rf"has no {ids[0]}.tar \(of 1 missing classes\)"):
        run(tmp_path, raw)


@pytest.mark.parametrize("where", ["outer", "nested"])
def test_a_member_that_points_outside_is_refused(
    where: str, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = wnids(CLASSES)
    nested = {f"{w}.tar": tar({f"{w}_{i + 1}.JPEG": jpeg(i) for i in range(TRAIN)}) for w in ids}
    if where == "outer":
        nested["../escaped.tar"] = nested[f"{ids[0]}.tar"]
    else:
        nested[f"{ids[0]}.tar"] = tar({"../../../escaped.JPEG": jpeg(0)})
    replace(raw, "TRAIN", tar(nested), monkeypatch)
    with pytest.raises(UserError, match=r"escaped.* points outside its folder; refused"):
        run(tmp_path, raw)
    assert not [path for path in tmp_path.rglob("*escaped*")]


def test_a_tree_that_is_not_whole_says_what_it_lacks(raw: Path, tmp_path: Path) -> None:
    run(tmp_path, raw)
    whole = tmp_path / "imagenet1k"
    first = wnids(CLASSES)[0]

    def again() -> Manifest:
        return prepare("imagenet1k", tmp_path / "other", SourceSettings(path=str(whole)))

    image = whole / "train" / first / f"{first}_1.JPEG"
    content = image.read_bytes()
    image.unlink()
    with pytest.raises(UserError, match=r"train: has 23 images instead of 24; complete it"):
        again()
    image.write_bytes(content)
    (whole / "val" / first).rename(whole / first)
    with pytest.raises(UserError, match=f"val: class folder '{first}' is missing; add it"):
        again()
    (whole / "train" / first).rename(whole / "lost")
    with pytest.raises(UserError, match=r"train: has 5 class folders instead of 6"):
        again()


def test_ground_truth_of_another_length_is_refused(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from miniatures import devkit

    replace(raw, "DEVKIT", devkit(wnids(CLASSES), [1, 2, 3]), monkeypatch)
    with pytest.raises(UserError, match=r"ground truth of 3 images in 3 classes instead of 12 in 6"):
        run(tmp_path, raw)
    replace(raw, "DEVKIT", devkit(wnids(CLASSES), [1, 2, 99]), monkeypatch)
    with pytest.raises(UserError, match=r"its class table or ground truth can't be read"):
        run(tmp_path, raw)
    replace(raw, "DEVKIT", tar({"ILSVRC2012_devkit_t12/readme.txt": b"x"}, "w:gz"), monkeypatch)
    with pytest.raises(UserError, match=r"has no ILSVRC2012_devkit_t12/data/meta.mat"):
        run(tmp_path, raw)


def test_an_unreadable_image_is_named(raw: Path, tmp_path: Path) -> None:
    run(tmp_path, raw)
    bad = next((tmp_path / "imagenet1k" / "train").rglob("*.JPEG"))
    bad.write_bytes(b"x" * bad.stat().st_size)
    with pytest.raises(UserError, match=f"{bad.name}: cannot be read as an image"):
        prepare("imagenet1k", tmp_path / "other", SourceSettings(path=str(tmp_path / "imagenet1k")))


def test_the_counts_are_those_of_the_whole_data_set() -> None:
    assert (imagenet.CLASSES, imagenet.COUNTS) == (1_000, {"train": 1_281_167, "val": 50_000})


def test_a_lost_image_is_mended_by_the_command_that_is_named(raw: Path, tmp_path: Path) -> None:
    before = run(tmp_path, raw)
    next((tmp_path / "imagenet1k/train").rglob("*.JPEG")).unlink()
    with pytest.raises(
        UserError,
        match=r"instead of 24; prepare it again: `python -m aps data imagenet1k --again`$",
    ):
        run(tmp_path, raw)
    after = prepare("imagenet1k", tmp_path / "imagenet1k", SourceSettings(path=str(raw)), force=True)
    assert after.digest == before.digest and len(list((tmp_path / "imagenet1k/train").rglob("*.JPEG"))) == 24


def test_another_image_in_the_place_of_an_unpacked_one_is_refused(raw: Path, tmp_path: Path) -> None:
    before, out = run(tmp_path, raw), tmp_path / "imagenet1k"
    (small, *_, large) = sorted((out / "train").rglob("*.JPEG"), key=lambda file: file.stat().st_size)
    times = large.stat()
    large.write_bytes(small.read_bytes().ljust(times.st_size, b"\0"))
    os.utime(large, ns=(times.st_atime_ns, times.st_mtime_ns))  # neither size nor time tell
    split = load_split(out / "manifest.json", "train")
    assert isinstance(split, FileSplit)
    row = next(i for i in range(len(split)) if split.path(i) == large)
    with pytest.raises(UserError, match=r"its content is not what was prepared\); prepare dataset 'imagenet1k' again"):
        split.read(row)
    large.write_bytes(small.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"bytes instead of \d+; prepare it again: `python -m aps data imagenet1k --again`$"
    ):
        run(tmp_path, raw)
    assert prepare("imagenet1k", out, SourceSettings(path=str(raw)), force=True).digest == before.digest
    assert split.read(row).shape[0] == 3
