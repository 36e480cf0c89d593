"""Sends one stage's journal to MLflow from a thread of its own, which training never waits for.

While the server is away the thread tries again now and then, at the end of the stage for a bounded time, and what is still
missing then is sent by `python -m aps sync` or the next report.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from aps.tracking.addresses import OFF, settled
from aps.tracking.describing import About
from aps.tracking.reasons import in_vain, why
from aps.tracking.sending import Sender
from aps.tracking.state import RUNNING, State, read_state
from aps.tracking.system import Sampler

SEND_SECONDS = 5.0  # between two looks at the journal
RETRY_SECONDS = 30.0  # after the server did not take it
FINISH_SECONDS = 30.0  # how long the end of a stage waits for the server
AGAIN_SECONDS = 2.0  # between two tries at the end


class Tracker:
    """One stage's run in MLflow.

    Args:
        address: of the server or store, or OFF.
        folder: where history.jsonl grows and tracking.json is kept; a folder that has a tracking.json goes on with its run.
        about: the run.
    """

    def __init__(self, address: str, folder: Path, about: About) -> None:
        self.state_file = folder / "tracking.json"
        address = settled(address)
        state = read_state(self.state_file)
        if state is None or state.about.key != about.key:
            state = State(address=address, about=about)
        if state.address != address:
            state.moved(address)
        state.about, state.status, state.ended, state.finals, state.complete = about, RUNNING, None, None, False
        self.state, self.reason = state, ""  # why MLflow lacks something, as far as is known
        self._sender = Sender(state.model_copy(), folder)
        self._sampler = Sampler(folder)
        self._wake, self._end, self._over = threading.Event(), threading.Event(), threading.Event()
        self._cut = False
        self._lock = threading.Lock()  # of `state`; never held while the server is talked to
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
        """The journal was cut to `lines` lines."""
        self._cut = True

    def finish(self, finals: dict[str, float], figures: list[Path]) -> bool:
        """Hand over the final figures by MLflow's names and wait a bounded time. Returns whether MLflow has everything."""
        with self._lock:
            self.state.finals, self.state.ended = finals, int(time.time() * 1000)
            self.state.write(self.state_file)
            self._sender.files = figures
        if self.off:
            return True
        self._sampler.stop()
        self._wake.set()
        if not self._over.wait(FINISH_SECONDS):
            self.reason = self.reason or "it does not answer (timed out)"
        return self.state.complete

    def stop(self, status: str | None = None) -> None:
        """End the thread. `status`: what became of a run that did not finish, told if the server can be told now."""
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
        while not self._over.is_set():
            ending, asked = self._end.is_set(), self.state.finals is not None
            try:
                complete, pause, vain = self._send(), SEND_SECONDS, False
                self.reason = ""
            except Exception as error:  # whatever a server or a locked database answers, training goes on
                self.reason = why(error)
                complete, vain = False, in_vain(error)
                pause = RETRY_SECONDS if self.state.finals is None else 0.0 if not asked else AGAIN_SECONDS
            if complete or ending or (asked and vain):
                self._over.set()
                return
            self._wake.wait(pause)
            self._wake.clear()

    def _send(self) -> bool:
        """Send what is new; returns whether that was the last of it. What became of it is kept where it fails."""
        sender = self._sender
        with self._lock:
            told = self.state.status
            sender.state.finals, sender.state.ended, sender.state.status = self.state.finals, self.state.ended, told
            if self._cut:
                self._cut = False
                sender.again()
        try:
            return sender.send()
        finally:
            with self._lock:
                new = sender.state
                self.state.run_id, self.state.experiment_id = new.run_id, new.experiment_id
                self.state.complete = new.complete
                if told != RUNNING:
                    self.state.status = new.status
                if self.state_file.parent.exists():
                    self.state.write(self.state_file)


def say_missing(label: str, reason: str) -> None:
    """The last line of a stage whose run MLflow lacks in part."""
    print(f"{label}: MLflow did not take everything ({reason}); `python -m aps sync` sends it later", file=sys.stderr)
