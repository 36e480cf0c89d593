"""Reads this process's rank from torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE); no other module does.

The variables are used only where torchrun set them: a RANK that remains in a shell changes nothing. Imports no torch.
"""

from __future__ import annotations

import os
from typing import NamedTuple

TOLD = "APS_TOLD"  # variable with the path of a file, which the first of a node's processes makes that tells a mistake


class Ranks(NamedTuple):
    rank: int = 0  # among all processes
    local: int = 0  # among those on this node
    world: int = 1  # number of processes


def started_by_torchrun() -> bool:
    """Whether this process is one of those that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def first_to_tell() -> bool:
    """Whether this process is to tell a mistake: it is alone, or the first of its node to meet one.

    Rank 0 alone would not do. Another may be the only one that meets it, or the first, at whose end rank 0 is killed.
    """
    try:
        os.close(os.open(os.environ[TOLD], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except (KeyError, OSError):  # the launcher has set none, or its place is closed
        return ranks().rank == 0
    return True


def ranks() -> Ranks:
    """This process's rank among those of its stage; without torchrun it is the only one."""
    if not started_by_torchrun():
        return Ranks()
    return Ranks(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
