"""Each point once, one run a job: whatever is killed, deleted, swallowed or answered."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow_stores import about, assert_once, bad_server, hang, journal, points, runs, sender, status

from aps.tracking import sending
from aps.tracking.describing import KEY
from aps.tracking.reasons import why, will_last
from aps.tracking.sending import Tail
from aps.tracking.server import Server
from aps.tracking.state import State, read_state


class Killed(BaseException):
    """As if the process ended there: nothing of ours catches it."""


CHANGES = ("create_experiment", "create_run", "log_batch", "log_inputs", "update_run", "set_terminated", "delete_run")


def kill_at(call: int, before: bool, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Every client dies at its `call`th change, before MLflow hears of it or after it was done -> changes seen so far."""
    seen = [0]
    original = Server.__init__

    def init(self: Server, *arguments: Any) -> None:
        original(self, *arguments)
        for name in CHANGES:
            setattr(self.client, name, dying(getattr(self.client, name)))

    def dying(method: Callable[..., Any]) -> Callable[..., Any]:
        def call_it(*arguments: Any, **named: Any) -> Any:
            seen[0] += 1
            if seen[0] == call and before:
                raise Killed
            answer = method(*arguments, **named)
            if seen[0] == call:
                raise Killed
            return answer

        return call_it

    monkeypatch.setattr(Server, "__init__", init)
    return lambda: seen[0]


@pytest.mark.parametrize("before", [True, False], ids=["before it is heard", "after it is done"])
def test_a_kill_at_any_request_leaves_one_run_and_each_point_once(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """A sender dies at the nth request; the next one knows nothing but the journal. So for every n there is."""
    monkeypatch.setattr(sending, "BATCH", 40)
    n = 0
    while True:
        n += 1
        folder, job = tmp_path / str(n), about(f"killed{n}")
        journal(folder, 30)  # two requests of points
        with monkeypatch.context() as patch:
            seen = kill_at(n, before, patch)
            with contextlib.suppress(Killed):
                sender(store, folder, job, {"pretrain/top1": 50.0}).send()
            requests = seen()
        if requests < n:
            break
        assert sender(store, folder, job, {"pretrain/top1": 50.0}).send()
        run = assert_once(store, job, 30)
        assert points(store, run.info.run_id, "pretrain/top1") == [(0, 50.0)]
        assert run.info.status == "FINISHED" and run.data.params["pretrain.epochs"] == "2"
    assert n > 6  # experiment, run, description, dataset, points twice, finals


def test_a_journal_cut_back_and_grown_again_is_sent_once_by_the_same_process_and_by_another(
    tmp_path: Path, store: str
) -> None:
    job = about()
    journal(tmp_path, 20)
    first = sender(store, tmp_path, job)
    first.send()
    (tmp_path / "history.jsonl").unlink()
    journal(tmp_path, 12)
    journal(tmp_path, 18, first=13, clock=1.8e9)  # another hour, other milliseconds a step
    first.send()
    assert_once(store, job, 30)
    (tmp_path / "history.jsonl").unlink()
    journal(tmp_path, 40, clock=1.9e9)
    assert sender(store, tmp_path, job, {}).send()
    assert_once(store, job, 40)


def test_what_somebody_between_swallowed_is_sent_again_at_the_end(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The middle one of three batches is answered and lost."""
    job, own = about(), sender(store, tmp_path, about())
    journal(tmp_path, 10)
    own.send()
    journal(tmp_path, 10, first=11)
    with monkeypatch.context() as swallowing:
        swallowing.setattr(own.server.client, "log_batch", lambda *_, **__: None)
        own.send()
    journal(tmp_path, 10, first=21)
    own.send()
    own.state.finals = {"pretrain/top1": 1.0}
    assert own.send()
    assert_once(store, job, 30)


def test_a_request_that_was_given_up_and_done_later_leaves_no_second_run(tmp_path: Path, store: str) -> None:
    job, own = about(), sender(store, tmp_path, about())
    journal(tmp_path, 5)
    own.send()
    experiment = own.state.experiment_id or ""
    own.server.client.create_run(experiment, tags=job.tags | {KEY: job.key}, run_name=job.name)
    own.state.finals = {}
    assert own.send()
    assert_once(store, job, 5)


def test_a_deleted_run_is_restored_and_a_deleted_experiment_too_with_a_sentence(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job, own = about(), sender(store, tmp_path, about())
    journal(tmp_path, 5)
    own.send()
    client = own.server.client
    client.delete_run(own.state.run_id)
    journal(tmp_path, 5, first=6)
    with pytest.raises(Exception, match="active"):  # it finds out
        own.send()
    own.send()  # and mends it
    assert "run 'aps/seed0/pretrain' had been deleted there; it is restored" in capsys.readouterr().err
    assert_once(store, job, 10)
    client.delete_experiment(own.state.experiment_id)
    other = about(seed=1)
    journal(tmp_path / "other", 5)
    assert sender(store, tmp_path / "other", other, {}).send()
    assert "experiment 'tiny' had been deleted there; it is restored" in capsys.readouterr().err
    assert_once(store, other, 5)
    assert_once(store, job, 10)


def test_a_run_that_is_gone_for_good_is_made_again_whole(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mlflow gc` ran, or the server has another database now."""
    job = about()
    journal(tmp_path, 5)
    assert sender(store, tmp_path, job, {}, run_id="0" * 32).send()
    assert "run 'aps/seed0/pretrain' is gone from there; it is made again" in capsys.readouterr().err
    assert_once(store, job, 5)


@pytest.mark.parametrize(
    "answer, reason",
    [
        (status(401, "<html>who?"), "401: it asks who you are; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (status(403, "no"), "403: it does not let you in"),
        (status(404, "<html>nothing"), "404: there is no MLflow at this address"),
        (status(500, "oh"), "the server has an error (500)"),
        (status(503, "oh"), "the server has an error (503)"),
        (status(200, "{}", "application/json"), "it answers, but not as MLflow does"),
        (status(200, "[]", "application/json"), "it answers, but not as MLflow does"),
        (status(200, "<html>Please log in</html>"), "it answers, but not as MLflow does"),
        (hang, "it does not answer (timed out)"),
    ],
    ids=["401", "403", "404", "500", "503", "{}", "[]", "a page", "hangs"],
)  # fmt: skip
def test_what_a_bad_server_answers_is_a_reason_and_spoils_nothing(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch, answer: Any, reason: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    job = about()
    journal(tmp_path, 5)
    with bad_server(answer) as (address, _):
        own = sender(address, tmp_path, job, {"pretrain/top1": 1.0})
        with pytest.raises(Exception) as error:
            own.send()
    assert why(error.value).startswith(reason) and not own.state.complete
    own.state.write(tmp_path / "tracking.json")
    state = read_state(tmp_path / "tracking.json")
    assert state is not None
    state.moved(store)  # as if the server were well again
    assert sender(store, tmp_path, job, state.finals, run_id=state.run_id).send()
    assert_once(store, job, 5)


@pytest.mark.parametrize(
    "address, reason",
    [
        ("http://no-such-host.invalid:5000", "its host name is unknown (DNS)"),
        ("http://127.0.0.1:9", "nothing listens there (connection refused)"),
        ("htp://server:5000", "MLflow has no scheme 'htp'; write http://HOST:PORT or sqlite:///FILE"),
        ("server:5000", "MLflow has no scheme 'server'; write http://server:5000"),
        ("sqlite:///:memory:", "a database in memory ends with the process; name a file"),
    ],
)
def test_an_address_that_leads_nowhere_is_a_reason_at_once(tmp_path: Path, address: str, reason: str) -> None:
    journal(tmp_path, 1)
    with pytest.raises(Exception) as error:
        sender(address, tmp_path, about()).send()
    assert why(error.value) == reason and will_last(error.value)


@pytest.mark.slow  # mlflow waits 20 s for another writer
def test_a_locked_store_says_so_and_is_none_the_worse(tmp_path: Path, store: str) -> None:
    journal(tmp_path, 1)
    other = sqlite3.connect(store.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Exception) as error:
        sender(store, tmp_path, about()).send()
    assert why(error.value) == "the database is locked by another program"
    other.execute("ROLLBACK")
    assert sender(store, tmp_path, about(), {}).send()


def test_a_file_that_is_no_database_says_so_without_a_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"not a database" * 999)
    journal(tmp_path, 1)
    with pytest.raises(Exception) as error:
        sender(f"sqlite:///{broken}", tmp_path, about()).send()
    assert why(error.value) == "the file is not a database" and capfd.readouterr().err == ""


def test_parameters_that_changed_meanwhile_do_not_keep_a_run_from_going_on(tmp_path: Path, store: str) -> None:
    """MLflow lets no parameter change; a newer version of the project may know more of them."""
    job = about()
    journal(tmp_path, 5)
    sender(store, tmp_path, job).send()
    newer = job.model_copy(update={"params": job.params | {"pretrain.epochs": "3", "pretrain.new": "1"}})
    assert sender(store, tmp_path, newer, {}).send()
    run = assert_once(store, job, 5)
    assert (run.data.params["pretrain.epochs"], run.data.params["pretrain.new"]) == ("2", "1")


def test_bad_lines_of_a_journal_are_passed_over_and_the_good_ones_sent(tmp_path: Path, store: str) -> None:
    (tmp_path / "history.jsonl").write_text('{"step": 1, "ti\n[1, 2]\n{"step": "x"}\n\x00\n{"time": 3.0, "loss": 1}\n')
    journal(tmp_path, 5)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 9, "time": 1.0, "loss": NaN, "word": "x", "list": [1], "yes": true}\n{"step": 10, "time"')
    assert sender(store, tmp_path, about(), {}).send()
    assert_once(store, about(), 5)


def test_a_tail_gives_each_line_once_and_all_of_them_again_when_the_file_is_another(tmp_path: Path) -> None:
    tail, file = Tail(tmp_path / "history.jsonl"), tmp_path / "history.jsonl"
    assert list(tail.lines()) == []
    file.write_text('{"step": 1}\n{"st')
    assert list(tail.lines()) == [{"step": 1}]
    with file.open("a") as more:
        more.write('ep": 2}\n')
    assert list(tail.lines()) == [{"step": 2}] and list(tail.lines()) == []
    (tmp_path / "new").write_text('{"step": 1}\n{"step": 3}\n{"step": 4}\n')
    (tmp_path / "new").replace(file)
    assert list(tail.lines()) == [{"step": 1}, {"step": 3}, {"step": 4}]


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "null", "", '{"address": 3}', '"x"', '{"address": "none", "about"', "\x00\x00", '{"uri": "old", "sent": 3}'],
)  # fmt: skip
def test_a_damaged_tracking_json_is_warned_about_and_costs_neither_the_run_nor_a_point(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tracking.json").write_text(text)
    assert read_state(tmp_path / "tracking.json") is None
    assert f"warning: {tmp_path}/tracking.json: damaged (" in capsys.readouterr().err


def test_a_state_comes_back_as_it_was_written(tmp_path: Path) -> None:
    state = State(
        address="none", about=about(), run_id="a", finals={"x": 1.0}, ended=3, status="FINISHED", complete=True
    )
    state.write(tmp_path / "tracking.json")
    assert read_state(tmp_path / "tracking.json") == state


def test_runs_of_other_jobs_of_the_same_name_are_left_alone(tmp_path: Path, store: str) -> None:
    """Two people run the same study on one server."""
    mine, theirs = about(), about(started="2026-11-25T13:00:00+00:00")
    for folder, job in (("mine", mine), ("theirs", theirs)):
        journal(tmp_path / folder, 3)
        assert sender(store, tmp_path / folder, job, {}).send()
    assert len(runs(store)) == 2 and mine.name == theirs.name
