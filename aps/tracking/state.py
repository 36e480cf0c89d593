"""tracking.json: how far a run got in MLflow, beside its journal.

It holds nothing that MLflow could not be asked for, so that losing it loses nothing: a damaged file is warned about and
replaced, and the run is found again by its key.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from aps.files import write_json
from aps.tracking.addresses import settled
from aps.tracking.describing import About

RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"  # as MLflow calls them


class State(BaseModel):
    """Of one run at one address."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True)

    address: str  # as it may be shown
    about: About
    run_id: str | None = None
    experiment_id: str | None = None
    status: str = RUNNING
    ended: int | None = None  # ms
    finals: dict[str, float] | None = None  # once the stage is done
    complete: bool = False  # whether MLflow was seen to have everything

    def write(self, path: Path) -> None:
        write_json(path, self.model_dump())

    def moved(self, address: str) -> None:
        """To another address, where nothing is known of the run."""
        self.address, self.complete = address, False


def read_state(path: Path) -> State | None:
    """None where there is no file, or, with a warning, where it is not what `State.write` writes."""
    if not path.exists():
        return None
    try:
        return State.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        print(f"warning: {path}: damaged ({what}); it is replaced, and its run is looked up in MLflow", file=sys.stderr)
        return None


def adopt(kept: Path, made: Path, about: About, address: str) -> State:
    """The state of a finished run beside its outputs, in the file `kept`.

    What is kept there already counts, else what the run left in `made`, where either is of this job in this study; else
    the run is a new one to MLflow.
    """
    for file in (kept, made):
        state = read_state(file)
        if state is not None and state.about.key == about.key:
            break
    else:
        state = State(address=settled(address), about=about)
    state.write(kept)
    return state
