"""`python -m aps VERB`, and the installed command `aps VERB`."""

import sys

from aps.cli import main
from aps.runtime.signals import listen


def run() -> None:
    listen()
    sys.exit(main())


if __name__ == "__main__":
    run()
