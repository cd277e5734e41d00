"""Ctrl-C, SIGTERM (preemption) and SIGHUP (a closed terminal): one mechanism for every command.

As long as a run has nothing to lose, a signal ends it at once, by KeyboardInterrupt in the main thread. Inside
`deferred` it is noted instead, `asked` tells of it, and all processes obey after the same step; a second Ctrl-C ends it
at once there too. A signal that was ignored when the program began (`nohup`, `&`) stays ignored.

Python runs handlers when the main thread is back from what it computes, and a compiler keeps it for minutes. So a
command has a second thread, which hears of signals through a pipe and ends the process if the main thread does not. In
a process of our own, whichever thread hears of it first does so at once: an exception in the middle of an import of
JAX's modules is a crash, and one while garbage is collected is lost.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jvdiff import program
from jvdiff.runtime import peers, verdict

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED = 130, "stopped at once; nothing more was saved."
GRACE = 0.9  # seconds that the main thread has to leave


class _Signals:
    """What came, and what is to be done then.

    obeyed: handlers are installed
    watched: a command's thread ends the process
    came: numbers of the signals
    noted: how many of them came when there was something to lose, and are left to who asks
    stakes: of each `deferred` that is open, what tells whether there is something to lose yet
    shielded: something is being saved that nothing may end
    waiting: a person is asked, until a signal comes
    leaving: KeyboardInterrupt is on its way, or was
    ours: the whole process is the command, and nothing else
    stopped: status and message where a signal ends a command
    before: the handlers of the signals that are obeyed
    """

    def __init__(self) -> None:
        self.obeyed = self.watched = self.leaving = self.shielded = self.waiting = self.ours = False
        self.came: list[int] = []
        self.before: dict[int, Any] = {}
        self.stopped: tuple[int, str] = STOPPED
        self.noted = 0
        self.stakes: list[Callable[[], bool]] = []

    def at_once(self) -> bool:
        """Whether a signal that came ends the process."""
        return not self.shielded and not self.waiting and (self.leaving or not self.stakes or not self.stakes[-1]())

    def grace(self) -> float:
        """Seconds that the main thread has to leave."""
        return 0.0 if self.ours and not self.stakes else GRACE


_now = _Signals()


def _handle(number: int, frame: Any) -> None:
    del frame
    _now.came.append(number)
    again = number == signal.SIGINT and len(_now.came) > 1
    if _now.waiting:
        raise KeyboardInterrupt
    if not _now.shielded and (again or not _now.stakes):
        if _now.ours and not peers.several():  # to whom this thread may be talking
            verdict.end_now(*_now.stopped)
        elif not ((_now.ours and not _now.stakes) or (_now.leaving and _now.watched)):  # there the other thread ends it
            _now.leaving = True
            raise KeyboardInterrupt
        return
    _now.noted += not _now.at_once()
    if len(_now.came) == 1:
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # no terminal; or it was just being written to
            print("\nstopping after this step; Ctrl-C to stop at once", file=sys.stderr, flush=True)


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Obeys signals inside the block, and yields `asked`. Inside another such block: that one's."""
    global _now
    if _now.obeyed or threading.current_thread() is not threading.main_thread():  # which alone receives signals
        yield asked
        return
    _now = _Signals()
    _now.obeyed = True
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _now.before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in _now.before:
            signal.signal(number, _handle)
        yield asked
    finally:
        for number, handler in _now.before.items():
            signal.signal(number, signal.SIG_IGN if _now.ours else handler)  # until it is `over`
        _now.obeyed = False


def over(code: int) -> None:
    """A command has said how it ended; a signal that comes now ends a process of our own at once, with that status."""
    if _now.ours:
        for number in _now.before:
            signal.signal(number, lambda *_: os._exit(code))


@contextlib.contextmanager
def command(code: int, message: str) -> Iterator[None]:
    """What a command line does inside: `interrupts`, and the process ends with `code` where its main thread is stuck.

    What is half written is removed then, see `verdict.unfinished`.
    """
    with interrupts():
        if _now.watched or not _now.obeyed or threading.current_thread() is not threading.main_thread():
            yield
            return
        left, (reading, writing) = threading.Event(), os.pipe()
        os.set_blocking(writing, False)
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        _now.watched, _now.ours, _now.stopped = True, program.ours(), (code, message)
        threading.Thread(target=_watch, args=(reading, left), daemon=True).start()
        try:
            yield
        finally:
            left.set()
            signal.set_wakeup_fd(before)
            os.close(writing)
            _now.watched = False


def _watch(reading: int, left: threading.Event) -> None:
    heard = 0
    with open(reading, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            heard += number[0] in SIGNALS
            if number[0] not in SIGNALS or left.wait(_now.grace()):
                continue
            if _now.at_once() and (_now.leaving or _now.noted < heard):  # else who obeys it is slow to leave
                verdict.end_now(*_now.stopped)


def asked() -> bool:
    """Whether a signal has come to any of the processes, which must ask equally often: all get the same answer."""
    return any(peers.gather(bool(_now.came)))


@contextlib.contextmanager
def deferred(at_stake: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Inside, a signal is noted and obeyed by who asks; a second Ctrl-C raises KeyboardInterrupt.

    at_stake: whether there is something to lose yet; until then a process whose main thread is stuck is ended.
    """
    _now.stakes.append(at_stake)
    try:
        yield
    finally:
        _now.stakes.remove(at_stake)


@contextlib.contextmanager
def shielded(on: bool = True) -> Iterator[None]:
    """Inside, no signal ends anything: finished work is being saved. `on=False`: a wait in between, which one ends."""
    before = _now.shielded, _now.waiting
    _now.shielded, _now.waiting = on, not on
    try:
        yield
    finally:
        _now.shielded, _now.waiting = before
