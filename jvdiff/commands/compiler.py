"""The CUDA compiler for GPUs that are not there: installed in a folder of its own, and lent to one process.

    python -m jvdiff.commands.compiler --install            0.7 GB from the package index, once for each JAX
    python -m jvdiff.commands.compiler -m pytest tests      python -m pytest tests, with the compiler on its path
    python -m jvdiff.commands.compiler PROGRAM.py ...       python PROGRAM.py ..., with it too

Plans and benchmarks find it by themselves; see `jvdiff.plan.targets`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jvdiff.commands import command_line
from jvdiff.plan import targets


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line (without the program's name) and returns its exit status."""
    words = sys.argv[1:] if words is None else list(words)

    def work() -> int | None:
        if words and words[0] not in ("-h", "--help", "--install"):
            return targets.python(words)
        print(targets.install() if words == ["--install"] else __doc__)
        return None

    return command_line.ended(work, words)


if __name__ == "__main__":
    sys.exit(main())
