"""`python -m aps VERB`."""

import sys

from aps.cli import main

if __name__ == "__main__":
    sys.exit(main())
