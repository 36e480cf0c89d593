"""`python -m aps VERB`, and the installed command `aps VERB`."""

import os
import signal
import sys

from aps.runtime.signals import end_with_parent, listen


def run() -> None:
    listen()
    from aps.cli import main  # after `listen`, like every import that takes time
    from aps.runtime.ranks import started_by_torchrun

    if not started_by_torchrun():
        try:
            status = main()
        finally:  # while the interpreter ends, an exception would be a traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.exit(status)
    end_with_parent(signal.SIGKILL)
    try:
        status = main()
    except Exception:
        import traceback

        traceback.print_exc()
        status = 1
    if status:  # an ordinary end would end NCCL's group, which may wait for processes that wait for this one
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    run()
