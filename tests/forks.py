"""Commands in processes of their own, forked from a server that has imported what takes a second to import.

They are as separate as any process: own signals, own files, own exit status, own devices. What they do not show is how
long Python and JAX take to begin, or what they begin without.
"""

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import weakref
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "flax.linen", "optax", "orbax.checkpoint", "tokenizers", "av", "convert.from_diffusers", "convert.to_diffusers",
        "jvdiff.commands.convert", "jvdiff.commands.one_video", "jvdiff.commands.one_stream", "jvdiff.commands.train",
        "jvdiff.models.wan", "jvdiff.models.latent_video", "jvdiff.streaming", "jvdiff.training",
    ]
)  # fmt: skip


class Process:
    """`python WORDS` as a process; what it has said is in `out` and `err`.

    words: as the interpreter takes them: -m MODULE, -c CODE or a file, and arguments
    setup: code that is run before
    environment: what differs from this process's
    """

    def __init__(self, *words, setup="", environment=()):
        folder = tempfile.mkdtemp(prefix="jvdiff_process_")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._out, self._err = Path(folder, "out"), Path(folder, "err")
        self._out.touch()
        self._err.touch()
        words, environment = list(map(str, words)), os.environ | dict(environment)
        files = str(self._out), str(self._err)
        self._process = _SERVER.Process(target=_begin, args=(words, setup, environment, os.getcwd(), files))
        self._process.start()

    def wait(self, timeout=300):
        """The exit status, that of a signal negative."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"{timeout} s: {self.err[-2000:]}")
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number, group=False):
        """To the process, or to its whole group, which it leads; to none where it has ended."""
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self._process.pid, number)

    def kill(self):
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
        self._process.join()

    @property
    def out(self):
        return self._out.read_text()

    @property
    def err(self):
        return self._err.read_text()


def _begin(words, setup, environment, folder, files):
    """What the process does: as `python WORDS` would, in that folder; what it says goes to the files."""
    gc.freeze()  # as in conftest: what the server has imported is looked through, and its memory copied, no more
    gc.set_threshold(50_000, 20, 50)
    for stream, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    first, *sys.argv[1:] = words
    with open(1, "w", closefd=False) as sys.stdout, open(2, "w", buffering=1, closefd=False) as sys.stderr:
        try:
            exec(setup, {"__name__": "setup"})
            if first == "-m":
                runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
            elif first == "-c":
                exec(sys.argv.pop(1), {"__name__": "__main__"})
            else:
                runpy.run_path(first, run_name="__main__")
        finally:
            atexit._run_exitfuncs()
