"""Sends one stage's journal to MLflow from a thread, for which training never waits.

If the server can't be reached, the thread tries again: every half minute, and at the end of the stage for a limited
time. What is missing then is sent by `python -m aps sync` or the next report.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from aps.tracking.addresses import OFF, settled
from aps.tracking.describing import About
from aps.tracking.reasons import why, will_last
from aps.tracking.sending import Sender
from aps.tracking.state import RUNNING, State, read_state
from aps.tracking.system import Sampler

SEND_SECONDS = 5.0  # between two readings of the journal
RETRY_SECONDS = 30.0  # after a failed request
FINISH_SECONDS = 30.0  # how long the end of a stage waits for the server
LAST_RETRY_SECONDS = 2.0  # after a failed request at the end of the stage


class Tracker:
    """One stage's run in MLflow.

    Args:
        address: address of the server or store, or OFF.
        folder: has history.jsonl and tracking.json, if the run was begun before.
        about: description of the run.
        replaced: tracking.json of the run whose results these will take the place of, if there are any.
    """

    def __init__(self, address: str, folder: Path, about: About, replaced: Path | None = None) -> None:
        self.state_file = folder / "tracking.json"
        address = settled(address)
        state = read_state(self.state_file)
        if state is None or state.about.key != about.key:
            state = State(address=address, about=about)
        if state.address != address:
            state.moved(address)
        state.about, state.status, state.ended, state.finals, state.complete = about, RUNNING, None, None, False
        before = read_state(replaced) if replaced is not None else None
        if before is not None and before.about.key != about.key:
            state.replaces = before.run_id
        self.state, self.reason = state, ""  # why the last request failed
        self._sender = Sender(state.model_copy(), folder)
        self._sampler = Sampler(folder)
        self._wake, self._end, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._cut = False
        self._lock = threading.Lock()  # protects `state`; never held during a request
        self._thread = threading.Thread(target=self._loop, daemon=True, name="mlflow")

    @property
    def run_id(self) -> str | None:
        return self.state.run_id

    @property
    def off(self) -> bool:
        return self.state.address == OFF

    def start(self) -> None:
        self.state.write(self.state_file)
        if not self.off:
            self._sampler.start()
            self._thread.start()

    def rewind(self, lines: int) -> None:
        """The journal was cut to `lines` lines, and has to be read again."""
        self._cut = True

    def finish(self, finals: dict[str, float], figures: list[Path]) -> bool:
        """Send final metrics, by MLflow's names, and pictures, in limited time. Returns whether MLflow has everything."""
        with self._lock:
            self.state.finals, self.state.ended = finals, int(time.time() * 1000)
            self.state.write(self.state_file)
            self._sender.files = figures
        if self.off:
            return True
        self._sampler.stop()
        self._wake.set()
        if not self._ended.wait(FINISH_SECONDS):
            self.reason = self.reason or "it does not answer (timed out)"
        return self.state.complete

    def stop(self, status: str | None = None) -> None:
        """End the thread. status: FAILED or KILLED if the run did not finish; it is sent if the server answers."""
        if self.off:
            return
        self._sampler.stop()
        if status is not None:
            with self._lock:
                self.state.status = status
        self._end.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5 if status else 1)

    def _loop(self) -> None:
        while not self._ended.is_set():
            stopping, finishing = self._end.is_set(), self.state.finals is not None
            try:
                complete, pause, lasting = self._send(), SEND_SECONDS, False
                self.reason = ""
            except Exception as error:  # anything that a server or a locked database may raise: training goes on
                self.reason = why(error)
                complete, lasting = False, will_last(error)
                pause = RETRY_SECONDS if self.state.finals is None else 0.0 if not finishing else LAST_RETRY_SECONDS
            if complete or stopping or (finishing and lasting):
                self._ended.set()
                return
            self._wake.wait(pause)
            self._wake.clear()

    def _send(self) -> bool:
        """Send what is new, and write the state. Returns whether the stage is finished and MLflow has everything."""
        sender = self._sender
        with self._lock:
            status = self.state.status
            sender.state.finals, sender.state.ended, sender.state.status = self.state.finals, self.state.ended, status
            if self._cut:
                self._cut = False
                sender.restart()
        try:
            return sender.send()
        finally:
            with self._lock:
                new = sender.state
                self.state.run_id, self.state.experiment_id = new.run_id, new.experiment_id
                self.state.complete = new.complete
                if status != RUNNING:
                    self.state.status = new.status
                if self.state_file.parent.exists():
                    self.state.write(self.state_file)


def say_missing(label: str, reason: str) -> None:
    """Print that MLflow lacks a part of the run; it is the last line of a stage."""
    print(f"{label}: MLflow did not take everything ({reason}); `python -m aps sync` sends it later", file=sys.stderr)
