"""What lies below a folder: images, what is passed over, what is wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aps.data.walk import Walk, counted, walk
from aps.errors import UserError


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def names(root: Path) -> list[str]:
    return [file.name for file in walk(root).files]


def test_images_are_found_at_any_depth_and_in_any_case_of_the_suffix(tmp_path: Path) -> None:
    put(tmp_path, "b.JPG", "a.jpeg", "c/d/e/f.TIFF", "c/x.Png", "c.d/y.webp")
    found = walk(tmp_path)
    assert [file.name for file in found.files] == ["a.jpeg", "b.JPG", "c/d/e/f.TIFF", "c/x.Png", "c.d/y.webp"]
    assert found.inside() == ["c", "c.d"] and found.inside("c") == ["d"] and found.inside("c/d/e") == []
    assert [file.name for file in found.below("c")] == ["c/d/e/f.TIFF", "c/x.Png"]
    assert found.files[0].size == 1 and found.files[0].mtime == (tmp_path / "a.jpeg").stat().st_mtime_ns


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".Trash", "$RECYCLE.BIN", "lost+found", ".git", "#recycle"]
)
def test_hidden_folders_are_passed_over_and_counted(tmp_path: Path, name: str) -> None:
    put(tmp_path, "a.png", f"{name}/a.png", f"{name}/cat/b.png")
    found = walk(tmp_path)
    assert [file.name for file in found.files] == ["a.png"] and found.folders == []
    assert counted(found.passed) == "1 hidden folder"


@pytest.mark.parametrize("name", [".DS_Store", "._a.png", ".hidden.jpg", "Thumbs.db", "desktop.ini"])
def test_hidden_files_and_resource_forks_are_passed_over_and_counted(tmp_path: Path, name: str) -> None:
    put(tmp_path, "a.png", name, f"deeper/{name}")
    found = walk(tmp_path)
    assert [file.name for file in found.files] == ["a.png"]
    assert counted(found.passed) == "2 hidden files"


def test_other_suffixes_are_counted_by_kind(tmp_path: Path) -> None:
    put(tmp_path, *(f"{i}.heic" for i in range(4)), *(f"c/{i}.NPY" for i in range(3)), "README", "c/notes.txt", "a.jpg")
    os.mkfifo(tmp_path / "c" / "pipe.jpg")
    assert counted(walk(tmp_path).passed) == "4 .heic, 3 .npy, 1 .txt, 1 pipe or device, 1 without suffix"


def test_links_are_followed_and_a_folder_may_be_linked_twice(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "1.png", "2.png")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree" / "one.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    assert names(tmp_path / "tree") == ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png", "one.png"]
    walk(tmp_path / "tree").check()


def test_dangling_links_are_all_in_one_sentence(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    for number in range(5):
        (tmp_path / f"{number}.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(
        UserError, match=r"holds a link that leads nowhere: 0.png, 1.png, 2.png and 2 more; rename, mend"
    ):
        walk(tmp_path).check()


def test_link_loops_are_named_and_end(tmp_path: Path) -> None:
    put(tmp_path, "a/b/c.png")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a" / "self")
    found = walk(tmp_path)
    assert [file.name for file in found.files] == ["a/b/c.png"]
    with pytest.raises(UserError, match=r"a link to a folder that holds it: a/b/up; a link that leads nowhere: a/self"):
        found.check()


def test_names_that_are_not_utf8_are_named_in_a_sentence_that_is(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    with pytest.raises(UserError, match=r"a name that is not UTF-8: caf\\xe9.png") as found:
        walk(tmp_path).check()
    str(found.value).encode("utf-8")


def test_the_same_name_in_two_unicode_forms_is_named(tmp_path: Path) -> None:
    put(tmp_path, "cafe\u0301.png", "caf\u00e9.png", "plain.png", "na\u00efve.png")
    with pytest.raises(UserError, match=r"a name that stands there in two Unicode forms: caf"):
        walk(tmp_path).check()
    put(tmp_path / "folders", "cafe\u0301/1.png", "caf\u00e9/1.png")
    assert walk(tmp_path / "folders").problems


def test_names_with_a_tab_or_line_break_are_named_on_one_line(tmp_path: Path) -> None:
    put(tmp_path, "a\tb.png", "c\nd.png")
    with pytest.raises(UserError, match=r"a name with a tab or line break: a\\tb.png, c\\nd.png"):
        walk(tmp_path).check()


def test_folders_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    put(tmp_path, "open/a.png", "closed/b.png")
    (tmp_path / "closed").chmod(0)
    for parent in tmp_path.parents:  # pytest's own folders are closed to others
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    tmp_path.chmod(0o755)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # permissions don't bind root
    try:
        found = walk(tmp_path)
    finally:
        if root:
            os.seteuid(0)
        (tmp_path / "closed").chmod(0o755)
    assert [file.name for file in found.files] == ["open/a.png"]
    with pytest.raises(UserError, match=r"a folder that can't be opened: closed"):
        found.check()


def test_the_folders_of_all_classes_are_listed_in_one_pass() -> None:
    """One pass for each of 21,841 classes takes a minute."""

    class Folders(list[str]):
        passes = 0

        def __iter__(self) -> Iterator[str]:
            Folders.passes += 1
            return super().__iter__()

    tree = Walk(Path("mine"), folders=Folders(["a", "a/y", "a/x", "a/x/deep", "b", "c", "c/x", "ab/x"]))
    assert tree.folders_inside(["a", "b"]) == {"a": ["x", "y"], "b": []} == {n: tree.inside(n) for n in ("a", "b")}
    assert tree.folders_inside(["x"], "a") == {"x": ["deep"]}
    assert Folders.passes == 4
