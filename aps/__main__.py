"""`python -m aps VERB`."""

import sys

from aps.cli import main
from aps.runtime.signals import listen

if __name__ == "__main__":
    listen()
    sys.exit(main())
