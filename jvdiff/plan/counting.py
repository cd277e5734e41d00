"""Operations of a traced program; the largest array of a compiled one, and its attention."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8, "c64": 8}


def count_flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products and convolutions of a jaxpr, each as often as `products` says."""
    return sum(times * _flops(equation) for times, equation in products(jaxpr))


def products(jaxpr: Any) -> Iterator[tuple[int, Any]]:
    """(times, equation) of the matrix products and convolutions of a jaxpr, loops counted as often as they run.

    What a `shard_map` does, every device of its mesh does, and they are added up; the rest counts once. A branch counts
    as its dearest alternative; a `while` without a known length counts once.
    """
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            yield 1, equation
            continue
        inner, repeats = [each for value in params.values() for each in _jaxprs(value)], 1
        if name == "cond":
            inner = [max((branch.jaxpr for branch in params["branches"]), key=count_flops)]
        elif name == "scan":
            repeats = params["length"]
        elif name == "shard_map":
            repeats = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        for each in inner:
            yield from ((repeats * times, product) for times, product in products(each))


def _flops(equation: Any) -> float:
    params, (left, right) = equation.params, (each.aval.shape for each in equation.invars)
    if equation.primitive.name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        depth = math.prod(left[axis] for axis in contract)
    else:
        depth = math.prod(right) / right[params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth


def _jaxprs(value: Any) -> Iterator[Any]:
    for each in value if isinstance(value, tuple | list) else (value,):
        if hasattr(each, "eqns"):
            yield each
        elif hasattr(each, "jaxpr") and hasattr(each.jaxpr, "eqns"):
            yield each.jaxpr


def largest_array(hlo: str) -> tuple[str, int]:
    """(type, shape and size, elements) of the largest array that a compiled program makes; arguments do not count."""
    best, most = "", 0
    for kinds, operation in re.findall(r" = (\([^)]*\)|\S+) ([\w-]+)\(", re.sub(r"/\*.*?\*/", "", hlo)):
        if operation in ("parameter", "get-tuple-element", "tuple", "while", "bitcast"):
            continue
        for kind, shape in re.findall(r"([a-z]+\d*)\[([\d,]+)\]", kinds):
            elements = math.prod(int(n) for n in shape.split(","))
            if elements > most:
                size = gib(elements * _BYTES.get(kind, 4)).strip()
                best, most = f"{kind}[{shape}] {size}", elements
    return best, most


# What the text of a compiled program holds where an implementation is. `xla` names itself by a scope.
_MARKS = {
    "cudnn": "__cudnn$fmha",  # convolutions are cuDNN's too
    "mosaic_gpu": 'custom_call_target="mosaic_gpu',
    "triton": 'custom_call_target="__gpu$xla.gpu.triton"',
    "xla": "xla_attention",
}


def attention_in(hlo: str) -> tuple[str, ...]:
    """The implementations of attention that a compiled program holds, read from its text."""
    return tuple(name for name, mark in _MARKS.items() if mark in hlo)


def gib(size: float) -> str:
    """A number of bytes, in a column of 12 characters."""
    return f"{size / 2**30:>8.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:>8.2f} MiB"


def flops(count: float) -> str:
    """A number of operations, without the unit: "1.30 T"."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count / 1e6:.2f} M"
