"""The door of `python -m jvdiff.data.digits`; what is behind it: `jvdiff.digits`."""

import sys

from jvdiff.digits.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
