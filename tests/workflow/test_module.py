"""The workflow in other hands: a module of another workflow, deployed by snakedeploy, in any folder, in an environment of
its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from snakemake.common.configfile import load_configfile
from tiny_study import STUDY, checkout, put

from aps.cli import parser
from aps.errors import UserError
from aps.settings.reading import load_study, parse_overrides, read_value
from aps.workflow.plan import Plan, _as_in_a_file

ROOT = Path(__file__).parents[2]
SNAKEFILE = ROOT / "workflow/Snakefile"
SMALL = put(STUDY, ("experiments",), {"aps": {"stages": ["pretrain", "knn"]}})

pytestmark = pytest.mark.end_to_end

# The example of docs/workflow.md.
(OUTER,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/workflow.md").read_text(), re.DOTALL)
SHELL = """
rule shell:
    output: "shell.txt"
    shell: "trap -p TERM >{output}"
"""


def snakemake(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=1800,
    )  # fmt: skip


@pytest.fixture
def outer(tmp_path: Path) -> Path:
    """Another workflow, with a rule of its own on what ours makes."""
    (tmp_path / "workflow").mkdir()
    (tmp_path / "config").mkdir()
    (tmp_path / "workflow/Snakefile").write_text(OUTER.replace("/path/to/aps", str(ROOT)) + SHELL)
    (tmp_path / "config/config.yaml").write_text(yaml.safe_dump({"own": 1, "vision": SMALL | {"study": "mine"}}))
    return tmp_path


def test_another_workflow_uses_it_as_a_module_under_a_prefix(outer: Path) -> None:
    run = snakemake(outer, "--cores", "2", "table", "shell")
    assert run.returncode == 0, run.stdout
    assert len((outer / "table.csv").read_text().splitlines()) == 3  # a head and two runs
    metrics = json.loads((outer / "vision/results/mine/aps/seed0/knn/metrics.json").read_text())
    assert metrics["metrics"]
    assert (outer / "vision/results/mlflow.db").exists()
    assert not (outer / "results").exists()
    assert (outer / "shell.txt").read_text() == "", "our shell prefix reached another workflow's rule"
    again = snakemake(outer, "-n")
    assert "Nothing to be done" in again.stdout


def test_a_module_without_a_study_is_one_sentence(outer: Path) -> None:
    file = outer / "workflow/Snakefile"
    file.write_text(re.sub(r" *config: .*\n", "", file.read_text()))
    run = snakemake(outer, "-n")
    assert "module: no study; give it one by `config:`" in run.stdout and "Traceback" not in run.stdout


def test_a_wrong_setting_of_a_module_is_one_sentence(outer: Path) -> None:
    wrong = put(SMALL, ("defaults", "knn", "kk"), 3)
    (outer / "config/config.yaml").write_text(yaml.safe_dump({"vision": wrong}))
    run = snakemake(outer, "-n")
    assert "unknown key 'knn.kk'; did you mean 'knn.k'?" in run.stdout and "Traceback" not in run.stdout


def test_settings_that_snakemake_would_drop_are_one_sentence(outer: Path) -> None:
    run = snakemake(outer, "-n", "--config", "first=1", "--config", "second=1")
    assert run.returncode == 1 and "--config is given more than once" in run.stdout and "Traceback" not in run.stdout


def test_a_rule_takes_other_resources_and_the_users_weights_are_found_beside_the_prefix(outer: Path) -> None:
    study = put(SMALL, ("experiments", "mine"), {"stages": ["knn"], "encoder": {"weights": "mine.safetensors"}})
    (outer / "config/config.yaml").write_text(yaml.safe_dump({"vision": study}))
    (outer / "mine.safetensors").write_text("weights")
    with (outer / "workflow/Snakefile").open("a") as file:
        for rule in ("prepare_dataset", "knn_encoder", "report"):
            file.write(f"\nuse rule {rule} from vision as vision_{rule} with:\n    resources: mem_mb=1234\n")
    run = snakemake(outer, "vision_all", "-n", "-p", "--cores", "1")
    assert run.returncode == 0, run.stdout
    jobs = dict(re.findall(r"rule vision_(\w+):\n((?: .*\n)+)", run.stdout))
    for rule in ("prepare_dataset", "knn_encoder", "report"):
        assert "mem_mb=1234" in jobs[rule] and "attempt=1" in jobs[rule], jobs[rule]
    assert f", {outer}/mine.safetensors\n" in run.stdout


@pytest.mark.parametrize(
    "text", ["1e-3", "1E3", "1.e3", "1.5e3", ".5e3", ".5e-3", "-1e3", "010.5", "mnist", "1e3x", "e3", "."]
)
def test_a_number_of_a_module_is_the_number_of_a_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"lr: {text}\n")
    read = _as_in_a_file(load_configfile(str(tmp_path / "config.yaml")))["lr"]
    assert read == read_value(text, "here") and type(read) is type(read_value(text, "here"))


def test_a_study_may_be_made_in_python() -> None:
    made = OrderedDict(
        results=Path("out"),
        defaults={"dataset": "digits", "pretrain": {"lr": 1e-3, "betas": (0.9, 0.99)}},
        experiments={"e": None},
        sources={"digits": {"path": Path("/data")}},
    )
    study = load_study([], _as_in_a_file(made))
    assert (study.results, study.source("digits").path) == ("out", "/data")
    assert study.experiment("e").pretrain.betas == (0.9, 0.99)


def test_the_demo_is_the_same_study_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snakemake's own YAML takes 6e-3 for text."""
    monkeypatch.chdir(ROOT)
    paths = SimpleNamespace(replace_prefix=lambda path: f"vision/{path}")
    modifier = SimpleNamespace(is_main_snakefile=lambda: False, path_modifier=paths)
    settings = SimpleNamespace(deployment_method=frozenset())
    workflow = SimpleNamespace(
        modifier=modifier, deployment_settings=settings, is_main_process=False, global_resources={}
    )
    module = Plan.of(workflow, load_configfile("config/config.yaml"))
    demo = Plan.load(["config/config.yaml"], {}).study
    assert module.written == demo
    assert module.study == demo.model_copy(update={"results": "vision/results"})
    args = parser().parse_args(["check", *shlex.split(module.config_options)])
    assert load_study(args.configfile, parse_overrides(args.overrides)) == module.study, "a job reads another study"


def test_it_runs_in_any_working_directory(tmp_path: Path) -> None:
    """Without a study there, with the demo of the repository; with one, with that."""
    assert "pretrain_encoder" in snakemake(tmp_path, "-n", "--quiet", "rules", "--snakefile", str(SNAKEFILE)).stdout
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text(yaml.safe_dump(SMALL))
    run = snakemake(tmp_path, "results/tiny/aps/seed0/knn/metrics.json", "-n", "--snakefile", str(SNAKEFILE))
    assert run.returncode == 0 and "knn_encoder" in run.stdout, run.stdout


@pytest.mark.parametrize("snakefile", ["Snakefile", "workflow/Snakefile"])
def test_snakemakes_linter_has_no_remark(tmp_path: Path, snakefile: str) -> None:
    run = snakemake(tmp_path, "--lint", "--snakefile", str(ROOT / snakefile))
    assert run.returncode == 0 and "good condition" in run.stdout, run.stdout


def test_the_catalog_can_list_it() -> None:
    catalog = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())
    usage = catalog["usage"]
    assert usage["software-stack-deployment"] == {"conda": True, "apptainer": True} and usage["report"] is True
    for file in ("workflow/Snakefile", "config/config.yaml", "config/README.md", "config/schema.json", "LICENSE"):
        assert (ROOT / file).exists(), file


@pytest.mark.soak
@pytest.mark.slow
def test_snakedeploy_deploys_it(tmp_path: Path) -> None:
    """From a local clone, which snakedeploy writes into the Snakefile by a relative path: that line is put right."""
    clone, there = tmp_path / "aps", tmp_path / "mine"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(clone)], check=True)
    tool = Path(sys.executable).parent / "snakedeploy"
    if not tool.exists():
        pytest.skip("needs snakedeploy (the extra `test`)")
    subprocess.run(["git", "-C", str(clone), "tag", "v0"], check=True)
    subprocess.run([tool, "deploy-workflow", str(clone), str(there), "--tag", "v0"], check=True, capture_output=True)
    file = there / "workflow/Snakefile"
    text = file.read_text()
    assert 'configfile: "config/config.yaml"' in text and "use rule * from aps" in text
    file.write_text(text.replace('"workflow/Snakefile"', f'"{clone}/workflow/Snakefile"'))
    assert (there / "profiles/default/config.yaml").exists() and (there / "config/schema.json").exists()
    text = snakemake(there, "-n", "--quiet", "rules", "all").stdout
    assert re.search(r"^all +1$", text, re.MULTILINE), text
    (there / "config/config.yaml").write_text(yaml.safe_dump(SMALL))
    run = snakemake(there, "all", "--cores", "2")
    assert run.returncode == 0, run.stdout
    assert (there / "results/tiny/report/report.html").exists()


# --------------------------------------------------------------------------------------------------
# An environment for each job. Neither conda nor apptainer is needed: a stand-in takes apptainer's command line and runs
# the job with another Python of its own, so that a rule that named ours would be seen.

APPTAINER = """#!{python}
import os, pathlib, sys
words = sys.argv[1:]
if words[0] == "--version":
    print("apptainer version 1.4.0")
    raise SystemExit
assert words[0] == "exec", words
at = next(i for i, word in enumerate(words) if word.endswith(".sif"))
with open({log!r}, "a") as file:
    print(*words[: at + 1], file=file)
os.environ["PATH"] = {inside!r} + ":/usr/bin:/bin"
os.execvp(words[at + 1], words[at + 1 :])
"""


def put_apptainer(folder: Path) -> str:
    """Write the stand-in; returns the PATH on which it is. It lists what it is asked for in `asked`."""
    inside, outside = folder / "inside", folder / "bin"
    inside.mkdir()
    outside.mkdir()
    (inside / "python").write_text(f'#!/bin/sh\necho "the container\'s" >&2\nexec {sys.executable} "$@"\n')
    for name in ("singularity", "apptainer"):
        (outside / name).write_text(
            APPTAINER.format(python=sys.executable, log=str(folder / "asked"), inside=str(inside))
        )
    for file in (inside / "python", outside / "singularity", outside / "apptainer"):
        file.chmod(0o755)
    return f"{outside}:{os.environ['PATH']}"


@pytest.mark.soak
@pytest.mark.slow
def test_jobs_run_in_the_studys_container(tmp_path: Path) -> None:
    path = put_apptainer(tmp_path)
    (tmp_path / "mine.sif").write_text("")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SMALL | {"container": "mine.sif"}))
    run = snakemake(
        tmp_path, "knn", "--cores", "1", "--snakefile", str(SNAKEFILE), "--configfile", "study.yaml",
        "--sdm", "apptainer", "--apptainer-args", "--nv --bind /data",
        PATH=path,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 3 and all("--nv --bind /data" in line and line.endswith("mine.sif") for line in asked), asked
    assert "the container's" in (tmp_path / "results/tiny/logs/aps/seed0/knn.log").read_text()


def test_a_study_that_a_container_may_lack_is_told(tmp_path: Path) -> None:
    """Snakemake shows a container the working directory; a site may show it more."""
    path = put_apptainer(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SMALL))
    (tmp_path / "here/study.yaml").write_text(yaml.safe_dump(SMALL))
    for study, bound, told in (
        ("../study.yaml", "--nv", True),
        ("../study.yaml", f"--nv --bind {tmp_path}", False),
        ("study.yaml", "--nv", False),
    ):
        run = snakemake(
            tmp_path / "here", "knn", "-n", "--quiet", "all", "--snakefile", str(SNAKEFILE), "--configfile", study,
            "--sdm", "apptainer", f"--apptainer-args={bound}", PATH=path,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout
        sentence = f"warning: {tmp_path}/study.yaml lies outside the working directory"
        assert (sentence in run.stdout) == told, run.stdout
        assert not told or f"add --apptainer-args '--bind {tmp_path}'" in run.stdout


def test_an_environment_for_jobs_makes_no_result_old(tmp_path: Path) -> None:
    """Snakemake has recorded the first run's environment."""
    checkout(tmp_path)
    path = put_apptainer(tmp_path)
    (tmp_path / "aps.sif").write_text("")
    options = ("data", "--cores", "1", "--configfile", "study.yaml")
    run = snakemake(tmp_path, *options)
    assert run.returncode == 0, run.stdout
    run = snakemake(tmp_path, *options, "-n", "--sdm", "apptainer", PATH=path)
    assert "Nothing to be done" in run.stdout, run.stdout


def test_what_detection_needs_is_looked_for_where_jobs_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A container may have detectron2 where Snakemake runs without it, or lack it."""
    monkeypatch.setattr("aps.detection.find_spec", lambda name: None)
    study = put(STUDY, ("defaults", "detection", "engine"), "detectron2")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    jobs = [
        SimpleNamespace(rule=SimpleNamespace(name="detection_encoder"), wildcards=SimpleNamespace(experiment="aps"))
    ]
    for deployed, refused in ((set(), True), ({"CONDA"}, False), ({"APPTAINER"}, False)):
        settings = SimpleNamespace(
            deployment_method=[SimpleNamespace(name=name) for name in deployed], apptainer_args=""
        )
        workflow = SimpleNamespace(
            modifier=SimpleNamespace(is_main_snakefile=lambda: True), basedir=str(ROOT), global_resources={},
            config_settings=SimpleNamespace(configfiles=[tmp_path / "study.yaml"], config={}),
            deployment_settings=settings, is_main_process=False,
        )  # fmt: skip
        plan = Plan.of(workflow, {})
        with pytest.raises(UserError, match="detectron2 is not installed") if refused else nullcontext():
            plan.check_environment(jobs)
        plan.warn_of_environment()
        told = "is not installed; install it by" if refused else "the jobs' own environment needs detectron2 too"
        assert f"warning: detection.engine 'detectron2': {'detectron2 ' * refused}{told}" in capsys.readouterr().err


POST_DEPLOY = ROOT / "workflow/envs/aps.post-deploy.sh"


def deploy(folder: Path, active: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script as Snakemake does, on an environment in `folder` whose Python is a stand-in, while `active` is
    the folder of the Python that is found."""
    (folder / "env/bin").mkdir(parents=True, exist_ok=True)
    (folder / "env/bin/python").write_text('#!/bin/sh\necho "$@ ${PYTHONPATH:-}"\n')
    (folder / "env/bin/python").chmod(0o755)
    script = shutil.copy(POST_DEPLOY, folder / "env.post-deploy.sh")
    return subprocess.run(
        ["bash", script], env={"PATH": f"{active}:/usr/bin:/bin", **environment}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("executor", "image", "arguments", "setuid", "warned"),
    [
        ("slurm", "mine.sif", "", 0, True),
        ("local", "mine.sif", "", 0, False),
        ("slurm", "mine.sif", "--unsquash", 0, False),
        ("slurm", "mine.sif", "", 1, False),
        ("slurm", "folder", "", 0, False),
        ("slurm", "docker://mine", "", 0, False),
    ],
)
def test_an_image_that_slurms_signals_would_take_away_is_told(
    executor: str, image: str, arguments: str, setuid: int, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    apptainer = tmp_path / "apptainer"
    apptainer.write_text(f'#!/bin/sh\ntest "$*" = buildcfg && echo APPTAINER_SUID_INSTALL={setuid}\n')
    apptainer.chmod(0o755)
    (tmp_path / "mine.sif").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SMALL | {"container": image}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    plan = Plan.load(["study.yaml"], {})
    plan._apptainer_args = arguments
    plan.warn_of_image(SimpleNamespace(executor_plugin=SimpleNamespace(name=executor)))
    assert ("warning: mine.sif is one file" in capsys.readouterr().err) == warned


def test_the_conda_environment_is_python_alone_and_gets_the_tested_versions(tmp_path: Path) -> None:
    """conda itself is not run: the file and, with a stand-in for Python, the script that Snakemake runs in it."""
    environment = yaml.safe_load((ROOT / "workflow/envs/aps.yaml").read_text())
    assert environment["dependencies"] == ["python =3.11", "pip"]
    assert environment["channels"] == ["conda-forge"] and environment["variables"] == {"PYTHONNOUSERSITE": "1"}
    run = deploy(tmp_path, tmp_path / "env/bin", APS_SOURCE=str(ROOT), PYTHONPATH="/modules")
    assert run.stdout == f"-m pip install --no-cache-dir --constraint {ROOT}/constraints.txt --editable {ROOT} \n"


def test_new_versions_make_a_new_conda_environment() -> None:
    digest = hashlib.sha256((ROOT / "constraints.txt").read_bytes()).hexdigest()
    assert f"\n# constraints.txt {digest}\n" in POST_DEPLOY.read_text(), "run `make lock`"


@pytest.mark.parametrize(
    ("source", "active", "sentence"),
    [
        ("", "env", "'' has no pyproject.toml; set APS_SOURCE to a clone of the repository"),
        (str(ROOT), "other", "conda did not activate "),
    ],
)
def test_a_conda_environment_that_cannot_be_made_is_one_sentence(
    source: str, active: str, sentence: str, tmp_path: Path
) -> None:
    """Another Python that is found, because the activation failed, stays as it is."""
    (tmp_path / "other/bin").mkdir(parents=True)
    (tmp_path / "other/bin/python").symlink_to(sys.executable)
    run = deploy(tmp_path, tmp_path / active / "bin", APS_SOURCE=source)
    assert run.returncode == 1 and run.stderr.startswith(f"error: {sentence}") and run.stdout == ""
