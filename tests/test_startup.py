"""Help and planning import nothing heavy. Asserted on modules, not on time: docs/performance.md has the times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "torchvision", "timm", "mlflow", "sklearn", "matplotlib", "pandas", "snakemake", "PIL"}


def imported(code: str) -> set[str]:
    """Top-level modules of a fresh interpreter after `code`."""
    end = "\nimport json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + end], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import contextlib, io
from aps.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main({arguments})
"""
    assert not imported(code) & {*HEAVY, "pydantic", "yaml"}  # settings take longer than all of help


@pytest.mark.parametrize(
    "module", ["aps.settings", "aps.workflow.plan", "aps.runtime.launch", "aps.estimate", "aps.results"]
)
def test_what_planning_reads_imports_nothing_heavy(module: str) -> None:
    assert not imported(f"import {module}") & (HEAVY - {"snakemake"})


def test_validating_a_study_imports_nothing_heavy() -> None:
    code = "from aps.settings.reading import load_study; load_study(['config/config.yaml']).jobs()"
    assert not imported(code) & HEAVY


def test_a_heavy_import_would_be_seen() -> None:
    assert "torch" in imported("import aps.sampling")


# --------------------------------------------------------------------------------------------------
# Completion. The shell sets these variables, and reads file 8.

RUN = "import sys; from aps.__main__ import run; sys.argv[0] = 'aps'; run()"
LOOK = """
import os
leave = os._exit
def ended(status):
    print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)
    leave(status)
os._exit = ended
"""
STUDY = """
study: mine
include: [other.yaml]
defaults: {dataset: digits}
experiments: {plain: {}, wide: {}}
"""


def completed(line: str, folder: Path) -> tuple[list[str], set[str]]:
    """What `aps` offers for a line, and the top-level modules that it imported for that."""
    variables = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n",
                 "_ARGCOMPLETE_SHELL": "bash", "PYTHONPATH": str(ROOT)}  # fmt: skip
    command = ["bash", "-c", 'exec "$@" 8> offered', "bash", sys.executable, "-c", f"import sys{LOOK}\n{RUN}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0 and not done.stdout, done.stderr
    return [word.strip() for word in (folder / "offered").read_text().split("\n")], set(done.stderr.split())


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text(STUDY)
    (tmp_path / "config/other.yaml").write_text("experiments: {included: {}}")
    (tmp_path / "broken.yaml").write_text("experiments: [")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("aps pret", ["pretrain"]),
        ("aps linear_probe --exp", ["--experiment"]),
        ("aps show-views --exp", ["--experiment"]),
    ],
)
def test_verbs_and_options_are_completed_and_nothing_heavy_is_imported(
    line: str, offered: list[str], study: Path
) -> None:
    words, modules = completed(line, study)
    assert words == offered and "argcomplete" in modules
    assert not modules & {*HEAVY, "pydantic", "yaml"}


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("aps pretrain --experiment ", {"plain", "wide", "included"}),
        ("aps show-views --experiment w", {"wide"}),
        ("aps knn --configfile config/other.yaml --experiment ", {"included"}),
        ("aps knn --configfile broken.yaml --experiment ", {""}),
        ("aps knn --configfile no_such.yaml --experiment ", {""}),
    ],
)
def test_experiments_of_the_study_are_completed_and_nothing_heavy_is_imported(
    line: str, offered: set[str], study: Path
) -> None:
    words, modules = completed(line, study)
    assert set(words) == offered and "argcomplete" in modules
    assert not modules & {*HEAVY, "pydantic"}


def test_bash_completes_aps_as_the_page_says(study: Path) -> None:
    (study / "aps").write_text(f"#!{sys.executable}\n{RUN}\n")
    (study / "aps").chmod(0o755)
    (line,) = [
        line for line in (ROOT / "docs/layout.md").read_text().splitlines() if "register-python-argcomplete aps" in line
    ]
    script = f"""
{line}
COMP_LINE="aps knn --experiment pl" COMP_POINT=23 COMP_TYPE=9 COMP_WORDS=(aps knn --experiment pl) COMP_CWORD=3
$(complete -p aps | sed 's/.*-F \\([^ ]*\\).*/\\1/') aps pl --experiment
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    path = os.pathsep.join([str(study), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", script], cwd=study, capture_output=True, text=True,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.split() == ["plain"], done.stderr


def test_argcomplete_is_imported_for_completion_alone() -> None:
    assert "argcomplete" not in imported("from aps.cli import parser; parser()")
