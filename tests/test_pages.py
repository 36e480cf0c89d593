"""The pages: they build, link to what is there, load nothing from elsewhere, and every block of code on them is run.

A block says by its language what it is: `python`, `yaml` and `sh` are run; `text` is output, or a command for another
machine. Comments that a reader does not see tell what a block needs: `<!-- over config/cifar.yaml -->` lays a piece of YAML
over that study, `<!-- run by tests/test_extending.py -->` says which test runs it instead of these.

Commands are planned or parsed here; the slow test at the end gives them as a user would, page by page, in a checkout whose
studies are cut down to seconds.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from aps.cli import parser
from aps.layout import stage_folder, study_folder
from aps.settings.reading import load_study
from aps.workflow.plan import RULE_OF_TARGET, Plan

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), *map(ROOT.joinpath, ("README.md", "CONTRIBUTING.md", "config/README.md"))])
# What a shell block may hold besides our own commands, and why these are not run: they need another machine, a person, or
# change this one.
ELSEWHERE = {"ssh", "cd", "git", "cp", "tmux", "source", "pip", "mlflow", "docker", "apptainer", "#"}
TARGETS = {"all", "report", *RULE_OF_TARGET}
# What they do after installing; a server would stay, and the tests are these.
MADE = {"make demo": "snakemake all --cores 2", "make ui": "true", "make test": "true"}
WALKED = [
    "README.md",
    "tutorial.md",
    "own-images.md",
    "mlflow.md",
    "sweep.md",
    "ablation.md",
]  # given as they are printed


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    title: str
    over: str
    run_by: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in re.finditer(r"(?:<!-- ([^\n]+) -->\n\s*)?^```([^\n]*)\n(.*?)^```", text, re.M | re.S):
        word = match[1] or ""
        language, _, rest = match[2].partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        over, run_by = (
            word.removeprefix(f"{start} ") if word.startswith(start) else "" for start in ("over", "run by")
        )
        line = text[: match.start(2)].count("\n") + 1
        found.append(Block(page, line, language, title[1] if title else "", over, run_by, match[3]))
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def snakemake_arguments(words: list[str]) -> Any:
    """As snakemake's own parser reads them; a wrong option ends it with SystemExit."""
    from snakemake.cli import get_argument_parser

    return get_argument_parser().parse_args(words)


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages and not block.run_by]


def commands(block: Block) -> list[str]:
    """Lines of a shell block, continued ones joined, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if line]


def check_snakemake(words: list[str], where: str) -> None:
    """Snakemake reads the arguments, and the study is one; a target is a rule's name, or a file in the folder of a job or of
    the study's report."""
    arguments = snakemake_arguments(words)
    pairs = yaml.safe_load(f"{{{', '.join(pair.replace('=', ': ', 1) for pair in arguments.config or [])}}}")
    study = Plan.load(arguments.configfile or [], pairs).study
    folder = study_folder(study)
    made = {f"{stage_folder(folder, *job)}" for job in study.jobs()} | {f"{folder}/report"}
    for target in arguments.targets:
        assert target in TARGETS or str(Path(target).parent) in made, f"{where}: {target}"


# --------------------------------------------------------------------------------------------------
# What a block is.


def test_every_block_says_what_it_is() -> None:
    unknown = [
        f"{block}: {block.language!r}" for block in BLOCKS if block.language not in ("python", "yaml", "sh", "text")
    ]
    assert not unknown, f"not python, yaml, sh or text: {', '.join(unknown)}"


def test_a_block_that_another_test_runs_is_named_there() -> None:
    elsewhere = [block for block in BLOCKS if block.run_by]
    assert elsewhere
    for block in elsewhere:
        assert block.page.name in (ROOT / block.run_by).read_text(), f"{block} is not run by {block.run_by}"


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_a_block_of_python_is_on_a_page_that_is_walked(block: Block) -> None:
    compile(block.text, str(block), "exec")
    assert block.page.name in WALKED, f"{block}: add the page to WALKED, or say which test runs it"


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_a_block_of_yaml_is_a_valid_study_or_a_piece_of_one(block: Block, checkout: Path) -> None:
    content = yaml.safe_load(block.text)
    file = checkout / (block.title or "config/block.yaml")
    file.write_text(block.text)
    base = [checkout / block.over] if block.over else []
    if not base and "experiments" not in content:
        (checkout / "config/least.yaml").write_text("experiments: {one: {dataset: digits}}\n")
        base = [checkout / "config/least.yaml"]
    with contextlib.chdir(checkout):
        load_study([*base, file])


@pytest.mark.parametrize("block", of("sh"), ids=str)
def test_a_command_of_ours_is_one(block: Block, checkout: Path) -> None:
    for file in blocks(block.page):
        if file.title.endswith(".yaml"):
            (checkout / file.title).write_text(file.text)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands(block):
        words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        if words[0] == "make":
            assert words[1] in targets, command
        elif words[:3] == ["python", "-m", "aps"]:
            with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
                parser().parse_args(words[3:])
            assert not said.getvalue(), f"{block}: {said.getvalue()}"
        elif words[0] == "snakemake":
            with contextlib.chdir(checkout):
                check_snakemake(words[1:], f"{block}")
        else:
            assert words[0] in ELSEWHERE, f"{block}: {command}"


@pytest.mark.parametrize("file", sorted(ROOT.glob("config/*.yaml")), ids=lambda file: file.name)
def test_snakemake_takes_the_commands_in_the_head_of_a_study(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    head = "\n".join(line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#"))
    loops = re.findall(r"for (\w+) in (\S+)[^;]*; do", head)
    for command in re.findall(r"(?<![`\w])snakemake (.*)", head.replace("\\\n", "")):
        for name, value in loops:
            command = command.replace(f"${name}", value)
        check_snakemake(shlex.split(re.split(r"; done|, or ", command)[0]), file.name)


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in of("sh") if "snakemake" in block.text], ids=str)
def test_snakemake_plans_what_a_page_asks_for(block: Block, checkout: Path) -> None:
    for file in blocks(block.page):
        if file.title.endswith(".yaml"):
            (checkout / file.title).write_text(file.text)
    for command in commands(block):
        if "snakemake " in command and "pip" not in command:
            run = shell(f"{command} --dry-run --quiet all", checkout)
            assert run.returncode == 0, f"{block}: {command}\n{run.stdout}{run.stderr}"


# --------------------------------------------------------------------------------------------------
# The site.


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_the_site_builds_with_every_page_and_every_link_in_its_place(site: Path) -> None:
    """`--strict` fails on a page that is not in the navigation, on a link to nothing and on a missing heading."""
    for page in ROOT.glob("docs/*.md"):
        assert (site / f"{page.stem}.html").exists(), page
    for generated in ("settings", "cli", "benchmarks", "changelog", "contributing"):
        assert (site / f"{generated}.html").exists(), generated


def test_the_reference_is_made_from_code(site: Path) -> None:
    command_line = (site / "cli.html").read_text()
    assert all(f'id="{verb}"' in command_line for verb in ("pretrain", "knn", "show-views", "estimate"))
    assert "how sharply overlap is avoided" in (site / "settings.html").read_text()
    assert "aps.sampling.coverage" in (site / "api.html").read_text()


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        found = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert not [address for address in found if "canonical" not in address], (page, found)


def test_files_of_the_repository_that_pages_link_to_are_in_the_site(site: Path) -> None:
    assert (site / "repository/config/ablation.yaml").read_text() == (ROOT / "config/ablation.yaml").read_text()
    assert 'href="repository/config/ablation.yaml"' in (site / "ablation.html").read_text()


# --------------------------------------------------------------------------------------------------
# A checkout to give commands in.


def cut(tree: Any) -> Any:
    """A study of seconds: the same experiments, one seed, one epoch, few images."""
    small = {"epochs": 1, "warmup_epochs": 0, "knn_every": 0, "iterations": 2, "warmup_iterations": 1, "seeds": [0]}
    if isinstance(tree, list):
        return [cut(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {key: small.get(key, {"name": "digits", "train_limit": 256} if (key, value) == ("dataset", "digits") else cut(value))
            for key, value in tree.items()}  # fmt: skip


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as links, with studies of its own that a page may add to, and a folder of photographs."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("Snakefile", "workflow", "profiles", "slurm", "aps"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "config", folder / "config")
    demo = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    (folder / "config/config.yaml").write_text(yaml.safe_dump(cut(demo), sort_keys=False))
    shutil.copy(folder / "config/sites/example.yaml", folder / "config/sites/mine.yaml")
    generator = np.random.default_rng(0)
    for split, count in (("train", 160), ("test", 8)):
        for kind in ("cat", "dog"):
            (folder / "photos" / split / kind).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (40, 40, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / split / kind / f"{number}.png")
    return folder


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.end_to_end
def test_the_pages_can_be_followed_from_top_to_bottom(checkout: Path) -> None:
    """Every block in order, as printed; only the studies are cut. `make demo` is what it does after installing."""
    for name in WALKED:
        for block in blocks(ROOT / name if name == "README.md" else ROOT / "docs" / name):
            if block.language == "yaml" and block.title:
                (checkout / block.title).write_text(yaml.safe_dump(cut(yaml.safe_load(block.text)), sort_keys=False))
            elif block.language == "python":
                with contextlib.chdir(checkout):
                    exec(compile(block.text, str(block), "exec"), {})
            elif block.language == "sh":
                for command in commands(block):
                    command = MADE.get(command, command)
                    if command.split()[0] in ELSEWHERE:
                        continue
                    run = shell(command, checkout)
                    assert run.returncode == 0, f"{block}: {command}\n{run.stdout}{run.stderr}"
