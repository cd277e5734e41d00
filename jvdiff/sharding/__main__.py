"""The door of `python -m jvdiff.sharding`; what is behind it: `jvdiff.commands.sharding`."""

import sys

from jvdiff.commands.sharding import lines, main

__all__ = ["lines", "main"]

if __name__ == "__main__":
    sys.exit(main())
