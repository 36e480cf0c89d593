"""What other programs read of the project agrees with itself: versions, locked packages, the changelog, the citation."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import aps

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK: list[dict[str, Any]] = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
CHANGES = (ROOT / "CHANGELOG.md").read_text()
OPTIONAL_BY_COMMIT = "detectron2"  # and what it alone needs: in uv.lock, not in constraints.txt


def pins() -> set[tuple[str, str]]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    return {(canonicalize_name(r.name), str(r.specifier).removeprefix("==")) for r in requirements}


def locked() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for package in LOCK:
        found.setdefault(package["name"], set()).add(package["version"])
    return found


def reached(extras: set[str]) -> set[str]:
    """Packages of the lock that the project needs with these extras."""
    packages = {package["name"]: package for package in LOCK}
    project = packages[PROJECT["name"]]
    waiting = list(project["dependencies"]) + [
        need for extra in extras for need in project["optional-dependencies"][extra]
    ]
    names: set[str] = set()
    while waiting:
        need = waiting.pop()
        package = packages[need["name"]]
        wanted = package.get("dependencies", []) + [
            further for extra in need.get("extra", ()) for further in package["optional-dependencies"].get(extra, [])
        ]
        if need["name"] not in names or need.get("extra"):
            names.add(need["name"])
            waiting += [further for further in wanted if further["name"] not in names]
    return names - {PROJECT["name"]}


# --------------------------------------------------------------------------------------------------


def test_the_lock_and_the_constraints_hold_the_same_versions() -> None:
    versions = locked()
    for name, version in pins():
        assert version in versions[name], f"{name} {version} is not the lock's; run `make lock`"
    missing = reached({"test", "docs", "dev"}) - {name for name, _ in pins()}
    assert not missing, f"constraints.txt lacks {', '.join(sorted(missing))}; run `make lock`"


def test_the_lock_was_made_from_these_dependencies() -> None:
    def plain(requirement: Requirement, extra: str) -> tuple[str, frozenset[str], str, str]:
        specifier = requirement.url or ",".join(sorted(str(requirement.specifier).split(",")))
        return (
            canonicalize_name(requirement.name),
            frozenset(requirement.extras),
            re.sub(r".*\bgit.*", "git", specifier),
            extra,
        )

    wanted = {plain(Requirement(text), "") for text in PROJECT["dependencies"]}
    for extra, texts in PROJECT["optional-dependencies"].items():
        wanted |= {plain(Requirement(text), extra) for text in texts}
    (project,) = [package for package in LOCK if package["name"] == PROJECT["name"]]
    recorded = set()
    for need in project["metadata"]["requires-dist"]:
        extra = re.search(r"extra == '(\w+)'", need.get("marker", ""))
        specifier = "git" if "git" in need else ",".join(sorted(need.get("specifier", "").replace(" ", "").split(",")))
        recorded.add((need["name"], frozenset(need.get("extras", ())), specifier, extra[1] if extra else ""))
    assert recorded == wanted, "pyproject.toml has changed since; run `make lock`"


def test_versions_tested_are_within_the_bounds() -> None:
    versions = dict(pins())
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:  # extras of its own
            continue
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text


def test_one_version_is_named_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (newest,) = re.findall(r"^## \[(\d[^\]]*)\]", CHANGES, re.M)[:1]
    (locked,) = [package["version"] for package in LOCK if package["name"] == PROJECT["name"]]
    assert {aps.__version__, PROJECT["version"], citation["version"], newest, locked} == {PROJECT["version"]}
    assert re.search(rf"^## \[{re.escape(newest)}\] - {citation['date-released']}$", CHANGES, re.M)


def test_the_changelog_has_the_form_of_keep_a_changelog() -> None:
    titles = re.findall(r"^## (.*)$", CHANGES, re.M)
    assert titles[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", title) for title in titles[1:])
    assert set(re.findall(r"^### (.*)$", CHANGES, re.M)) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }


def test_no_file_but_the_lock_names_a_registrys_host() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone")
    hosts = re.compile(rb"\b(?:py" rb"pi\.org|python" rb"hosted\.org|registry\.npm" rb"js\.org|deb\.deb" rb"ian\.org)")
    for name in listed.stdout.split("\0"):
        file = ROOT / name
        if name and name != "uv.lock" and file.is_file():
            assert not hosts.search(file.read_bytes()), name
