"""`python -m lightning_muws` is the `muws` command."""

import sys

from lightning_muws.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
