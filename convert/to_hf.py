"""The door of `python -m convert.to_hf`; what is behind it: `jvdiff.commands.convert`."""

import sys

from jvdiff.commands.convert import to_hf

if __name__ == "__main__":
    sys.exit(to_hf())
