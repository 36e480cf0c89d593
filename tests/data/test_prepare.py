import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aps.data import arrays
from aps.data.load import load_split
from aps.data.manifest import Manifest
from aps.data.prepare import prepare
from aps.errors import UserError
from aps.settings.blocks import SourceSettings

HERE = SourceSettings()


@pytest.fixture()
def digits(tmp_path: Path) -> Path:
    prepare("digits", tmp_path / "digits", HERE)
    return tmp_path / "digits"


def test_an_unknown_dataset_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset 'cifar11' is unknown; known: cifar10, .*, imagenet1k"):
        prepare("cifar11", tmp_path, HERE)


def test_preparing_again_verifies_and_touches_nothing(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in digits.iterdir()}
    capsys.readouterr()
    prepare("digits", digits, HERE)
    assert "already prepared and verified: 1,438 train, 359 test images of 10 classes" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in digits.iterdir()} == before


def test_a_manifest_that_the_workflow_deleted_is_restored_without_preparing_again(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (digits / "manifest.json").read_bytes()
    (digits / "manifest.json").unlink()
    monkeypatch.setattr(arrays, "store", None)  # would fail if called
    prepare("digits", digits, HERE)
    assert (digits / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_file_is_noticed_and_prepared_again(
    digits: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = digits / "train.safetensors"
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(whole[:1000])
    prepare("digits", digits, HERE)
    assert (
        f"prepared before, but {file} {'is missing' if damage == 'missing' else 'has 1000 bytes'}"
        in capsys.readouterr().out
    )
    assert file.read_bytes() == whole


def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, left = tmp_path / "digits", [None]  # one file finds room

    def fsync(_: int) -> None:
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left.pop()

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(
        UserError, match=r"test\.safetensors: cannot be written \(No space left on device\); free space"
    ):
        prepare("digits", folder, HERE)
    assert sorted(file.name for file in folder.iterdir()) == ["train.safetensors"]
    assert load_file(folder / "train.safetensors")["labels"].shape == (1438,)
    monkeypatch.undo()
    assert prepare("digits", folder, HERE).splits["test"].count == 359


def test_a_disk_that_fills_within_a_file_is_one_sentence_and_leaves_no_part_of_it(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(
            UserError, match=r"train\.safetensors: cannot be written \(.*File too large.*\); free space"
        ):
            prepare("digits", tmp_path / "digits", HERE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "digits").iterdir()) == []


def test_a_folder_without_write_permission_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    folder.mkdir()
    folder.chmod(0o555)
    for parent in folder.parents:  # pytest's own folders are closed to others
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # permissions don't bind root
    try:
        with pytest.raises(UserError, match=r"train\.safetensors: cannot be written \(Permission denied\); free space"):
            prepare("digits", folder, HERE)
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EDQUOT])
def test_a_read_only_disk_and_a_spent_quota_are_one_sentence(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "disk/file")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(
        UserError, match=rf"train\.safetensors: cannot be written \({os.strerror(number)}\); free space"
    ):
        prepare("digits", tmp_path / "digits", HERE)


def test_a_bug_is_not_reported_as_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> None:
        raise OSError(errno.EINVAL, "wrong")

    monkeypatch.setattr(os, "fsync", wrong)
    with pytest.raises(OSError, match=r"wrong"):
        prepare("digits", tmp_path / "digits", HERE)


def test_digits_are_the_bundled_scans_split_by_class(digits: Path) -> None:
    manifest = Manifest.read(digits / "manifest.json")
    train, test = (load_split(digits / "manifest.json", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1438, 359)
    assert manifest.image_size == (8, 8) and manifest.classes == tuple("0123456789")
    assert train.images.shape == (1438, 3, 8, 8) and train.images.dtype == torch.uint8
    # scikit-learn documents 1,797 scans; each class keeps its share in test within one image
    whole = train.labels.bincount() + test.labels.bincount()
    assert whole.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert ((test.labels.bincount() - whole * 359 / 1797).abs() <= 1).all()
    both = torch.cat([train.images, test.images])[:, 0]
    assert both.max() == 255 and len(both.unique()) == 17  # 17 levels of ink
    assert len({image.numpy().tobytes() for image in both}) >= 1790  # no image is in both splits


def test_the_digest_does_not_depend_on_the_folder(digits: Path, tmp_path: Path) -> None:
    other = prepare("digits", tmp_path / "elsewhere" / "digits", HERE)
    assert other == Manifest.read(digits / "manifest.json")


def test_a_moved_results_folder_still_loads(digits: Path) -> None:
    moved = digits.parent / "moved" / "digits"
    moved.parent.mkdir()
    digits.rename(moved)
    assert len(load_split(moved / "manifest.json", "train")) == 1438


def test_forced_it_prepares_again_and_leaves_nothing_of_before(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (digits / "manifest.json").read_bytes()
    (digits / "train.safetensors").write_bytes(b"x" * (digits / "train.safetensors").stat().st_size)
    (digits / "mine.txt").write_text("not ours")
    capsys.readouterr()
    prepare("digits", digits, HERE, force=True)
    said = capsys.readouterr().out
    assert "digits: prepared: 1,438 train" in said and "already" not in said
    assert (digits / "manifest.json").read_bytes() == before and len(
        load_split(digits / "manifest.json", "train")
    ) == 1438
    assert (digits / "mine.txt").read_text() == "not ours"


def test_a_file_of_the_right_size_with_other_contents_is_prepared_again(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((digits / "test.safetensors").read_bytes())
    whole = bytes(content)
    content[-1] ^= 1
    (digits / "test.safetensors").write_bytes(bytes(content))
    prepare("digits", digits, HERE)
    assert "test.safetensors was altered; preparing it again" in capsys.readouterr().out
    assert (digits / "test.safetensors").read_bytes() == whole


def test_a_broken_manifest_is_prepared_again(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (digits / "manifest.json").read_bytes()
    (digits / "manifest.json").write_bytes(whole[:50])
    prepare("digits", digits, HERE)
    assert "not a manifest of this version" in capsys.readouterr().out
    assert (digits / "manifest.json").read_bytes() == whole


def test_of_two_at_once_one_waits_and_finds_it_prepared(tmp_path: Path) -> None:
    """The first holds the folder while it works; the second starts meanwhile."""
    begun, go = tmp_path / "begun", tmp_path / "go"
    slow = f"""
import time
from pathlib import Path
from aps.data import arrays, digits
store = arrays.store
def waits(*args, **kwargs):
    Path({str(begun)!r}).touch()
    while not Path({str(go)!r}).exists():
        time.sleep(0.01)
    return store(*args, **kwargs)
arrays.store = waits
"""
    run = f"""
from pathlib import Path
from aps.data.prepare import prepare
from aps.settings.blocks import SourceSettings
prepare("digits", Path({str(tmp_path / "digits")!r}), SourceSettings())
"""
    first = subprocess.Popen([sys.executable, "-c", slow + run], stdout=subprocess.PIPE, text=True)
    while not begun.exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = subprocess.Popen([sys.executable, "-u", "-c", run], stdout=subprocess.PIPE, text=True)
    assert second.stdout is not None
    assert second.stdout.readline().startswith("digits: waiting for another process that prepares it")
    go.touch()
    assert "digits: prepared" in first.communicate()[0]
    assert "digits: already prepared and verified" in second.communicate()[0]
    assert first.returncode == second.returncode == 0
    assert not (tmp_path / "digits" / ".lock").exists()
