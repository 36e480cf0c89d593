"""tracking.json, beside a run's journal: the run's id in MLflow, and what was sent. And the name of a results folder.

Nothing is lost with the file: if it is missing or damaged, it is written again, and the run is found in MLflow by its
key.
"""

from __future__ import annotations

import re
import secrets
import socket
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from aps.errors import UserError
from aps.files import atomic_path, write_json
from aps.tracking.addresses import settled
from aps.tracking.describing import LONGEST_TAG, About

RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"  # MLflow's names of a run's status


def results_name(results: str | Path) -> str:
    """The name by which MLflow tells the runs of a results folder from another folder's of the same study.

    It is made once, of the host and the path, and kept in the folder: hosts that share the folder have different names,
    and folders of two clusters may have the same path. So a folder that is moved keeps its name, and one that is made
    anew gets another. Where it can't be kept, it is the path alone, which is the same for every host.
    """
    file, path = Path(results) / ".mlflow-name", str(Path(results).resolve())
    try:
        if not file.exists():
            with atomic_path(file) as temporary:
                temporary.write_text(
                    f"{socket.gethostname()}:{path} {secrets.token_hex(2)}\n", encoding="utf-8", errors="replace"
                )
        name = (
            file.read_text(encoding="utf-8", errors="replace").strip() or path
        )  # of two processes that make it at once, the last one's
    except (OSError, UserError):
        name = path
    return re.sub(r"[\"'`\\\s]+", " ", name)[:LONGEST_TAG]  # quotes would end the text in a search of MLflow's


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
