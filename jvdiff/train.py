"""The door of `python -m jvdiff.train`; what is behind it: `jvdiff.commands.train`."""

import sys

from jvdiff.commands.train import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
