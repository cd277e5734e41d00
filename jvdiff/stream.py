"""The door of `python -m jvdiff.stream`; what is behind it: `jvdiff.commands.stream`."""

import sys

from jvdiff.commands.stream import default_config, main

__all__ = ["default_config", "main"]

if __name__ == "__main__":
    sys.exit(main())
