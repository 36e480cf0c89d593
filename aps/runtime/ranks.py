"""Which of a stage's processes this is, as torchrun says. The only place that reads RANK and its like.

They count only where torchrun set them: a RANK left over in a shell changes nothing. Imports no torch.
"""

from __future__ import annotations

import os
from typing import NamedTuple


class Ranks(NamedTuple):
    rank: int = 0  # of all processes
    local: int = 0  # of those on this node
    world: int = 1  # processes


def started_by_torchrun() -> bool:
    """Whether this process is one of those that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def ranks() -> Ranks:
    """This process's place among those of its stage; alone where there is no torchrun."""
    if not started_by_torchrun():
        return Ranks()
    return Ranks(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
