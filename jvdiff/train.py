"""The door of `python -m jvdiff.train`; what is behind it: `jvdiff.commands.train`."""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules are imported Ctrl-C ends without a traceback

from jvdiff.commands.train import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
