"""The door of `python -m jvdiff.sample`; what is behind it: `jvdiff.commands.sample`."""

import sys

from jvdiff.commands.sample import default_config, main

__all__ = ["default_config", "main"]

if __name__ == "__main__":
    sys.exit(main())
