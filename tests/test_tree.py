"""The tree of docs/layout.md is true: what it lists is there, and every room is in it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/layout.md"
# Known by their names, everywhere.
EVERYWHERE = {
    "README.md",
    "LICENSE",
    "CITATION.cff",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "CODE_OF_CONDUCT.md",
    "SECURITY.md",
}


def listed() -> dict[str, str]:
    """Path -> what the page says of it, from the fenced block under the heading that has `tree` or `layout` in it.

    A line is `name  half a line about it`, deeper ones indented or drawn with tree lines; several names share a line
    when commas separate them.
    """
    text = PAGE.read_text()
    found = re.search(r"^#+ [^\n]*\b(?:tree|layout|repository)\b.*?^```\w*\n(.*?)^```", text, re.I | re.M | re.S)
    assert found, f"{PAGE} has no tree of the repository"
    paths: dict[str, str] = {}
    above: list[tuple[int, str]] = []  # (indent, folder)
    for line in found.group(1).splitlines():
        indent = len(line) - len(line.lstrip(" │├└─|`-\t"))
        names, _, words = line[indent:].partition("  ")
        if not names.strip():
            continue
        above = [(depth, folder) for depth, folder in above if depth < indent]
        for name in re.split(r",\s*", names.strip()):
            path = "".join(folder for _, folder in above) + name
            if path not in ("./", "."):
                paths[path] = words.strip()
        if names.strip().endswith("/") and names.strip() != "./":
            above.append((indent, names.strip()))
    assert paths
    return paths


def tracked() -> list[str]:
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a clone")
    return run.stdout.splitlines()


def test_all_that_the_tree_lists_is_there() -> None:
    for path in listed():
        assert list(ROOT.glob(path.rstrip("/"))) or path.startswith("results"), path
        if path.endswith("/") and (ROOT / path).exists():
            assert (ROOT / path).is_dir(), path


def test_every_top_level_room_and_every_folder_of_the_package_is_in_the_tree() -> None:
    paths = {path.rstrip("/") for path in listed()}
    files = tracked()
    rooms = {file.split("/")[0] for file in files if not file.startswith(".")} - EVERYWHERE
    packages = {str(Path(file).parent) for file in files if re.fullmatch(r"aps/\w+/\w+\.py", file)}
    missing = {room for room in rooms | packages if room not in paths}
    assert not missing, f"docs/layout.md lacks {', '.join(sorted(missing))}"


def test_every_room_has_half_a_line_about_it() -> None:
    paths = listed()
    above = {str(parent) for path in paths for parent in Path(path).parents}  # its own rooms say it
    silent = [path for path, words in paths.items() if not words and path.rstrip("/") not in above]
    assert not silent, f"docs/layout.md says nothing about {', '.join(silent)}"


def test_docs_and_configs_link_to_files_that_exist() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("config/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not re.match(r"\w+:", target):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_every_file_that_a_text_names_by_its_path_is_there() -> None:
    """Code in pages and docstrings too, but for files that a page has its reader write (`title=`)."""
    path = re.compile(r"(?<![\w./{}-])(?:aps|tests|benchmarks|docs|workflow)/[a-z\d_/]+\.(?:py|smk|md|yaml|j2|rst)\b")
    texts = {name: ROOT / name for name in tracked() if not name.startswith("tests/")}
    for name, file in texts.items():
        if file.suffix not in (".py", ".md", ".smk", ".yaml", ".yml", ".toml", ".def", ""):
            continue
        if not file.is_file() or file.name == "CHANGELOG.md":  # it names what was there once
            continue
        text = file.read_text()
        written = set(re.findall(r'title="([^"]+)"', text))
        gone = {found for found in path.findall(text) if not (ROOT / found).exists()} - written
        assert not gone, f"{name} names {', '.join(sorted(gone))}"
