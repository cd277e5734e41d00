"""The door of `python -m jvdiff.sample`; what is behind it: `jvdiff.commands.sample`."""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules are imported Ctrl-C ends without a traceback

from jvdiff.commands.sample import default_config, main

__all__ = ["default_config", "main"]

if __name__ == "__main__":
    sys.exit(main())
