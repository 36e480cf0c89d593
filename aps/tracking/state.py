"""tracking.json, beside a run's journal: the run's id in MLflow, and what was sent.

Nothing is lost with the file: if it is missing or damaged, it is written again, and the run is found in MLflow by its
key.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from aps.files import write_json
from aps.tracking.addresses import settled
from aps.tracking.describing import About

RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"  # MLflow's names of a run's status


class State(BaseModel):
    """The state of one run at one address."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True)

    address: str  # as it may be shown
    about: About
    run_id: str | None = None
    experiment_id: str | None = None
    status: str = RUNNING
    ended: int | None = None  # ms
    finals: dict[str, float] | None = None  # final metrics, when the stage is finished
    complete: bool = False  # whether MLflow has everything
    replaces: str | None = None  # id of the run whose results this one's take the place of

    def write(self, path: Path) -> None:
        write_json(path, self.model_dump())

    def moved(self, address: str) -> None:
        """Change to another address, where the run may not be."""
        self.address, self.complete = address, False


def read_state(path: Path) -> State | None:
    """The state in a file. None if there is no file or, with a warning, if it is damaged."""
    if not path.exists():
        return None
    try:
        return State.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        print(
            f"warning: {path}: damaged ({reason}); it is replaced, and its run is looked up in MLflow", file=sys.stderr
        )
        return None


def adopt(result: Path, saved: Path, about: About, address: str, restored: bool = True) -> State:
    """The state of a finished run of this study; it is written to the file `result`, beside the run's outputs.

    It comes from `result`, or else from `saved` in the folder of the run, if it is of this job in this study. Otherwise
    the run is a new one for MLflow. restored: whether the run was finished before. If it comes back in another one's
    place, it has to be sent again, for MLflow to know.
    """
    before = state = read_state(result)
    if state is None or state.about.key != about.key:
        state = read_state(saved)
    if state is None or state.about.key != about.key:
        state = State(address=settled(address), about=about)
    if restored and before is not None and before.about.key != about.key and before.run_id is not None:
        state.replaces, state.complete = before.run_id, False
    state.write(result)
    return state
