"""The door of `python -m convert.to_hf`; what is behind it: `jvdiff.commands.convert`."""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules are imported Ctrl-C ends without a traceback

from jvdiff.commands.convert import to_hf

if __name__ == "__main__":
    sys.exit(to_hf())
