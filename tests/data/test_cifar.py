import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import cifar_batches, md5, python2_pickle, tar

from aps.data import cifar, fetch
from aps.data.load import load_split
from aps.data.prepare import prepare
from aps.errors import UserError
from aps.settings.blocks import SourceSettings

NAMES = ("cifar10", "cifar100")


def publish(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path, per_batch: int = 4, **replaced: bytes) -> Path:
    """Write the archive as published, with some files replaced, and expect its checksums and counts."""
    folder.mkdir(parents=True, exist_ok=True)
    release = cifar.RELEASES[name]
    files = cifar_batches(name, per_batch)[0] | replaced
    content = tar({f"{release.base}/{file}": files[file] for file in files if files[file]}, "w:gz")
    archive = folder / release.archive.name
    archive.write_bytes(content)
    release = release._replace(
        archive=release.archive._replace(url=archive.as_uri(), md5=md5(content), sha256=None),
        train={batch: md5(files[batch]) for batch in release.train},
        test={batch: md5(files[batch]) for batch in release.test},
        meta=(release.meta[0], md5(files[release.meta[0]])),
        counts={"train": per_batch * len(release.train), "test": per_batch},
    )
    monkeypatch.setitem(cifar.RELEASES, name, release)
    return archive


def unpack(name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    for file, content in cifar_batches(name, 4)[0].items():
        (folder / file).write_bytes(content)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["archive", "folder of the archive", "unpacked", "batches", "download"])
def test_every_form_of_the_source_gives_the_published_images(
    name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = publish(name, monkeypatch, tmp_path / "raw")
    base = tmp_path / "tree" / cifar.RELEASES[name].base
    unpack(name, base)
    path = {
        "archive": archive,
        "folder of the archive": archive.parent,
        "unpacked": base.parent,
        "batches": base,
        "download": None,
    }[form]
    manifest = prepare(name, tmp_path / name, SourceSettings(path=str(path) if path else None))
    for split, (images, labels) in cifar_batches(name, 4)[1].items():
        loaded = load_split(tmp_path / name / "manifest.json", split)
        assert torch.equal(loaded.images, torch.from_numpy(images)) and loaded.labels.tolist() == labels
    assert manifest.classes == tuple(f"class {i}" for i in range(10 if name == "cifar10" else 100))
    assert manifest.normalization("published") == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert not (tmp_path / name / "download").exists() and archive.exists()
    digest = prepare(name, tmp_path / "other", SourceSettings(path=str(archive))).digest
    assert manifest.digest == digest


def test_the_published_checksums_and_counts_are_those_of_the_whole_data_sets() -> None:
    for name in NAMES:
        release = cifar.RELEASES[name]
        assert release.counts == {"train": 50_000, "test": 10_000}
        assert release.archive.url == f"https://www.cs.toronto.edu/~kriz/{release.archive.name}"
        assert len(release.archive.md5) == 32 and release.archive.sha256 and len(release.archive.sha256) == 64
        assert len(release.train) == (5 if name == "cifar10" else 1)


def test_a_batch_of_pythons_own_and_numpys_newer_names_is_read_too() -> None:
    data = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for protocol in (2, 4, 5):
        content = pickle.dumps({"data": data, "labels": [1, 2]}, protocol)
        if protocol == 5:  # numpy then uses another way to rebuild arrays; no published file does
            with pytest.raises(UserError, match=r"numpy.*_frombuffer"):
                cifar.read_pickle("b", content)
        elif protocol == 2:  # bytes are rebuilt by a codec
            with pytest.raises(UserError, match=r"names _codecs.encode"):
                cifar.read_pickle("b", content)
        else:
            assert np.array_equal(cifar.read_pickle("b", content)["data"], data)


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.target,)  # type: ignore[return-value]


def test_a_batch_that_holds_code_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    class System:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    evil = pickle.dumps({"data": System(), "labels": []}, protocol=2)
    pickle.loads(evil)
    assert (tmp_path / "owned").exists()  # it does run under the ordinary reader
    (tmp_path / "owned").unlink()
    archive = publish("cifar10", monkeypatch, tmp_path / "raw", data_batch_3=evil)
    with pytest.raises(
        UserError, match=r"cifar-10-batches-py/data_batch_3: it names posix.system, which is code .* refused"
    ):
        prepare("cifar10", tmp_path / "cifar10", SourceSettings(path=str(archive)))
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "cifar10" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["eval", "getattr", "object", "__import__"])
def test_not_even_builtins_are_admitted(name: str) -> None:
    with pytest.raises(UserError, match=f"names builtins.{name}"):
        cifar.read_pickle("b", f"cbuiltins\n{name}\n.".encode())


def test_an_altered_archive_is_refused_with_both_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = publish("cifar10", monkeypatch, tmp_path / "raw")
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(
        UserError, match=r"cifar-10-python.tar.gz: its md5 is \w{32}, but the publisher's .* get it again"
    ):
        prepare("cifar10", tmp_path / "cifar10", SourceSettings(path=str(archive)))


def test_a_truncated_archive_is_refused_even_where_its_checksum_is_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = publish("cifar10", monkeypatch, tmp_path / "raw")
    content = archive.read_bytes()[:-2000]
    archive.write_bytes(content)
    release = cifar.RELEASES["cifar10"]
    monkeypatch.setitem(cifar.RELEASES, "cifar10", release._replace(archive=release.archive._replace(md5=md5(content))))
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz: truncated or damaged archive"):
        prepare("cifar10", tmp_path / "cifar10", SourceSettings(path=str(archive)))


def test_an_altered_batch_of_an_unpacked_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish("cifar100", monkeypatch, tmp_path / "raw")
    unpack("cifar100", tmp_path / "tree" / "cifar-100-python")
    batch = tmp_path / "tree" / "cifar-100-python" / "test"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"cifar-100-python/test: its md5 is \w{32} instead of the published \w{32}"):
        prepare("cifar100", tmp_path / "cifar100", SourceSettings(path=str(tmp_path / "tree")))
    batch.unlink()
    with pytest.raises(UserError, match=r"tree: has neither cifar-100-python.tar.gz nor cifar-100-python/test;"):
        prepare("cifar100", tmp_path / "cifar100", SourceSettings(path=str(tmp_path / "tree")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (python2_pickle({b"data": np.zeros((4, 3072), np.uint8)}), "'data' and 'labels' are not images"),
        (python2_pickle({b"data": np.zeros((4, 3071), np.uint8), b"labels": [0] * 4}), "'data' and 'labels' are not"),
        (python2_pickle({b"data": np.zeros((4, 3072)), b"labels": [0] * 4}), "'data' and 'labels' are not images"),
        (python2_pickle({b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 2, 10]}), "'data' and 'labels' are"),
        (python2_pickle({b"data": np.zeros((5, 3072), np.uint8), b"labels": [0] * 5}), "21 train images instead of 20"),
        (python2_pickle([1, 2]), "not a batch but a list"),
        (b"\x80\x02}q\x00(U\x04da", "not a readable batch"),
        (b"", "has no cifar-10-batches-py/data_batch_1"),
    ],
)
def test_a_batch_that_is_not_images_and_labels_is_refused(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = publish("cifar10", monkeypatch, tmp_path / "raw", data_batch_1=content)
    with pytest.raises(UserError, match=message):
        prepare("cifar10", tmp_path / "cifar10", SourceSettings(path=str(archive)))


def test_class_names_that_are_not_ten_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = python2_pickle({b"label_names": [b"a", b"b"]})
    archive = publish("cifar10", monkeypatch, tmp_path / "raw", **{"batches.meta": meta})
    with pytest.raises(UserError, match=r"'label_names' does not list 10 classes"):
        prepare("cifar10", tmp_path / "cifar10", SourceSettings(path=str(archive)))


def test_a_member_that_points_outside_the_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = publish("cifar10", monkeypatch, tmp_path / "raw", **{"../../escaped": b"x"})
    with pytest.raises(UserError, match=r"member 'cifar-10-batches-py/../../escaped' points outside its folder"):
        prepare("cifar10", tmp_path / "cifar10", SourceSettings(path=str(archive)))
    assert not list(tmp_path.rglob("escaped"))


def test_without_a_path_and_with_downloads_off_it_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"sources.cifar10.path is not set; set it to cifar-10-python.tar.gz, or to a folder"
    ):
        prepare("cifar10", tmp_path / "cifar10", SourceSettings(download=False))


def test_a_download_that_fails_says_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = cifar.RELEASES["cifar10"]
    nowhere = release.archive._replace(url="http://127.0.0.1:1/cifar-10-python.tar.gz")
    monkeypatch.setitem(cifar.RELEASES, "cifar10", release._replace(archive=nowhere))
    monkeypatch.setattr(fetch, "RETRY_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"put cifar-10-python.tar.gz in a folder"):
        prepare("cifar10", tmp_path / "cifar10", SourceSettings())
