"""The door of `python -m jvdiff.doctor`; what is behind it: `jvdiff.commands.doctor`."""

import sys

from jvdiff.commands.doctor import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
