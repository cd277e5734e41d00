"""What a compiled program communicates, counted from its text (`compiled.as_text()`, for CPUs and for CUDA).

What one device sends in one run of a collective, with g devices in its group and R bytes of result on each of them:

    all-gather          R (g-1)/g        each device's share goes to the g-1 others, or round a ring in g-1 steps
    reduce-scatter      R (g-1)          the same the other way: the operand has g R bytes
    all-reduce          2 R (g-1)/g      a reduce-scatter and an all-gather
    all-to-all          R (g-1)/g        each device keeps its own share
    ragged-all-to-all   R                at most; how much it is, the program learns when it runs
    collective-permute  R                nothing where every device sends to itself
    collective-broadcast R               each device passes it on once

These are the least bytes that any algorithm sends through one device's links. XLA:CPU computes in float32 what the
program has in bfloat16, collectives too, so that there the bytes of such a program are double.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # the others end with their width, as f8e4m3fn does not


class Collective(NamedTuple):
    """One collective of a program.

    kind: one of KINDS.
    result: types and shapes that one device gets.
    bytes: that one device sends in one run.
    group: devices that exchange with one another (of a collective-permute, the length of the ring).
    asynchronous: the device may compute meanwhile.
    behind: how many kernels the compiler has put between its start and its end, small ones too.
    runs: in one call of the program.
    source: the operation that it comes from, as the metadata has it.
    """

    kind: str
    result: str
    bytes: int
    group: int
    asynchronous: bool
    behind: int
    runs: int
    source: str


class Instruction(NamedTuple):
    """One instruction of a computation, its text taken apart.

    name: without the %.
    type: types and shapes of the result.
    opcode: what it does.
    arguments: the text in parentheses.
    attributes: the text after them.
    """

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions whose results it takes."""
        return tuple(re.findall(r"%([\w.-]+)", self.arguments))

    @property
    def source(self) -> str:
        """op_name of the metadata, empty without one."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


class Run(NamedTuple):
    """An instruction as it runs.

    instruction: itself.
    computation: that it is in.
    runs: in one call of the program.
    loops: around it.
    fused: it is part of a kernel, so that its operands and result need not be in memory.
    behind: kernels between its start and end; None: synchronous.
    """

    instruction: Instruction
    computation: Mapping[str, Instruction]
    runs: int
    loops: int
    fused: bool
    behind: int | None


def read(text: str) -> list[Collective]:
    """Every collective of a compiled program, in the order of the text.

    A conditional counts as the branch that sends most. A loop whose length the text does not tell counts once.
    """
    devices = math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[: text.find("\n")]))
    collectives = (_collective(run, devices) for run in walk(text))
    return [each for each in collectives if each is not None and each.group > 1]


def by_kind(collectives: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """kind -> (how often collectives of that kind run, bytes that one device sends with them), in one call."""
    total: dict[str, tuple[int, int]] = {}
    for each in collectives:
        runs, size = total.get(each.kind, (0, 0))
        total[each.kind] = runs + each.runs, size + each.runs * each.bytes
    return dict(sorted(total.items()))


def walk(text: str) -> Iterator[Run]:
    """Every instruction that a call of the program runs, those of loops, branches, calls and fusions included."""
    program, entry = _parse(text)
    yield from _walk(program, entry)


def computations(text: str) -> Mapping[str, Mapping[str, Instruction]]:
    """{name of a computation: {name: instruction}}."""
    return _parse(text)[0]


def size(kinds: str) -> int:
    """Bytes of a type as the text has it, tuples summed: "bf16[4096,256]{1,0}" is 2097152."""
    total = 0
    for kind, shape in re.findall(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]", kinds):
        width = re.match(r"[a-z]+(\d+)", kind)
        bits = _BITS.get(kind) or (int(width[1]) if width else 0)
        total += -(-bits * math.prod(int(n) for n in shape.split(",") if n) // 8)
    return total


# ------------------------------------------------------------------------------------------------------------ the text


@functools.lru_cache(maxsize=2)
def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """({computation: {name: instruction}}, the name of the entry)."""
    program: dict[str, dict[str, Instruction]] = {}
    entry, computation = "", {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            computation = program.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif name := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line):
            start = name.end()
            end = _balanced(line, start) if line[start] == "(" else line.index(" ", start)
            opcode = re.compile(r"\s*([\w-]+)\(").match(line, end)
            assert opcode, line
            close = _balanced(line, opcode.end() - 1)
            arguments = line[opcode.end() : close - 1]
            computation[name[1]] = Instruction(name[1], line[start:end], opcode[1], arguments, line[close:])
    return program, entry


def _balanced(line: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for parenthesis in re.compile(r"[()]").finditer(line, start):
        depth += 1 if parenthesis[0] == "(" else -1
        if depth == 0:
            return parenthesis.end()
    raise ValueError(f"unbalanced parentheses: {line:.200}")


def _walk(
    program: Mapping[str, Mapping[str, Instruction]],
    name: str,
    runs: int = 1,
    loops: int = 0,
    fused: bool = False,
    behind: int | None = None,
) -> Iterator[Run]:
    computation = program[name]
    for instruction in computation.values():
        opcode = instruction.opcode
        hidden = _behind(computation, instruction) if opcode.endswith("-start") else behind
        yield Run(instruction, computation, runs, loops, fused, hidden)
        called = _called(instruction)
        if opcode == "conditional":
            branches = [list(_walk(program, branch, runs, loops, fused, hidden)) for branch in called]
            yield from max(branches, key=_sent)
            continue
        loop = opcode == "while"
        times = runs * _trips(program, instruction) if loop else runs
        for each in called:
            yield from _walk(program, each, times, loops + loop, fused or opcode.startswith("fusion"), hidden)


def _sent(runs: Iterable[Run]) -> int:
    collectives = (_collective(run, 1) for run in runs)
    return sum(each.runs * each.bytes for each in collectives if each is not None)


def _called(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs, without what a reduction does to two elements."""
    if instruction.opcode.removesuffix("-start") in KINDS:
        return []
    names = "calls|body|condition|to_apply|true_computation|false_computation"
    called = re.findall(rf"\b(?:{names})=%?([\w.-]+)", instruction.attributes)
    for several in re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", instruction.attributes):
        called += re.findall(r"%?([\w.-]+)", several)
    return called


def _trips(program: Mapping[str, Mapping[str, Instruction]], loop: Instruction) -> int:
    """How often a while loop runs: as the compiler says, or the constant that its condition compares with, or 1."""
    if known := re.search(r'known_trip_count":\s*\{\s*"n":\s*"?(\d+)', loop.attributes):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.attributes)
    compared = [run.instruction for run in _walk(program, condition[1])] if condition else []
    return max((int(i.arguments) for i in compared if i.opcode == "constant" and i.arguments.isdecimal()), default=1)


def _behind(computation: Mapping[str, Instruction], start: Instruction) -> int:
    """Kernels on arrays between the start of something asynchronous and its end."""
    order = list(computation.values())
    first = order.index(start)
    ends = [i for i, other in enumerate(order) if other.opcode.endswith("-done") and start.name in other.operands]
    kernels = {"fusion", "custom-call", "dot", "convolution", "while", "call", "conditional", "copy"}
    return sum(other.opcode in kernels and "," in other.type for other in order[first + 1 : ends[0]]) if ends else 0


def _collective(run: Run, devices: int) -> Collective | None:
    instruction = run.instruction
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    result = instruction.type
    if instruction.opcode.endswith("-start"):
        # Its own type has the operands too, in a form that depends on the kind and on XLA's age; that of its end not.
        ends = [i for i in run.computation.values() if i.opcode.endswith("-done") and instruction.name in i.operands]
        result = ends[0].type if ends else result
    group, moves = _group(instruction, devices)
    each = size(result)
    sends = {
        "all-gather": each * (group - 1) // group,
        "all-reduce": 2 * each * (group - 1) // group,
        "all-to-all": each * (group - 1) // group,
        "reduce-scatter": each * (group - 1),
    }.get(kind, each if moves else 0)
    asynchronous = run.behind is not None and not re.search(r'"is_sync":\s*true', instruction.attributes)
    shapes = ", ".join(re.findall(r"[a-z]+\d*[a-z\d]*\[[\d,]*\]", result))
    behind = run.behind or 0
    return Collective(kind, shapes, sends, group, asynchronous, behind, run.runs, instruction.source)


def _group(instruction: Instruction, devices: int) -> tuple[int, bool]:
    """(devices that exchange with one another, whether anything leaves a device)."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", instruction.attributes):
        to = {int(a): int(b) for a, b in re.findall(r"\{(\d+),\s*(\d+)\}", pairs[1])}
        return max(_cycle(to, source) for source in to), any(a != b for a, b in to.items())
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", instruction.attributes):
        return int(iota[1]), True
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", instruction.attributes):
        sizes = dict(re.findall(r"'?([\w.-]+)'?=(\d+)", mesh[1]))
        parts = re.findall(r"'?([\w.-]+)'?(?::\(\d+\)(\d+))?(?:,|$)", mesh[2])  # 'x', or a part of it: 'x':(2)4
        return math.prod(int(part or sizes[axis]) for axis, part in parts), True
    if listed := re.search(r"replica_groups=\{\{([\d, ]+)\}", instruction.attributes):
        return len(listed[1].split(",")), True
    return devices, devices > 1  # {}: all of them


def _cycle(to: Mapping[int, int], source: int) -> int:
    """Devices on the way from one, until it closes or ends."""
    seen = {source}
    while (source := to.get(source, source)) not in seen:
        seen.add(source)
    return len(seen)
