"""Addresses: what wins, what they mean, and that nothing that is shown or stored carries a secret."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow_stores import about, assert_once, bad_server, journal, sender, status
from tiny_study import checkout, fake_job

from aps.errors import UserError
from aps.results import StageRun
from aps.settings.reading import load_study
from aps.tracking import tracker
from aps.tracking.addresses import full, scrubbed, settled, shown, tracking_address
from aps.workflow.plan import Plan

SECRET = "hunter2-secret"


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD", "TOKEN", "URI"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


def test_the_environment_wins_over_the_study_over_the_results_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain: dict[str, Any] = {"results": "out", "experiments": {"e": {"dataset": "digits"}}}
    study = load_study([], plain)
    assert tracking_address(study.tracking_uri, study.results) == f"sqlite:///{tmp_path}/out/mlflow.db"
    study = load_study([], plain | {"tracking_uri": "http://study"})
    assert tracking_address(study.tracking_uri, study.results) == "http://study"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking_address(study.tracking_uri, study.results) == "http://environment"


@pytest.mark.parametrize(
    "address, means",
    [
        ("none", "none"),
        ("NONE", "none"),
        ("http://host:5000/", "http://host:5000"),
        ("https://host/mlflow", "https://host/mlflow"),
        ("sqlite:///x.db", "sqlite:///{here}/x.db"),
        ("sqlite:///./sub/x.db", "sqlite:///{here}/sub/x.db"),
        ("sqlite:////abs/x.db", "sqlite:////abs/x.db"),
        ("./mlruns", "file://{here}/mlruns"),
        ("mlruns", "file://{here}/mlruns"),
        ("/abs/mlruns", "file:///abs/mlruns"),
        ("file:mlruns", "file://{here}/mlruns"),
        ("file:///abs/mlruns", "file:///abs/mlruns"),
        ("postgresql://db/mlflow", "postgresql://db/mlflow"),
        (f"http://me:{SECRET}@host:5000", "http://host:5000"),
        (f"https://{SECRET}@host/mlflow/", "https://host/mlflow"),
        (f"http://me:{SECRET}/with@odd@host:5000", "http://host:5000"),
        (f"http://host:5000/?token={SECRET}#x", "http://host:5000"),
        (f"postgresql+psycopg2://me:{SECRET}@db:5432/mlflow", "postgresql+psycopg2://db:5432/mlflow"),
        (f"mysql://db/mlflow?password={SECRET}", "mysql://db/mlflow"),
    ],
)
def test_an_address_is_shown_absolute_and_without_what_is_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, means: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert settled(address) == means.format(here=tmp_path) == settled(settled(address))
    assert SECRET not in shown(address)


@pytest.mark.parametrize("address", ["127.0.0.1:5000", "localhost:5000", "my_host:80/mlflow"])
def test_a_server_without_http_is_refused_rather_than_made_a_folder(address: str) -> None:
    with pytest.raises(UserError, match=f"^tracking_uri {address}: has no scheme, .* write http://{address}$"):
        settled(address)


def test_a_word_that_becomes_a_folder_is_told_once_and_not_where_the_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    for address in ("nonsense", "nonsense", "there", "./mlruns", "sub/mlruns", "http://host", "none"):
        settled(address)
    assert capsys.readouterr().err.splitlines() == [
        f"warning: tracking_uri (or MLFLOW_TRACKING_URI): nonsense is taken for a folder, {tmp_path}/nonsense, which is not "
        "there yet; a server is http://HOST:PORT"
    ]


def test_what_was_secret_is_where_mlflow_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    settled("http://me:p%40ss@host")
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", "p@ss")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    settled(f"http://{SECRET}@host")
    assert os.environ["MLFLOW_TRACKING_TOKEN"] == SECRET
    address = f"postgresql://me:{SECRET}@db/mlflow"
    assert full(settled(address)) == address and full("postgresql://other/mlflow") == "postgresql://other/mlflow"
    assert full("http://host") == "http://host"


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_API_KEY"])
def test_texts_lose_users_passwords_and_the_values_of_secret_variables(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, SECRET)
    assert scrubbed(f"GET http://a:b@host/x of {SECRET} said no") == "GET http://host/x of *** said no"
    assert scrubbed("https://host/a and me@example.org") == "https://host/a and me@example.org"


@pytest.mark.parametrize("kind", ["user and password", "token"])
def test_mlflow_says_who_it_is_and_a_stage_stores_and_prints_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    """A server that says 401 and, like some proxies, repeats what it was sent."""
    monkeypatch.setattr(tracker, "FINISH_SECONDS", 20)
    before = {"user and password": f"me:{SECRET}@", "token": f"{SECRET}@"}[kind]

    def repeating(handler: Any) -> None:
        status(401, f"<html>{handler.headers['Authorization']} {SECRET} http://me:{SECRET}@host/")(handler)

    with bad_server(repeating) as (address, asked):
        job = fake_job(tmp_path / "results", tracking=address.replace("://", f"://{before}"))
        with StageRun(job) as stage:
            stage.log(1, loss=1.0)
            stage.finish({"top1": 1.0})
    basic = base64.b64encode(f"me:{SECRET}".encode()).decode()
    assert {headers["Authorization"] for headers in asked} == {
        f"Basic {basic}" if kind == "user and password" else f"Bearer {SECRET}"
    }
    said = capfd.readouterr()
    assert "did not take everything (401" in said.err
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for text in (said.out.encode(), said.err.encode(), *files.values()):
        assert SECRET.encode() not in text and basic.encode() not in text
    assert json.loads((job.out / "tracking.json").read_text())["address"] == address


def test_a_relative_database_and_a_folder_of_files_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    journal(tmp_path / "run", 5)
    for address in ("sqlite:///own.db", "./mlruns"):
        assert sender(settled(address), tmp_path / "run", about(), {"pretrain/top1": 1.0}).send()
        assert_once(settled(address), about(), 5)
    assert (tmp_path / "own.db").exists() and (tmp_path / "mlruns").is_dir()


def test_command_lines_of_jobs_carry_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    plan = Plan.load(["study.yaml"], {"tracking_uri": f"http://me:{SECRET}@host"})
    for text in (plan.config_options, plan.options({}, {})):
        assert SECRET not in text and "http://host" in text
    plan.warn_of_environment()
    assert "holds a password or a token" in capsys.readouterr().err
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == SECRET  # for the jobs


@pytest.mark.slow
@pytest.mark.end_to_end
def test_a_password_in_a_study_is_nowhere_on_disk_but_in_the_study(tmp_path: Path) -> None:
    """Through Snakemake: its metadata, logs and command lines, the results, their table and the report."""
    study = {
        "study": "tiny",
        "tracking_uri": f"http://me:{SECRET}@127.0.0.1:9",
        "experiments": {"floor": {"dataset": {"name": "digits", "train_limit": 64}, "encoder": {"weights": "random",
                        "arch": "micro", "image_size": 16, "patch_size": 4, "dim": 24, "depth": 1, "heads": 3},
                        "knn": {"k": [1]}, "stages": ["knn"]}},
    }  # fmt: skip
    folder = checkout(tmp_path, study)
    said = ""
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    over = f"tracking_uri=http://you:{SECRET}@127.0.0.1:9"
    for command in (
        ["snakemake", "all", "--cores", "1", "--configfile", "study.yaml", "--printshellcmds", "--verbose"],
        ["snakemake", "report", "--cores", "1", "--configfile", "study.yaml", "--config", over, "--forcerun", "report",
         "--printshellcmds"],
        ["aps", "results", "--configfile", "study.yaml"],
        ["aps", "sync", "--configfile", "study.yaml"],
        ["aps", "ui", "--configfile", "study.yaml"],
    ):  # fmt: skip
        run = subprocess.run(
            [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, env=environment, timeout=300
        )
        said += run.stdout + run.stderr
    assert "did not take everything (nothing listens there" in said and "http://127.0.0.1:9" in said
    assert "warning: --config tracking_uri holds a password or a token, which Snakemake writes into its log" in said
    shown = [line for line in said.splitlines() if SECRET in line]
    assert all(line.strip().startswith("Command: ") and over in line for line in shown), shown  # Snakemake's own line
    snakemakes = folder / ".snakemake" / "log"
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "study.yaml" and not file.is_symlink() and snakemakes not in file.parents:
            assert SECRET.encode() not in file.read_bytes(), file
    assert SECRET in yaml.safe_load((folder / "study.yaml").read_text())["tracking_uri"]
