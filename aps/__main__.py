"""`python -m aps VERB`, and the installed command `aps VERB`."""

import os
import signal
import sys
import traceback

from aps.cli import main
from aps.runtime.ranks import started_by_torchrun
from aps.runtime.signals import end_with_parent, listen


def run() -> None:
    listen()
    if not started_by_torchrun():
        sys.exit(main())
    end_with_parent(signal.SIGKILL)
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    if status:  # an ordinary end would end NCCL's group, which may wait for processes that wait for this one
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    run()
