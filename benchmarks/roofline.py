"""How long a compiled program should take on GPUs that are not there, from its text and from published rates.

    python benchmarks/roofline.py --config wan2_1_t2v_1_3b --stage denoise      # where the time of a stage should go
    python benchmarks/roofline.py --config wan2_1_t2v_1_3b --stage "decode next" --vae_decode tf32 --target a100
    python benchmarks/roofline.py --hlo FILE                                    # of any compiled program's text

A table has a line for each class of kernels, each of which takes as long as its operations or its bytes, whichever is
longer. No GPU is needed, but the CUDA compiler is (`python -m jvdiff.commands.compiler --install`). What `work` and
`seconds` make of a whole step is less by what products read and write where that takes longer.

Of one device: time = matrix products + attention + float32 products + traffic of all other kernels + collectives, each
at a share of the published peak that others have measured (`RATES`). Collectives that the compiler has made
asynchronous and put work behind may be hidden by that work or not: both are given. What is not modelled: launches,
kernels that run side by side, the clock under load, and links that are shared with other traffic.
"""

import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jvdiff import plan
from jvdiff.errors import JvdiffError
from jvdiff.sharding.collectives import KINDS, Collective, Instruction, Run, by_kind, computations, read, size, walk


class Rates(NamedTuple):
    """What a device can do.

    products, attention, float32: FLOP/s of bfloat16 products, of attention, of float32 products
    memory: bytes/s
    link: bytes/s of a device's links, one way
    latency: seconds that a collective takes however little it sends
    convolutions, tf32: FLOP/s of bfloat16 convolutions, of convolutions and products of float32 in TF32
    """

    products: float
    attention: float
    float32: float
    memory: float
    link: float
    latency: float
    convolutions: float
    tf32: float


def _of_peaks(bfloat16: float, float32: float, memory: float, link: float) -> Rates:
    """Rates of data sheets' peaks: TFLOP/s of bfloat16 without sparsity, summed in float32, and of float32; TB/s of
    memory; GB/s of the links, one way. Shares of that: see docs/scaling.md. They were found out for Hopper and are
    assumptions for all others, as the latency and the shares of memory and convolutions are for all. TF32 has half."""
    products, attention, convolutions = (share * bfloat16 * 1e12 for share in (0.70, 0.60, 0.50))
    return Rates(
        products, attention, 0.70 * float32 * 1e12, 0.85e12 * memory, link, 20e-6, convolutions, convolutions / 2
    )


# By the names of plan.known_targets(). SXM forms with NVLink; the two cards on their own PCIe links.
RATES = {
    "h200": _of_peaks(989, 67, 4.8, 370e9),
    "h100": _of_peaks(989, 67, 3.35, 370e9),
    "b200": _of_peaks(2250, 75, 8.0, 740e9),
    "a100": _of_peaks(312, 19.5, 2.039, 246e9),
    "rtx_4090": _of_peaks(165.2, 82.6, 1.008, 26e9),
    "rtx_5090": _of_peaks(209.5, 104.8, 1.792, 52e9),
}


class Kernel(NamedTuple):
    """What a kernel does in one run.

    kind: of its operations, the name of their rate in `Rates`; "" if it has none
    source: the operation of the model that it comes from
    flops, bytes: operations; what it reads and writes
    runs: in one call of the program
    """

    kind: str
    source: str
    flops: float
    bytes: int
    runs: int

    def seconds(self, rates: Rates) -> float:
        """Of all its runs."""
        computing = self.flops / getattr(rates, self.kind) if self.kind else 0.0
        return self.runs * max(computing, self.bytes / rates.memory)


def kernels(text: str, layers: int = 1, share: float = 1.0) -> Iterator[Kernel]:
    """The kernels that one device runs, collectives excepted, from a compiled program's text.

    Attention is cuDNN's calls and those of the block-sparse kernels, which compute `share` of all pairs of queries and
    keys. Where it is in its open form alone, products in a loop within the loop over layers, which is `layers` loops
    deep, are attention's, and what else goes on there a fused kernel would not do. A kernel reads its operands (what it
    slices, only the slice) and writes its result.
    """
    named = computations(text)
    fused = any(f'custom_call_target="{name}' in text for name in (_CUDNN, *_SPARSE))
    for run in walk(text):
        if run.fused:
            continue
        kind, flops = _operations(run, named, share)
        inner = run.loops > layers and not fused
        if inner and flops:
            yield Kernel("attention", run.instruction.source, flops, 0, run.runs)
        elif not inner and (flops or _traffic(run, named)):
            moved = _traffic(run, named)
            yield Kernel(kind, _source(run.instruction, named), flops, moved, run.runs)


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


def work(text: str, layers: int = 1, share: float = 1.0) -> Work:
    """What one device computes: the sums of `kernels`, the sparse ones as if every block were listed (as in a ring), or
    with the `share` of the pairs that they compute."""
    total = {"products": 0.0, "attention": 0.0, "float32": 0.0, "": 0.0}
    for each in kernels(text, layers, share):
        kind = {"tf32": "float32", "convolutions": "products"}.get(each.kind, each.kind)
        total[kind] += each.runs * (each.flops if kind else each.bytes)
    return Work(*total.values())


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


_CUDNN, _SPARSE = "__cudnn$fmha", ("mosaic_gpu", "__gpu$xla.gpu.triton")
_PRODUCTS = ("__cublas$lt$matmul", "__cublas$gemm")


def _shape(kind: str) -> list[int]:
    return [int(n) for n in re.findall(r"\[([\d,]*)\]", kind)[0].split(",") if n]


def _target(instruction: Instruction) -> str:
    """What a custom call calls."""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found and instruction.opcode == "custom-call" else ""


def _operations(run: Run, named: Mapping[str, Mapping[str, Instruction]], share: float) -> tuple[str, float]:
    """(kind, FLOPs) of a kernel, as in `Kernel`."""
    instruction, name = run.instruction, _target(run.instruction)
    if name.startswith((_CUDNN, *_SPARSE)):
        return "attention", _attention(run, name) * (1.0 if name.startswith(_CUDNN) else share)
    if name.startswith("__cudnn$conv"):
        left, kernel = (run.computation[operand].type for operand in instruction.operands[:2])
        outputs = re.search(r"_(\w+)->", instruction.attributes)
        assert outputs, instruction
        return _kind(instruction, left, "convolutions"), (
            2.0
            * math.prod(_shape(instruction.type))
            * math.prod(_shape(kernel))
            / _shape(kernel)[outputs[1].index("o")]
        )
    if name.startswith(_PRODUCTS) or instruction.opcode == "dot":
        left = run.computation[instruction.operands[0]].type
        return _kind(instruction, left, "products", bool(name)), _flops(instruction, left)
    inside = [(each, body) for body in _bodies(instruction, named) for each in body.values()]
    dots = [(dot, body) for dot, body in inside if dot.opcode == "dot" or _target(dot).startswith(_PRODUCTS)]
    found = [(dot, body[dot.operands[0]].type) for dot, body in dots]
    by_the_gpu = "__triton" in instruction.attributes or any(_target(dot) for dot, _ in dots)
    kind = _kind(*found[0], "products", by_the_gpu) if found else ""
    return kind, sum(_flops(dot, left) for dot, left in found)


def _bodies(instruction: Instruction, named: Mapping[str, Mapping[str, Instruction]]) -> Iterator[Any]:
    """The computations of a fusion, inner ones too."""
    if instruction.opcode == "fusion" and (body := re.search(r"calls=%?([\w.-]+)", instruction.attributes)):
        yield named[body[1]]
        for each in named[body[1]].values():
            yield from _bodies(each, named)


def _kind(instruction: Instruction, operand: str, low: str, gpu: bool = True) -> str:
    """The rate of a product or convolution; `low`: with operands of 16 bits. A GPU multiplies float32 in TF32."""
    if not operand.startswith("f32"):
        return low
    return "tf32" if gpu and "highest" not in instruction.attributes.lower() else "float32"


def _flops(dot: Instruction, left: str) -> float:
    contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]', dot.attributes)
    axes = [int(n) for n in re.findall(r"\d+", contracted[1])] if contracted else []
    return 2.0 * math.prod(_shape(dot.type)) * math.prod(_shape(left)[axis] for axis in axes)


def _attention(run: Run, name: str) -> float:
    """FLOPs of a fused attention of q [B,L,N,K] to all of k [B,S,N,K]."""
    instruction = run.instruction
    if name.startswith(_CUDNN):
        products = 5 if name.endswith("Backward") else 2
    else:  # forward with its log-sum-exp; dk with dv; dq alone
        products = 2 if "f32[" in instruction.type else 4 if instruction.type.startswith("(") else 3
    q, k = (_shape(run.computation[operand].type) for operand in instruction.operands[:2])
    return 2.0 * products * math.prod(q) * k[1]


def _source(instruction: Instruction, named: Mapping[str, Mapping[str, Instruction]]) -> str:
    """The operation that a kernel comes from: its own, or the last one in it that has any."""
    inner = [each.source for body in _bodies(instruction, named) for each in body.values() if each.source]
    return instruction.source or (inner[-1] if inner else "")


_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}


def _traffic(run: Run, named: Mapping[str, Mapping[str, Instruction]]) -> int:
    """Bytes that a kernel reads and writes that is no collective."""
    instruction, opcode = run.instruction, run.instruction.opcode
    if opcode in _NOTHING or opcode.removesuffix("-start").removesuffix("-done") in (*KINDS, "async"):
        return 0
    if opcode.endswith("-start"):
        return 0  # counted at its end, whose type is the result's alone
    if opcode.endswith("-done"):
        return 2 * size(instruction.type)  # a slice or a copy
    body = re.search(r"calls=%?([\w.-]+)", instruction.attributes)
    inside = named[body[1]] if body else {}
    written = size(re.sub(r"\b[su]8\[", "u0[", instruction.type) if opcode == "custom-call" else instruction.type)
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


# ----------------------------------------------------------------------------------------------------------- the table

_LABELS = {"": "other kernels", "float32": "products, float32", "tf32": "products and convolutions, TF32"}
_WRAPPERS = {"while", "body", "cond", "closed_call", "checkpoint", "eval_jaxpr", "shard_map", "rematted_computation"}


class Line(NamedTuple):
    """A class of kernels in a table.

    what: their kind, and the part of the model that they come from
    runs, flops, bytes, seconds: of all of them in one call
    """

    what: str
    runs: int
    flops: float
    bytes: int
    seconds: float


def table(found: Iterable[Kernel], sent: Iterable[Collective], rates: Rates, depth: int = 2) -> list[Line]:
    """A line for each kind of kernel in each part of the model, the longest first; collectives as if nothing hid them.

    depth: of how many names a part of the model is.
    """
    lines: dict[str, Line] = {}
    for each in found:
        kind = "copies and slices" if each.source.endswith("dynamic_slice") else _LABELS.get(each.kind, each.kind)
        what = f"{kind}: {_part(each.source, depth)}".removesuffix(": ")
        old = lines.get(what, Line(what, 0, 0.0, 0, 0.0))
        runs, flops, moved = (
            old.runs + each.runs,
            old.flops + each.runs * each.flops,
            old.bytes + each.runs * each.bytes,
        )
        lines[what] = Line(what, runs, flops, moved, old.seconds + each.seconds(rates))
    for kind, (runs, moved) in by_kind(sent).items():
        lines[kind] = Line(kind, runs, 0.0, moved, moved / rates.link + runs * rates.latency)
    return sorted(lines.values(), key=lambda line: -line.seconds)


def _part(source: str, depth: int) -> str:
    """The part of a model that an operation is in: "jit(f)/Model/while/body/blocks/ffn/up/add" -> "blocks/ffn"."""
    names = [name for name in source.split("/")[:-1] if re.fullmatch(r"[a-z_]\w*", name) and name not in _WRAPPERS]
    return "/".join(names[:depth])


def printed(lines: Sequence[Line], least: float = 0.005) -> Iterator[str]:
    """A table as text; lines of less than `least` of the time in one."""
    total = sum(line.seconds for line in lines)
    large = [line for line in lines if line.seconds >= least * total]
    rest = [line for line in lines if line.seconds < least * total]
    sums = lambda lines, what: Line(what, *(sum(column) for column in list(zip(*lines, strict=True))[1:]))  # noqa: E731
    yield f"{'kernels':<52}{'runs':>8}{'TFLOP':>10}{'GB':>9}{'ms':>9}{'share':>8}"
    for line in [*large, *([sums(rest, "the rest")] if rest else []), sums(lines, "sum")]:
        yield (
            f"{line.what:<52.51}{line.runs:>8}{line.flops / 1e12:>10.2f}{line.bytes / 1e9:>9.1f}"
            f"{line.seconds * 1e3:>9.2f}{line.seconds / total:>8.1%}"
        )


def stage(args: argparse.Namespace) -> tuple[str, float]:
    """(optimised HLO of a stage of a plan, share of dense attention that its pattern computes)."""
    import jax
    import jax.numpy as jnp

    from jvdiff import config as configs
    from jvdiff.sharding import read_mesh

    plan.check_target(args.target)
    config = configs.load(args.config)
    given = {"pattern": args.pattern, "vae_decode": args.vae_decode, "precision": "bfloat16"}
    config.update({name: value for name, value in given.items() if value} | {"plan_target": args.target})
    context, clip = plan.resolved(config)
    before = context.family.longest

    def longest(*request: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0], args.text_rows), x.dtype), before(*request))

    if args.text_rows:
        context = dataclasses.replace(context, family=dataclasses.replace(context.family, longest=longest))
    mesh: Any = read_mesh(args.mesh) if args.mesh else None
    pattern, dit, share = clip.segments[0].pattern, context.models.configs["transformer"], 1.0
    if hasattr(pattern, "share"):
        grid: Any = tuple(n // p for n, p in zip(clip.latents[:3], dit.patch_size, strict=True))
        q = jax.ShapeDtypeStruct((1, clip.tokens, dit.num_attention_heads, dit.attention_head_dim), jnp.bfloat16)
        share = pattern.share(q, grid, target=plan.described(args.target))
    return plan.stage_text(context, clip, args.stage, args.target, mesh), share


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="wan2_1_t2v_1_3b")
    parser.add_argument("--stage", default="denoise", help='as plans call it: "text", "decode next"')
    parser.add_argument("--target", choices=plan.known_targets(), default="h200", help="compiled for it, at its rates")
    parser.add_argument("--pattern", help="of the self-attention")
    parser.add_argument("--vae_decode", help="exact, tf32 or bf16")
    parser.add_argument("--text_rows", type=int, help="rows of text; default: as many as there can be")
    parser.add_argument("--mesh", help="such as sequence=4")
    parser.add_argument("--depth", type=int, default=2, help="of how many names a part of the model is")
    parser.add_argument("--hlo", type=Path, help="read this text instead of compiling a stage")
    words = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(words)
    if args.hlo:
        text, share = args.hlo.read_text(), 1.0
    else:
        if (status := plan.run_with_compiler(args.target, [__file__, *words])) is not None:
            return status
        text, share = stage(args)
        print(f"{args.config}, {args.stage}, {args.pattern or 'dense'} ({share:.3f} of dense), for {args.target}")
    for line in printed(table(kernels(text, share=share), read(text), RATES[args.target], args.depth)):
        print(line)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except JvdiffError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
