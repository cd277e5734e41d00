"""The command line that finds out how the kernels of sparse attention are best cut for the GPU at hand.

    jvdiff tune                      three minutes on one GPU; what it finds is used from then on
    jvdiff tune --only="STA 6x8x8"
    jvdiff tune --target=h200        no GPU: which cuts compile, and what each takes

Exit status: 0 done, or out of time with something found · 2 usage · 7 no GPU that has such kernels, or nothing found.
"""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jvdiff import config as configs
from jvdiff.commands import arguments, command_line, options
from jvdiff.commands.arguments import Command, Section
from jvdiff.errors import SetupError, UsageError
from jvdiff.runtime import records, verdict
from jvdiff.runtime.files import atomic

COMMAND = Command(
    name="tune",
    about="the fastest cut of the kernels of sparse attention on this GPU",
    examples=("", '--only="STA 6x8x8" --seconds=60', "--target=h200"),
    sections=lambda config, flags: [Section(str(options.Tune.__doc__), configs.options(options.Tune))],
)
GRACE = 5.0  # seconds behind the end, before a kernel that does not end is left


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; errors are sentences on stderr."""
    words = list(sys.argv if argv is None else argv)
    return command_line.ended(lambda: _tune(words), words)


def _tune(words: Sequence[str]) -> int | None:
    values = arguments.values(COMMAND, words)
    if values["target"] is not None:
        from jvdiff.plan import resources
        from jvdiff.plan.targets import check_target, run_with_compiler

        resources.ask()
        if (status := run_with_compiler(values["target"], ["-m", "jvdiff", "tune", *words[1:]])) is not None:
            return status
        check_target(values["target"])
    from jvdiff.kernels import block_sparse, tuning
    from jvdiff.kernels.block_sparse import cuts
    from jvdiff.runtime.target import here

    chosen = [case for case in tuning.CASES if values["only"] in str(case)]
    if not chosen:
        known = "; ".join(map(str, tuning.CASES))
        raise UsageError(f"--only={values['only']!r:.80} is in none of: {known}.")
    if values["target"] is not None:
        for line in _compiled(values["target"], chosen):
            print(line, flush=True)
        return None
    target = here()
    able = (n for n in ("mosaic_gpu", "triton") if not block_sparse.IMPLEMENTATIONS[n].unavailable(target))
    if (name := next(able, None)) is None:
        raise SetupError(
            f"tuning needs an NVIDIA GPU of compute capability 8.0 or later, and this is {target.kind}.\n"
            "Without one, jvdiff tune --target=h200 compiles every cut."
        )
    _measured(name, target, chosen, values["seconds"], values["output"] or cuts.path())
    return None


def _measured(name: str, target: Any, chosen: Sequence[Any], seconds: float, path: Path) -> None:
    """Times the cuts, prints a line for each, and writes the best ones after each case."""
    from jvdiff.kernels import tuning
    from jvdiff.kernels.block_sparse import cuts

    found: dict[Any, Any] = {}
    before = records.read(path) if path.is_file() else {}
    doing = [str(chosen[0])]

    def leave() -> None:
        told = f"{path} has what was found before" if found else "nothing was found"
        verdict.end_now(0 if found else SetupError.exit_code, f"out of time at {doing[0]}; {told}.")

    watch = threading.Timer(seconds + GRACE, leave)  # a kernel that never ends ends the process
    watch.daemon = True
    watch.start()
    print(f"{target.kind}, {name}: {seconds} s at most; ms of one run, of the cut that ships first")
    try:
        for number, (rows, best) in enumerate(tuning.tune(name, target, chosen, seconds - GRACE)):
            found |= best
            for row in rows:
                print(f"{row.case!s:<40}{_cut(row.cut):<34}{_told(row)}", flush=True)
            with atomic(path) as part:
                part.write_text(json.dumps(cuts.merged(before, cuts.table(found)), indent=2) + "\n")
            doing[0] = str(chosen[min(number + 1, len(chosen) - 1)])
    finally:
        watch.cancel()
    if not found:
        raise SetupError(f"{name}: no cut ran; the lines above say why.")
    for (_, _, block, head_dim, kernel), cut in found.items():
        print(f"best, blocks of {block}, head dim {head_dim}, {kernel}: {_cut(cut)}")
    print(path)


def _told(row: Any) -> str:
    return (
        f"left out: {row.problem}" if row.problem else f"{row.seconds * 1e3:9.3f} ms   differs by {row.difference:.0e}"
    )


def _cut(cut: Any) -> str:
    """All its numbers: "warpgroups 2, step 128, ..." would not fit on a line."""
    return " ".join(f"{name}={int(value)}" for name, value in cut._asdict().items()).replace("warpgroups", "wg")


def _compiled(target: str, chosen: Sequence[Any]) -> Iterator[str]:
    """A line for each cut: registers, spills, shared memory and CTAs on an SM, or why it does not compile."""
    from jvdiff import plan
    from jvdiff.kernels import block_sparse, tuning
    from jvdiff.plan import resources

    with resources.printed():  # the compiler's greeting
        placement = plan.target_placement(target)
    gpu = placement.target
    name = "triton" if block_sparse.IMPLEMENTATIONS["mosaic_gpu"].unavailable(gpu) else "mosaic_gpu"
    yield f"{gpu.kind}, {name}: no GPU, nothing is timed"
    yield f"{'':<40}{'':<34}{'registers':>10}{'spills':>8}{'shared memory':>15}{'CTAs':>6}"
    seen = set()
    for case in chosen:
        shape = tuning.shape_of(case, name, gpu)
        if (shape.block, case.kernel) in seen:
            continue
        seen.add((shape.block, case.kernel))
        for cut in tuning.candidates(name, case.kernel, shape.block, gpu.kind):
            yield f"{case!s:<40}{_cut(cut):<34}{_resources(target, placement, name, shape, case.kernel, cut)}"


def _resources(target: str, placement: Any, name: str, shape: Any, kernel: str, cut: Any) -> str:
    import jax

    from jvdiff import plan
    from jvdiff.kernels import tuning
    from jvdiff.plan import resources

    gpu = placement.target
    like = tuning.arguments(shape, kernel)
    there = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement.everywhere) for x in like]
    try:
        with resources.printed() as log:
            plan.compile_for(placement, tuning.program(name, shape, kernel, cut, gpu), *there)
    except Exception as error:  # whatever compilers raise; the other cuts are compiled all the same
        return f"does not compile: {(str(error).strip().splitlines() or [type(error).__name__])[0]:.160}"
    took = resources.read_log(log[0], [kernel])[kernel]
    threads = 128 * (cut.warpgroups + cut.producer) if name == "mosaic_gpu" else 32 * cut.warps
    fit = resources.ctas(target, threads=threads, **took)
    memory = math.ceil(took["shared_memory"] / 1000)
    return f"{took['registers']:>10}{took['spills']:>8}{memory:>12} kB{fit:>6}"


if __name__ == "__main__":
    sys.exit(main())
