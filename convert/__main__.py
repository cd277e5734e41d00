"""The door of `python -m convert`; what is behind it: `jvdiff.commands.convert`."""

import sys

from jvdiff.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
