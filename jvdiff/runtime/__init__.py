"""What a process owes its machine: it joins others, stops when asked, writes whole files, shows progress."""

from jvdiff.lazy import attach

__all__ = ["claims", "files", "interrupts", "peers", "progress", "rescue", "run_state", "staging", "verdict"]

__getattr__ = attach(__name__, __all__)
