"""Which program this process is. `jvdiff` imports this before anything else, so it imports nothing that takes time."""

import signal
import sys


def ours() -> bool:
    """Whether this process is a command of jvdiff, and not a program that calls one or uses the library."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    first = sys.argv[0] if sys.argv else ""
    if spec is not None:
        return spec.name.startswith(("jvdiff.", "convert."))
    if first == "-m":  # which module that is, Python is still finding out
        return sys.orig_argv[-len(sys.argv)].removeprefix("-m").partition(".")[0] == "jvdiff"
    return first.rpartition("/")[2] == "jvdiff"


def end_by_ctrl_c() -> None:
    """While a command of ours is being imported Ctrl-C ends it without a traceback, as other signals do.

    What comes then is `jvdiff.runtime.interrupts`. A signal that is ignored (`nohup`, `&`) stays ignored.
    """
    if ours() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
