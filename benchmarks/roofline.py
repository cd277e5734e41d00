"""How long a compiled program should take on GPUs that are not there, from its text and from published rates.

Of one device: time = matrix products + attention + float32 products + traffic of all other kernels + collectives, each
at a share of the published peak that others have measured (`RATES`). Collectives that the compiler has made
asynchronous and put work behind may be hidden by that work or not: both are given. What is not modelled: launches,
kernels that run side by side, the clock under load, and links that are shared with other traffic.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jvdiff.sharding.collectives import KINDS, Collective, Instruction, Run, computations, size, walk


class Rates(NamedTuple):
    """What a device can do.

    products, attention, float32: FLOP/s of bfloat16 products, of attention, of float32 products
    memory: bytes/s
    link: bytes/s of a device's links, one way
    latency: seconds that a collective takes however little it sends
    """

    products: float
    attention: float
    float32: float
    memory: float
    link: float
    latency: float


def _of_peaks(bfloat16: float, float32: float, memory: float, link: float) -> Rates:
    """Rates of data sheets' peaks: TFLOP/s of bfloat16 without sparsity, summed in float32, and of float32; TB/s of
    memory; GB/s of the links, one way. Shares of that: see docs/scaling.md. They were found out for Hopper and are
    assumptions for all others, as the share of memory and the latency are for all."""
    return Rates(0.70 * bfloat16 * 1e12, 0.60 * bfloat16 * 1e12, 0.70 * float32 * 1e12, 0.85e12 * memory, link, 20e-6)


# By the names of plan.known_targets(). SXM forms with NVLink; the two cards on their own PCIe links.
RATES = {
    "h200": _of_peaks(989, 67, 4.8, 370e9),
    "h100": _of_peaks(989, 67, 3.35, 370e9),
    "b200": _of_peaks(2250, 75, 8.0, 740e9),
    "a100": _of_peaks(312, 19.5, 2.039, 246e9),
    "rtx_4090": _of_peaks(165.2, 82.6, 1.008, 26e9),
    "rtx_5090": _of_peaks(209.5, 104.8, 1.792, 52e9),
}


class Work(NamedTuple):
    """Of one device in one call.

    products, attention, float32: FLOPs of bfloat16 products, of attention, of float32 products
    traffic: bytes of other kernels
    """

    products: float
    attention: float
    float32: float
    traffic: float

    @property
    def flops(self) -> float:
        return self.products + self.attention + self.float32


class Seconds(NamedTuple):
    """Of one call.

    compute: computing
    hidden: collectives that computing may hide
    exposed: collectives that it cannot
    """

    compute: float
    hidden: float
    exposed: float

    @property
    def longest(self) -> float:
        """Nothing is hidden."""
        return self.compute + self.hidden + self.exposed

    @property
    def shortest(self) -> float:
        """Whatever can be hidden is."""
        return max(self.compute, self.hidden) + self.exposed


def work(text: str, layers: int = 1) -> Work:
    """What one device computes, from a compiled program's text.

    Attention is cuDNN's calls and those of the block-sparse kernels, which count as if every block were listed (as in a
    ring). Where it is in its open form, products in a loop within the loop over layers, which is `layers` loops deep,
    are attention's, and what else goes on there a fused kernel would not do. Other kernels read their operands (what
    they slice, only the slice) and write their result.
    """
    named = computations(text)
    flops = {"products": 0.0, "attention": 0.0, "float32": 0.0}
    traffic = 0.0
    for run in walk(text):
        if run.instruction.opcode == "dot":
            operand = run.computation[run.instruction.operands[0]].type
            kind = "attention" if run.loops > layers else "float32" if operand.startswith("f32") else "products"
            flops[kind] += run.runs * _flops(run.instruction, operand)
        elif fused := _attention(run):
            flops["attention"] += run.runs * fused
        elif run.loops <= layers and not run.fused:
            traffic += run.runs * _traffic(run, named)
    return Work(**flops, traffic=traffic)


def seconds(work: Work, collectives: Iterable[Collective], rates: Rates) -> Seconds:
    """How long one call takes at these rates."""
    compute = work.products / rates.products + work.attention / rates.attention
    compute += work.float32 / rates.float32 + work.traffic / rates.memory
    hidden = exposed = 0.0
    for each in collectives:
        took = each.runs * (each.bytes / rates.link + rates.latency)
        if each.asynchronous and each.behind:
            hidden += took
        else:
            exposed += took
    return Seconds(compute, hidden, exposed)


def _shape(kind: str) -> list[int]:
    return [int(n) for n in re.findall(r"\[([\d,]*)\]", kind)[0].split(",") if n]


def _flops(dot: Instruction, left: str) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    axes = [int(n) for n in contracted[1].split(",") if n] if contracted else []
    return 2.0 * math.prod(_shape(dot.type)) * math.prod(_shape(left)[axis] for axis in axes)


def _attention(run: Run) -> float:
    """FLOPs of a fused attention of q [B,L,N,K] to k [B,S,N,K]; 0 of what is not one."""
    instruction = run.instruction
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    name = target[1] if target else ""
    if name.startswith("__cudnn$fmha"):
        products = 5 if name.endswith("Backward") else 2
    elif name.startswith(("mosaic_gpu", "__gpu$xla.gpu.triton")):  # forward with its log-sum-exp; dk with dv; dq alone
        products = 2 if "f32[" in instruction.type else 4 if instruction.type.startswith("(") else 3
    else:
        return 0.0
    q, k = (_shape(run.computation[operand].type) for operand in instruction.operands[:2])
    return 2.0 * products * math.prod(q) * k[1]


_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "dot"}


def _traffic(run: Run, named: Mapping[str, Mapping[str, Instruction]]) -> int:
    """Bytes that a kernel moves that is neither a product nor a collective."""
    instruction, opcode = run.instruction, run.instruction.opcode
    if opcode in _NOTHING or opcode.removesuffix("-start").removesuffix("-done") in (*KINDS, "async"):
        return 0
    if opcode.endswith("-start"):
        return 0  # counted at its end, whose type is the result's alone
    if opcode.endswith("-done"):
        return 2 * size(instruction.type)  # a slice or a copy
    body = re.search(r"calls=%?([\w.-]+)", instruction.attributes)
    inside = named[body[1]] if body else {}
    if any(each.opcode == "dot" for each in inside.values()):
        return 0
    written = size(instruction.type)
    place = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is what they write in place
    updates = [each for each in inside.values() if each.opcode in place]
    if updates:
        return 2 * sum(size(inside[each.operands[place[each.opcode]]].type) for each in updates)
    return written + sum(_read(run, inside, index) for index in range(len(instruction.operands)))


def _read(run: Run, inside: Mapping[str, Instruction], index: int) -> int:
    """Bytes of an operand that a kernel reads."""
    whole = size(run.computation[run.instruction.operands[index]].type)
    own = [i.name for i in inside.values() if i.opcode == "parameter" and i.arguments == str(index)]
    users = [i for i in inside.values() if own and own[0] in i.operands]
    while any(user.opcode == "bitcast" for user in users):  # the same bytes under another shape
        names = [user.name for user in users if user.opcode == "bitcast"]
        users = [user for user in users if user.opcode != "bitcast"]
        users += [i for i in inside.values() if set(names) & set(i.operands)]
    if users and all(user.opcode in ("dynamic-slice", "slice") for user in users):
        return min(whole, sum(size(user.type) for user in users))
    return whole
