"""The command line that says where weights would live: bytes of each component on one device of a mesh.

    jvdiff sharding --config wan2_1_t2v_14b --mesh=fsdp=2,sequence=4
    jvdiff sharding --config wan2_1_t2v_14b --mesh=tensor=8 --leaves

It reads no weights, and the mesh's devices need not exist. --leaves adds a line for each leaf: its path, shape, dtype,
PartitionSpec and bytes. Exit status: 0 done · 2 usage · 3 checkpoint · 1 anything else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from jvdiff import config as configs
from jvdiff.commands import command_line, options, sample
from jvdiff.commands.arguments import Section
from jvdiff.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; errors are sentences on stderr."""

    def work(request: command_line.Request) -> tuple[()]:
        for line in lines(request.config, request.config.get("leaves", False)):
            print(line)
        return ()

    return command_line.main(argv, lambda words: sample.parse(words, COMMAND), work, "output")


def _default_config() -> ConfigDict:
    config = sample.default_config()
    config.update(configs.fields(options.Sharding))
    return config


COMMAND = dataclasses.replace(
    sample.COMMAND,
    name="sharding",
    about="where weights would live: bytes of each component on one device of a mesh",
    examples=("--config wan2_1_t2v_14b --mesh=fsdp=2,sequence=4", "--config wan2_1_t2v_14b --mesh=tensor=8 --leaves"),
    sections=lambda config, flags: [
        Section(str(options.Sharding.__doc__), configs.options(options.Sharding)),
        *sample.sections(config, flags),
    ],
    fresh=_default_config,
)


def lines(config: Any, each: bool = False) -> Iterator[str]:
    """What the command line prints for a sampling config; each: every leaf too.

    Raises:
        UsageError: there is no mesh, or one that cannot run this model.
    """
    from jvdiff import pipeline, plan
    from jvdiff.sharding import MeshShape, check_mesh, read_mesh

    shape = read_mesh(config.mesh)
    if not isinstance(shape, MeshShape):
        found = "missing" if shape is None else repr(shape)
        raise UsageError(f"mesh is {found}; name its axes, for instance --mesh=fsdp=2,sequence=4.")
    context, clip = plan.resolved(config)
    family = context.family
    check_mesh(shape, family.mesh_sizes(context.models, clip, 1, shape), shape.devices)
    yield f"mesh: {shape}, {shape.devices} devices   precision: {context.precision.name}"
    yield f"{'':<14}{'bytes of all':>18}{'of one device':>18}{'share':>8}"
    total = [0, 0]
    for part, tree in pipeline.abstract_params(family, context.models, context.precision).items():
        rows = list(plan.leaves(tree, family.parts[part].places, shape))
        sizes = [sum(leaf.size * leaf.dtype.itemsize for _, leaf, _, _ in rows), sum(size for *_, size in rows)]
        yield _line(part, *sizes)
        total = [a + b for a, b in zip(total, sizes, strict=True)]
        if each:
            for path, leaf, spec, size in rows:
                axes = ", ".join(str(axis or "-") for axis in spec) or "on every device"
                yield f"  {path:<42}{f'{leaf.dtype.name}{list(leaf.shape)}':>30}{size:>16,}   {axes}"
    yield _line("in all", *total)


def _line(name: str, whole: int, one: int) -> str:
    return f"{name:<14}{whole:>18,}{one:>18,}{one / whole:>8.1%}"
