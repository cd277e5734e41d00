"""The door of `python -m jvdiff.windows`; what is behind it: `jvdiff.commands.windows`."""

import sys

from jvdiff.commands.windows import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
