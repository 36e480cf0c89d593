"""What MLflow missed comes later, once; the report is one run; a server that is away is waited for once."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow_stores import bad_server, hang, runs, status
from test_tracker import assert_whole, play
from tiny_study import fake_job

from aps import cli
from aps import results as results_module
from aps.errors import UserError
from aps.files import read_json
from aps.layout import stage_folder
from aps.results import StageJob, forget, restore_finished
from aps.seals import contents, read_metrics, seal
from aps.settings.reading import load_study
from aps.settings.study import Study
from aps.tracking import describing, server, tracker
from aps.tracking.describing import NOTE, PARENT
from aps.tracking.server import Server, prepare_store
from aps.tracking.state import read_state, results_name
from aps.tracking.syncing import log_report, sync
from aps.tracking.views import SHARED, View


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


def study_of(results: Path, seeds: int = 1, name: str = "tiny", address: str | None = None) -> Study:
    """Of fake jobs."""
    experiment = {
        "dataset": "digits", "seeds": list(range(seeds)), "stages": ["knn"], "knn": {"k": [5]}, "encoder": {"weights": "random"},
    }  # fmt: skip
    plain: dict[str, Any] = {"study": name, "results": str(results), "experiments": {"aps": experiment}}
    return load_study([], plain | ({"tracking_uri": address} if address else {}))


def missed(results: Path, seed: int = 0, **more: Any) -> StageJob:
    """A finished stage of which MLflow knows nothing."""
    job = fake_job(results, seed=seed, tracking="none", **more)
    play(job)
    return job


def test_what_a_dead_server_missed_comes_with_sync_and_only_once(
    results: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = fake_job(results, tracking="http://127.0.0.1:9")
    found = play(job)
    assert found["mlflow_complete"] is False and found["mlflow_run_id"] is None
    study = study_of(results)
    away = sync(study, "http://127.0.0.1:9")
    assert (away.sent, away.missing, away.reason) == (0, 1, "nothing listens there (connection refused)")
    for sent in (1, 0, 0):
        found = sync(study, store)
        assert (found.sent, found.missing) == (sent, 0)
    assert_whole(store, job)
    assert read_metrics(job.out / "metrics.json")["mlflow_complete"] is True
    assert len(runs(store)) == 1


def test_results_made_without_mlflow_or_for_another_server_can_be_sent_later(results: Path, store: str) -> None:
    job = missed(results)
    assert sync(study_of(results), store).sent == 1
    assert_whole(store, job)


@pytest.mark.parametrize("made", ["without MLflow", "with a dead server", "tracking.json gone"])
def test_a_run_that_is_sent_later_has_the_duration_that_it_had(
    made: str, results: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the time until it was sent."""
    job = fake_job(results, tracking="http://127.0.0.1:9" if "server" in made else "none")
    play(job)
    if "gone" in made:
        (job.out / "tracking.json").unlink()
    later = time.time() + 86400
    monkeypatch.setattr(time, "time", lambda: later)
    assert sync(study_of(results), store).sent == 1
    (run,) = runs(store)
    metrics = read_metrics(job.out / "metrics.json")
    for shown, told in ((run.info.start_time, metrics["started"]), (run.info.end_time, metrics["finished"])):
        assert abs(shown / 1000 - datetime.fromisoformat(told).timestamp()) < 60, (shown, told)


@pytest.mark.parametrize("text", ["[]", "{", '{"address": 1}', None], ids=["list", "truncated", "other types", "gone"])
def test_a_damaged_or_lost_tracking_json_leads_to_the_same_run(
    results: Path, store: str, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    job = fake_job(results, tracking=store)
    play(job)
    file = job.out / "tracking.json"
    file.unlink() if text is None else file.write_text(text)
    assert sync(study_of(results), store).sent == 1
    assert_whole(store, job)
    assert ("damaged" in capsys.readouterr().err) == (text is not None)
    assert sync(study_of(results), store).sent == 0


def test_a_moved_results_folder_keeps_its_runs_and_gets_no_others(tmp_path: Path, results: Path, store: str) -> None:
    play(fake_job(results, tracking=store))
    moved = results.rename(tmp_path / "moved")
    address = f"sqlite:///{moved / 'mlflow.db'}"
    assert sync(study_of(moved), address).sent == 1
    assert len(runs(address)) == 1 and sync(study_of(moved), address).sent == 0


def test_a_run_that_two_studies_share_is_a_run_of_each(results: Path, store: str) -> None:
    first, second = fake_job(results, tracking=store), fake_job(results, tracking=store, study="other")
    play(first)
    second = second.__class__(**{**second.__dict__, "out": stage_folder(results / "other", "aps", 0, "knn")})
    assert restore_finished(second)
    assert read_json(second.out / "metrics.json")["mlflow_run_id"] is None
    assert sync(study_of(results, name="other"), store).sent == 1
    assert len(runs(store)) == len(runs(store, "other")) == 1
    ours, theirs = (read_json(job.out / "metrics.json")["mlflow_run_id"] for job in (first, second))
    assert ours != theirs and restore_finished(second)
    assert read_json(second.out / "metrics.json")["mlflow_run_id"] == theirs


def shown(store: str) -> list[str]:
    """Ids of the runs in the view of kNN."""
    state = View("knn", ("knn/top1_k20",), (), ()).state()
    server = Server(store)
    found = server.client.search_runs([str(server.experiment("tiny"))], state["searchFilter"])
    return [run.info.run_id for run in found]


def test_a_view_shows_the_runs_whose_results_stand_and_each_seed_once(
    results: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that were repeated, or tried with other settings before, would be averaged with those that count."""
    seconds = iter(range(60))
    monkeypatch.setattr(results_module, "_now", lambda: f"2026-11-27T00:00:{next(seconds):02}+00:00")
    one, two = fake_job(results, k=5, tracking=store), fake_job(results, k=7, tracking=store)
    other_seed = play(fake_job(results, seed=1, tracking=store))["mlflow_run_id"]

    def assert_shown(job: StageJob) -> str:
        if not read_metrics(job.out / "metrics.json")["mlflow_complete"]:
            study = study_of(results)
            study.experiments["aps"] = study.experiments["aps"].model_copy(update={"knn": job.settings.knn})
            assert sync(study, store).sent == 1
        run = str(read_metrics(job.out / "metrics.json")["mlflow_run_id"])
        assert sorted(shown(store)) == sorted([run, other_seed])
        return run

    play(one)
    first = assert_shown(one)
    forget(one.checkpoints)  # as --again does
    play(one)
    again = assert_shown(one)
    play(two)
    of_two = assert_shown(two)
    assert len({first, again, of_two}) == 3
    for job in (one, two, one):  # settings go back and forth: saved runs take their places again
        assert restore_finished(job)
        assert assert_shown(job) == (again if job is one else of_two)
        assert restore_finished(job) and read_metrics(job.out / "metrics.json")["mlflow_complete"]
    tags = {run.info.run_id: run.data.tags for run in runs(store)}
    assert tags[of_two]["stage"] == "knn (superseded)" and tags[of_two]["superseded_by"] == again
    assert tags[first]["superseded_by"] == again and "superseded_by" not in tags[again]
    assert len(tags) == 4, "nothing is deleted"


def lose(store: str, run_id: str) -> None:
    """Delete a run for good, as a database that was brought back from an older copy lacks it."""
    client = Server(store).client
    client.delete_run(run_id)
    client._tracking_client.store._hard_delete_run(run_id)


@pytest.mark.parametrize("lost", ["database", "one run"])
def test_what_mlflow_has_lost_is_sent_again_whole_and_once(
    results: Path, store: str, empty_store: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    jobs = [fake_job(results, seed=seed, tracking=store) for seed in range(3)]
    ids = [play(job)["mlflow_run_id"] for job in jobs]
    if lost == "one run":
        lose(store, ids[1])
    else:
        store = f"sqlite:///{results / 'mlflow.db'}"
        with (
            contextlib.closing(sqlite3.connect(empty_store)) as new,
            contextlib.closing(sqlite3.connect(results / "mlflow.db")) as file,
        ):
            new.backup(file)
    for sent in (3 if lost == "database" else 1, 0):
        found = sync(study_of(results, 3), store)
        assert (found.sent, found.missing, found.deleted) == (sent, 0, [])
    for job in jobs:
        assert_whole(store, job)


def test_a_run_that_was_deleted_in_mlflow_stays_so_with_a_word_until_it_is_restored_there(
    results: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [play(fake_job(results, seed=seed, tracking=store))["mlflow_run_id"] for seed in range(3)]
    client, study = Server(store).client, study_of(results, 3)
    for run in ids[:2]:
        client.delete_run(run)
    for _ in range(2):
        assert sync(study, store).sent == 0
        assert capsys.readouterr().err == (
            f"MLflow at {store}: 2 runs of study 'tiny' had been deleted there and stay so (aps/seed0/knn, aps/seed1/knn); "
            "to have them back, restore them on its page (State: Deleted)\n"
        )
    assert [run.info.run_id for run in runs(store)] == ids[2:]
    for run in ids[:2]:
        client.restore_run(run)
    assert sync(study, store).sent == 0 and capsys.readouterr().err == "" and len(runs(store)) == 3


def test_a_deleted_experiment_is_restored_with_its_runs_and_a_renamed_one_keeps_them(
    results: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    play(fake_job(results, tracking=store))
    client = Server(store).client
    experiment = client.get_experiment_by_name("tiny").experiment_id
    client.delete_experiment(experiment)
    found = sync(study_of(results), store)
    assert (found.sent, found.deleted) == (0, []) and len(runs(store)) == 1
    assert capsys.readouterr().err == "MLflow: experiment 'tiny' had been deleted there; it is restored\n"
    client.rename_experiment(experiment, "old")
    assert sync(study_of(results), store).sent == 0 and client.get_experiment_by_name("tiny") is None


def test_a_study_that_mlflow_has_is_asked_for_by_the_page_and_not_by_the_run(
    results: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(5):
        play(fake_job(results, seed=seed, tracking=store), lines=1)
    asked: list[str] = []
    original = server.Server.__init__

    def counting(self: Server, *arguments: Any) -> None:
        original(self, *arguments)
        for name in [name for name in dir(self.client) if name.startswith(("get_", "search_", "log_", "set_"))]:
            method = getattr(self.client, name)
            setattr(self.client, name, lambda *a, _m=method, _n=name, **k: (asked.append(_n), _m(*a, **k))[1])

    monkeypatch.setattr(server.Server, "__init__", counting)
    monkeypatch.setattr(server, "PAGE", 2)
    assert sync(study_of(results, 5), store).sent == 0
    assert asked == ["get_experiment_by_name", "search_runs", "search_runs", "search_runs"]


def test_a_server_that_does_not_say_what_it_has_is_one_sentence_and_asked_once(
    tmp_path: Path, results: Path, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3):
        play(fake_job(results, seed=seed, tracking=store), lines=1)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with bad_server(status(401)) as (address, asked):
        for seed in range(3):
            file = results / "tiny" / "aps" / f"seed{seed}" / "knn" / "tracking.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"address": address}))
        study = study_of(results, 3, address=address).model_dump(
            mode="json", include={"study", "results", "tracking_uri"}
        )
        experiment = {"dataset": "digits", "seeds": [0, 1, 2], "stages": ["knn"], "knn": {"k": [5]},
                      "encoder": {"weights": "random"}}  # fmt: skip
        (tmp_path / "study.yaml").write_text(json.dumps(study | {"experiments": {"aps": experiment}}))
        assert cli.main(["sync", "--configfile", str(tmp_path / "study.yaml")]) == 2
    said = capsys.readouterr()
    reason = (
        "401: it asks who you are; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    )
    assert len(asked) == 1 and f"MLflow at {address} does not say which runs it has ({reason}); mend that" in said.err
    assert "0 runs brought up to date, 0 models logged, 0 could not be sent" in said.out


@pytest.mark.parametrize("verb", ["sync", "report"])
def test_the_first_failure_ends_the_waiting_for_a_server_that_hangs(
    tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for seed in range(4):
        missed(results, seed)
    with bad_server(hang) as (address, asked):
        study = study_of(results, 4, address=address).model_dump(
            mode="json", include={"study", "results", "tracking_uri"}
        )
        experiment = {"dataset": "digits", "seeds": [0, 1, 2, 3], "stages": ["knn"], "knn": {"k": [5]},
                      "encoder": {"weights": "random"}}  # fmt: skip
        (tmp_path / "study.yaml").write_text(json.dumps(study | {"experiments": {"aps": experiment}}))
        exit_code = cli.main([verb, "--configfile", str(tmp_path / "study.yaml")])
    said = capsys.readouterr()
    assert len(asked) == 1 and "did not take it: it does not answer (timed out)" in said.err
    if verb == "sync":
        assert exit_code == 2 and "0 runs brought up to date, 0 models logged, 4 could not be sent" in said.out
        assert (
            f"MLflow at {address} did not take 4 runs (it does not answer (timed out)); mend that and run" in said.err
        )
    else:
        assert exit_code == 0 and "report on " in said.out


def test_what_a_server_refuses_of_one_run_does_not_keep_it_from_the_others(
    results: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [missed(results, seed) for seed in range(3)]
    original = Server.run

    def refusing(self: Server, experiment: str, about: Any, known: str | None) -> Any:
        if "seed1" in about.name:
            raise RuntimeError("cannot be stored")
        return original(self, experiment, about, known)

    monkeypatch.setattr(Server, "run", refusing)
    found = sync(study_of(results, 3), store)
    assert (found.sent, found.missing, found.reason, found.away) == (2, 1, "cannot be stored", False)
    for job in (jobs[0], jobs[2]):
        assert_whole(store, job)


def test_a_damaged_result_is_left_to_the_report_and_the_others_are_sent(results: Path, store: str) -> None:
    jobs = [missed(results, seed) for seed in range(2)]
    (jobs[0].out / "metrics.json").write_text("{")
    assert sync(study_of(results, 2), store).sent == 1


def test_a_pretraining_that_mlflow_missed_is_linked_to_once_both_are_sent(results: Path, store: str) -> None:
    """The evaluation ran while nobody knew the pretraining's run."""
    pretrained = missed(results)
    job = missed(results, seed=1, encoder=as_pretraining(pretrained))
    assert sync(study_of(results, 2), store).sent == 2
    parent, child = (read_json(j.out / "metrics.json")["mlflow_run_id"] for j in (pretrained, job))
    assert Server(store).client.get_run(child).data.tags[PARENT] == parent


def as_pretraining(job: StageJob) -> Path:
    """Make a finished job one that other jobs may start from -> its encoder."""
    encoder = job.out / "encoder.safetensors"
    encoder.write_bytes(b"weights")
    made = read_json(job.out / "metrics.json")
    (job.out / "metrics.json").write_text(json.dumps(seal(made | {"files": contents(job.out)})))
    return encoder


def test_an_evaluation_that_reached_mlflow_before_its_pretraining_is_linked_to_it_once_that_is_sent(
    results: Path, store: str
) -> None:
    pretrained = missed(results)
    job = fake_job(results, seed=1, encoder=as_pretraining(pretrained), tracking=store)
    child = play(job)["mlflow_run_id"]
    client, study = Server(store).client, study_of(results, 2)
    assert PARENT not in client.get_run(child).data.tags
    client.set_tag(child, "mine", "kept")
    for sent in (2, 0):
        assert sync(study, store).sent == sent
    parent = read_json(pretrained.out / "metrics.json")["mlflow_run_id"]
    tags = client.get_run(child).data.tags
    assert parent and tags[PARENT] == tags["encoder_run_id"] == parent and f"runs/{parent}" in tags[NOTE]
    assert tags["mine"] == "kept"
    assert_whole(store, job)


def test_a_description_that_changed_is_sent_and_what_people_wrote_in_mlflow_stays(
    results: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = fake_job(results, tracking=store, description="")
    run = play(job)["mlflow_run_id"]
    client, study = Server(store).client, study_of(results)
    client.set_tag(run, NOTE, "by hand")
    made_by = client.get_run(run).data.tags["mlflow.user"]
    monkeypatch.setattr(describing.getpass, "getuser", lambda: "somebody-else")
    assert sync(study, store).sent == 0
    monkeypatch.setattr(describing, "parameters", lambda *_: {"knn.k": "[7]", "knn.new": "1"})  # as a later version may
    for sent in (1, 0):
        assert sync(study, store).sent == sent
    found = client.get_run(run).data
    assert (found.params["knn.k"], found.params["knn.new"]) == ("[5]", "1")
    assert found.tags[NOTE] == "by hand" and found.tags["mlflow.user"] == made_by
    study.experiments["aps"] = study.experiments["aps"].model_copy(update={"description": "what it is"})
    for sent in (1, 0):
        assert sync(study, store).sent == sent
    assert client.get_run(run).data.tags[NOTE] == "what it is"


def test_the_report_is_one_run_however_often_it_is_made_and_tells_the_page_what_to_open_with(
    tmp_path: Path, results: Path, store: str
) -> None:
    study = study_of(results)
    log_report(study, store, [])  # no runs yet: nothing happens
    assert runs(store) == []
    play(fake_job(results, tracking=store), lines=1)
    page = tmp_path / "report.html"
    for text in ("first", "second"):
        page.write_text(text)
        log_report(study, store, [page])
    (report,) = [run for run in runs(store) if run.data.tags["stage"] == "report"]
    assert (results / "mlartifacts" / "tiny" / report.info.run_id / "artifacts" / "report.html").read_text() == "second"
    tags = Server(store).client.get_experiment_by_name("tiny").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development" and f"{SHARED}aps-knn" in tags


def test_two_results_folders_of_one_study_are_told_apart_in_tables_reports_and_a_sentence(
    tmp_path: Path, results: Path, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two people, or one person on two clusters, run the same study on one server."""
    seconds = iter(range(60))
    monkeypatch.setattr(results_module, "_now", lambda: f"2026-11-27T00:00:{next(seconds):02}+00:00")
    folders = (results, tmp_path / "theirs" / "results")
    found: dict[Path, str] = {}
    for folder in folders:
        play(fake_job(folder, tracking=store), lines=1)
        page = folder / "report.html"
        page.write_text(str(folder))
        log_report(study_of(folder), store, [page])
        found[folder] = capsys.readouterr().err
    mine, theirs = (results_name(folder) for folder in folders)
    assert found[results] == "" and found[folders[1]] == (
        f"MLflow at {store}: study 'tiny' has runs of other results there too ({mine}), which its tables show apart; search "
        f"for tags.results_folder = '{theirs}' to see these alone\n"
    )
    client, experiment = Server(store).client, Server(store).experiment("tiny", make=False)
    for name, folder in ((mine, results), (theirs, folders[1])):
        by_stage = {
            run.data.tags["stage"]: run for run in client.search_runs([experiment], f"tags.results_folder = '{name}'")
        }
        assert by_stage.keys() == {"knn", "report"}
        report = results / "mlartifacts" / "tiny" / by_stage["report"].info.run_id / "artifacts" / "report.html"
        assert report.read_text() == str(folder)
    tags = client.get_experiment(experiment).tags
    assert [group["groupByData"] for group in json.loads(tags[f"{SHARED}aps-knn"])["groupBy"]["groupByKeys"]] == [
        "experiment", "results_folder",
    ]  # fmt: skip
    moved = results.rename(tmp_path / "moved")
    assert results_name(moved) == mine, "a folder that was moved is the same results"


def test_runs_of_an_earlier_version_get_the_name_of_their_results_folder_and_no_second_copy(
    tmp_path: Path, results: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = fake_job(results, tracking=store)
    run = play(job)["mlflow_run_id"]
    client, study = Server(store).client, study_of(results)
    page = tmp_path / "report.html"
    page.write_text("")
    log_report(study, store, [page])
    name = results_name(results)
    for made in runs(store):
        client.delete_tag(made.info.run_id, "results_folder")
    file = job.out / "tracking.json"
    state = read_json(file)
    del state["about"]["tags"]["results_folder"]
    file.write_text(json.dumps(state))
    for sent in (1, 0):
        assert sync(study, store).sent == sent
        log_report(study, store, [page])
    assert sorted(made.data.tags["stage"] for made in runs(store)) == ["knn", "report"]
    assert {made.data.tags["results_folder"] for made in runs(store)} == {name}
    assert client.get_run(run).data.tags["results_folder"] == name and capsys.readouterr().err == ""
    assert_whole(store, job)


@pytest.mark.parametrize("kept", ["as made", b"lab\n", b"\xff'\n", b"", "not"])
def test_the_name_of_a_results_folder_fits_a_search_wherever_it_lies_and_whatever_the_file_holds(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch, kept: str | bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "we ird 'q\""
    results = odd / "results"
    results.mkdir(parents=True)
    monkeypatch.chdir(odd)
    if kept == "not":
        (results / ".mlflow-name").mkdir()
    elif isinstance(kept, bytes):
        (results / ".mlflow-name").write_bytes(kept)
    play(fake_job(Path("results"), tracking=store), lines=1)
    for _ in range(2):
        log_report(study_of(Path("results")), store, [])
    name = results_name(results)
    assert [run.data.tags["results_folder"] for run in runs(store)] == [name, name] and capsys.readouterr().err == ""
    assert name == "lab" or kept != b"lab\n"


def test_a_report_that_a_server_does_not_take_is_one_sentence(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with bad_server(status(401)) as (address, _):
        log_report(study_of(results), address, [])
    assert f"MLflow at {address} did not take the report: 401: it asks who you are" in capsys.readouterr().err


def test_a_store_that_cannot_be_created_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"mlflow.db: MLflow's store cannot be created \(.*\); set tracking_uri or"):
        prepare_store(tmp_path / "file" / "mlflow.db")


def test_a_stage_that_never_reached_mlflow_finishes_within_its_patience(
    results: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "FINISH_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    with bad_server(hang) as (address, _):
        start = time.monotonic()
        found = play(fake_job(results, tracking=address))
        assert time.monotonic() - start < 20 and found["mlflow_complete"] is False
    state = read_state(results / "tiny" / "aps" / "seed0" / "knn" / "tracking.json")
    assert state is not None and state.finals and not state.complete
