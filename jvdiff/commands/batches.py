"""A batch: each of its clips is made once, whoever makes it, and goes on from where it was stopped.

What is made stands in the output folder as records, what was stopped as saved states, what is being made as claims. So
any number of processes may share a prompts file and a folder, and a batch may be run again at any time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jvdiff.commands.command_line import say
from jvdiff.commands.jobs import WEIGHTS, Job, asked
from jvdiff.errors import Interrupted, InUse, JvdiffError, ResourceError
from jvdiff.pipeline import Repository
from jvdiff.precision import Precision
from jvdiff.runtime import claims, peers, run_state
from jvdiff.runtime.files import hidden

PAUSE = 1.0  # seconds between two looks at what other processes make


class Batch:
    """The jobs of a run, made and not.

    jobs: in their order
    output: the folder
    last: the step after which a job counts as made
    failed: numbers of those that this process could not make
    """

    def __init__(
        self, jobs: Sequence[Job], repository: Repository, dtypes: Precision, output: Path, stop_at: int | None
    ):
        self.jobs, self.output, self.last, self.failed = jobs, output, stop_at or math.inf, set()
        every = [asked(job, repository, dtypes) for job in jobs]
        self._names = [
            tuple(n for n in each if n != "seed" or job.seed_given) for job, each in zip(jobs, every, strict=True)
        ]
        self._keys = [_key(names, each) for names, each in zip(self._names, every, strict=True)]
        self._facts = {name for each in every for name in each} | {WEIGHTS}
        self._repository = repository
        if peers.several():
            self._weights()  # which all processes find out together
        self._seen: dict[Path, tuple[Any, Any]] = {}

    def left(self) -> list[int]:
        """The numbers of the jobs that are neither made, nor stopped where they are to stop, nor failed here.

        A record stands for one job that it fits: that of its name, else one that asks for its seed, else any.
        """
        done = self._records() + [(name, facts) for name, facts, steps in self._states() if steps >= self.last]
        fitting, taken, made = collections.defaultdict(list), set(), set()
        for number, (_, record) in enumerate(done):
            for names in {*self._names}:
                if self._fits(key := _key(names, record), record):
                    fitting[key].append(number)
        order = sorted(range(len(self.jobs)), key=lambda i: not self.jobs[i].seed_given)
        for named in (True, False):
            for i in order:
                fits = (n for n in fitting[self._keys[i]] if n not in taken)
                found = next((n for n in fits if not named or _named(done[n], self.jobs[i])), None)
                if found is not None and i not in made:
                    taken.add(found)
                    made.add(i)
        return [i for i in range(len(self.jobs)) if i not in made | self.failed]

    def _weights(self) -> str:
        return self._repository.digest

    def _fits(self, key: str, record: Mapping[str, Any]) -> bool:
        """Whether what is made, or half made, is a job's with this key, of these weights: they are named last, as they
        may have to be read for it."""
        return key in self._keys and record.get(WEIGHTS) == self._weights()

    def turns(self, asked_to_stop: Callable[[], bool], again: str) -> Iterator[tuple[int, Job]]:
        """(number, job) of one after another, claimed while it is made, until none is left in any process.

        Raises:
            Interrupted: between two of them somebody asked to stop; `again` is the command that goes on.
        """
        told = False
        while True:
            if asked_to_stop():
                raise Interrupted(f"interrupted between two videos; go on with:\n  {again}")
            with contextlib.ExitStack() as held:
                claim, found = self._take(held) if peers.writes() else (None, None)
                match peers.gather(found)[0]:
                    case None:
                        return
                    case {"job": number, "states": states}:
                        told = False
                        yield number, dataclasses.replace(self._continued(self.jobs[number], states), claim=claim)
                        continue
                    case {"others": others} if others and not told:
                        say(f"waiting for videos that others make: {', '.join(others)}")
                        told = True
            time.sleep(PAUSE * random.uniform(0.5, 1.5))

    def _take(self, held: contextlib.ExitStack) -> tuple[claims.Claim | None, dict[str, Any] | None]:
        """(claim until `held` closes, {"job": number, "states": folders that it may go on from}); without a claim who
        makes the others, or None where none is left."""
        others, left = {}, self.left()
        for i in left:
            # A killed process of another machine had the name's claim too, which is to be watched as long as the job's.
            claims.holder(hidden(self.output / self.jobs[i].stem, ".claim"))
            with contextlib.ExitStack() as stack:
                claim = self._claim(stack, self._slot(i), self.jobs[i].stem)
                if claim is None:
                    others[str(claims.holder(self._slot(i)) or "another process")] = True
                elif self._is_left(i):
                    states = self._states_of(i, stack)
                    held.enter_context(stack.pop_all())
                    return claim, {"job": i, "states": states}
        return None, {"others": [*others]} if left else None

    def _claim(self, stack: contextlib.ExitStack, path: Path, what: str) -> claims.Claim | None:
        """The claim, until the stack closes; None where another has it."""
        try:
            return stack.enter_context(claims.held(path, what, watch=False))
        except InUse:
            return None
        except OSError as error:
            raise ResourceError(f"cannot write to {self.output}: {error.strerror}.") from error

    def _slot(self, i: int) -> Path:
        """The file of a job's claim; of equal jobs each has one."""
        digest = hashlib.sha256(f"{self._keys[i]}{self._weights()}".encode()).hexdigest()[:24]
        return self.output / f".{digest}-{self._keys[:i].count(self._keys[i])}.claim"

    def _is_left(self, i: int) -> bool:
        """Whether a job is to make, now that it is claimed: some process may have made it since, and of several equal
        ones those that others make count too."""
        equal = [j for j, key in enumerate(self._keys) if key == self._keys[i]]
        others = sum(claims.holder(self._slot(j)) is not None for j in equal if j != i)
        left = self.left()
        return i in left and len({*equal} & {*left}) > others

    def _states_of(self, i: int, stack: contextlib.ExitStack) -> list[str]:
        """The saved states of a job, the furthest first, but those of clips that are made, or that another goes on."""
        found = []
        for folder, state, steps in self._states():
            key = _key(self._names[i], state)
            if steps >= self.last or key != self._keys[i] or not self._fits(key, state):
                continue
            names = self._facts & state.keys()
            made = _key(names, state) in {_key(names, record) for _, record in self._records()}
            if not made and self._claim(stack, hidden(self.output / f"{folder}.state", ".claim"), folder):
                found.append((-steps, f"{self.output / folder}.state"))
        return [path for _, path in sorted(found)]

    def _continued(self, job: Job, states: Iterable[str]) -> Job:
        """The job, from the first of these states that every process can read."""
        for folder in states:
            try:
                state = run_state.load(folder)
            except JvdiffError as error:
                state = None
                say(f"notice: {job.stem} begins anew: {error}")
            if all(peers.gather(state is not None)) and state is not None:
                return dataclasses.replace(job, state=state, seed=state.facts["seed"])
        return job

    def _records(self) -> list[tuple[str, dict[str, Any]]]:
        """(name, facts) of the clips in the output folder."""
        return [(path.stem, record) for path, record in self._read("*.json", self._facts)]

    def _states(self) -> list[tuple[str, dict[str, Any], int]]:
        """(name, facts, steps) of the saved states in the output folder."""
        states = []
        for path, state in self._read("*.state/state.json", {"facts", "done"}):
            match state:
                case {"facts": dict(facts), "done": int(steps)}:
                    states.append((path.parent.stem, facts, steps))
        return states

    def _read(self, pattern: str, names: set[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
        """What JSON objects in these files say of these names; other files are nobody's. Each is read once."""
        for path in sorted(self.output.glob(pattern)):
            with contextlib.suppress(OSError, ValueError, RecursionError):
                now = path.stat()
                which = now.st_ino, now.st_mtime_ns, now.st_size
                if self._seen.get(path, (None,))[0] != which:
                    content = json.loads(path.read_bytes())
                    told = content.items() if isinstance(content, dict) else ()
                    self._seen[path] = which, {name: value for name, value in told if name in names}
                yield path, self._seen[path][1]


def _named(made: tuple[str, Mapping[str, Any]], job: Job) -> bool:
    """Whether a clip, as (name, record), is called as the job's would be."""
    name, record = made
    return name == dataclasses.replace(job, seed=record.get("seed")).stem


def _key(names: Iterable[str], values: Mapping[str, Any]) -> str:
    """The values of these names as one text."""
    return json.dumps([[name, values.get(name)] for name in sorted(names)])
