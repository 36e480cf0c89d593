""".ci/run says the truth: played with a make and a Python that only print and exit, so that it takes a second."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FIRST = "FAILED tests/test_one.py::test_it_holds - assert 1 == 2"


class Checkout:
    """A folder with the real .ci/run, whose `make` and `.venv/bin/python` do what a test tells them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / ".ci").mkdir()
        shutil.copy(ROOT / ".ci/run", folder / ".ci/run")
        self.script("apt-get", "exit 0")
        self.script("dpkg", "exit 0")
        self.script("make", "echo '1 passed'")
        self.script("python", "echo '1 passed'", ".venv/bin")

    def script(self, name: str, text: str, where: str = "bin") -> None:
        file = self.folder / where / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)

    def run(self) -> tuple[int, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", ".ci/run"], cwd=self.folder, env=os.environ | {"PATH": path}, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_what_passes_passes_without_a_warning(checkout: Checkout) -> None:
    status, text = checkout.run()
    assert status == 0 and "warning" not in text


def test_a_retried_test_is_listed_at_the_end_with_its_first_failure(checkout: Checkout) -> None:
    checkout.script("make", f'test "$1" != test || {{ echo "{FIRST}"; exit 2; }}')
    status, text = checkout.run()
    assert status == 0
    assert text.splitlines()[-2:] == ["warning: 1 failed at first and had a second try; the first failures:", FIRST]


def test_a_test_that_fails_twice_fails_the_run_and_is_listed_too(checkout: Checkout) -> None:
    checkout.script("make", f'test "$1" != test-slow || {{ echo "{FIRST}"; exit 2; }}')
    checkout.script("python", "echo 'FAILED tests/test_one.py::test_it_holds - another reason'; exit 1", ".venv/bin")
    status, text = checkout.run()
    assert status == 1 and text.splitlines()[-1] == FIRST


@pytest.mark.parametrize("target", ["test", "test-slow"])
def test_tests_that_do_not_end_in_time_fail_the_run(checkout: Checkout, target: str) -> None:
    checkout.script("timeout", f'case "$*" in *"make {target}") exit 124;; esac')
    status, text = checkout.run()
    assert status == 1 and f"error: 'make {target}' did not end in" in text


@pytest.mark.parametrize(
    "end", ["!!! xdist.dsession.Interrupted: maximum crashed workers reached: 8 !!!", "INTERNALERROR> Traceback"]
)
def test_tests_that_are_broken_off_get_no_second_try(checkout: Checkout, end: str) -> None:
    """It would run what failed alone, and the rest would never have run."""
    checkout.script("make", f"echo '{FIRST}'; echo '{end}'; exit 2")
    status, text = checkout.run()
    assert status == 1 and "error: 'make test' was broken off" in text and "once more" not in text


def test_style_and_types_get_no_second_try(checkout: Checkout) -> None:
    checkout.script("make", "echo 'E501 Line too long'; exit 2")
    checkout.script("python", "echo tried again", ".venv/bin")
    status, text = checkout.run()
    assert status == 1 and "tried again" not in text


# --------------------------------------------------------------------------------------------------
# GitHub's files, which nothing here runs: at least they parse and name what is there.

GITHUB = ROOT / ".github"


def steps(workflow: str) -> list[dict[str, str]]:
    jobs = yaml.safe_load((GITHUB / "workflows" / workflow).read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", ["ci.yml", "weekly.yml"])
def test_the_workflows_run_what_everybody_runs(workflow: str) -> None:
    runs = [step["run"] for step in steps(workflow) if "run" in step]
    assert any(".ci/run" in run for run in runs)
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert all("@v" in use for use in used), "an action without its version"


def test_ci_runs_every_python_that_the_package_says_it_supports() -> None:
    matrix = yaml.safe_load((GITHUB / "workflows/ci.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]["python"]
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert matrix == ["3.11", "3.12", "3.13"]
    assert all(f'"Programming Language :: Python :: {version}"' in pyproject for version in matrix)


def test_every_yaml_file_for_hosting_parses() -> None:
    files = [*GITHUB.rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert len(files) >= 6
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text()), dict), file


def test_every_pre_commit_hook_is_a_command_of_the_environment() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text()
    for hook in hooks:
        command = hook["entry"].split()[0]
        assert command.startswith(".venv/bin/") and command.removeprefix(".venv").replace("/bin/", "$(BIN)/") in lint
