"""Adds to the site of docs/ the pages that are made from code or lie elsewhere in the repository, and links to both.

Design: the pages in docs/ are also read on a code host, so their links are paths in the repository
(`../config/README.md`). In the site, such a link leads to the page that is made from the file, or to a copy of the
file.
"""

from __future__ import annotations

import argparse
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Page of the site -> the file in the repository from which it is made.
PAGES = {
    "settings.md": "config/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def command_line() -> str:
    """Every verb's help, as a page."""
    os.environ["COLUMNS"] = "88"
    os.environ["NO_COLOR"] = "1"
    from aps.cli import parser

    top = parser()
    text = ["# Command line", "Each verb's help, as the program prints it.", f"```text\n{top.format_help()}```"]
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                text += [f"## {name}", f"```text\n{verb.format_help()}```"]
    return "\n\n".join(text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "cli.md", content=command_line()))
    for page in list(files.documentation_pages()):
        for _, _, target in LINK.findall(page.content_string):
            file = linked(page.src_uri, target)
            if file and file.is_file() and file.suffix != ".md" and not files.get_file_from_path(site_path(file)):
                files.append(File.generated(config, site_path(file), abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        file = linked(page.file.src_uri, target)
        if file is None or not file.exists():
            return match[0]  # MkDocs reports it
        if file.is_dir():
            return words
        anchor = target.partition("#")[2]
        return f"{picture}[{words}]({posixpath.relpath(site_path(file), here or '.')}{'#' + anchor if anchor else ''})"

    return LINK.sub(link, markdown)


def linked(page: str, target: str) -> Path | None:
    """The file in the repository to which a page's link leads; None if it leads elsewhere or within the page."""
    path = target.partition("#")[0]
    if not path or re.match(r"\w+:", path):
        return None
    source = PAGES.get(page, f"docs/{page}")
    return Path(os.path.normpath(ROOT / posixpath.dirname(source) / path))


def site_path(file: Path) -> str:
    """The path in the site of a file in the repository."""
    path = file.relative_to(ROOT).as_posix()
    pages: dict[str, Any] = {source: page for page, source in PAGES.items()}
    return pages.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}")
