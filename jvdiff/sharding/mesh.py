"""The mesh: how many devices share what. Read from a config, checked in one sentence, built.

data       clips, and the two branches of guidance
fsdp       weights, gathered layer by layer; and clips, or tokens where the clips do not divide
sequence   video tokens
tensor     heads and feed-forward columns

A mesh of jax has an axis for each prime factor of these: fsdp=4 is "fsdp0" and "fsdp1", of two devices each. So what
divides the devices otherwise (8 of them into a ring of 2 by 4 that exchange heads, a picture into 2 by 2 tiles) takes
other axes of the same mesh. A second mesh over the same devices would do for XLA, but jax refuses it in a program with
cuDNN's attention; and two meshes whose axes do not refine each other XLA divides by nothing, without a word.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from jvdiff.errors import UsageError

AXES = ("data", "fsdp", "sequence", "tensor")  # neighbours, with the fastest links, talk most: they come last
_EXAMPLE = "for instance sequence=4,tensor=2, or auto"


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices on each axis; their product is the number of devices.

    data: share the clips.
    fsdp: share the weights, and the clips where these divide, else the tokens.
    sequence: share the tokens of a clip.
    tensor: share heads and feed-forward columns.
    ring: of the devices that share tokens, how many pass keys round a ring; the others exchange heads for tokens. A
        factor of their number. None: as few as the heads allow, see `Sizes.ring`. 1 never passes keys round: heads that
        do not divide are padded.
    """

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    ring: int | None = None

    @property
    def devices(self) -> int:
        return math.prod(getattr(self, axis) for axis in AXES)

    def __str__(self) -> str:
        sides = dataclasses.asdict(self).items()
        return ",".join(f"{name}={n}" for name, n in sides if n is not None and (n > 1 or name == "ring")) or "data=1"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a mesh must divide.

    batch: clips times guidance's branches.
    tokens: of one clip.
    heads: of the attention.
    ffn_dim: the feed-forward width.
    dense: whether every token sees every token, by an implementation of `jvdiff.kernels`; a ring serves nothing else.
    """

    batch: int
    tokens: int
    heads: int
    ffn_dim: int
    dense: bool = True

    def token_devices(self, shape: MeshShape) -> int:
        """How many devices share the tokens of one clip."""
        return shape.sequence * (1 if fsdp_takes_batch(shape, self.batch) else shape.fsdp)

    def problem(self, shape: MeshShape) -> str | None:
        """Why this mesh cannot run a model of these sizes, or None."""
        devices = self.token_devices(shape)
        if self.heads % shape.tensor:
            return f"tensor={shape.tensor} does not divide the {self.heads} attention heads"
        if self.ffn_dim % shape.tensor:
            return f"tensor={shape.tensor} does not divide the feed-forward width {self.ffn_dim}"
        if self.batch % shape.data:
            return f"data={shape.data} does not divide the batch of {self.batch} (clips times guidance's two branches)"
        if self.tokens < devices:
            return f"{devices} devices cannot share {self.tokens} video tokens"
        if shape.ring is not None and devices % shape.ring:
            return f"ring={shape.ring} does not divide the {devices} devices that share the tokens"
        if not self.dense and (shape.ring or 1) > 1:
            return f"ring={shape.ring} is for dense attention; sparse patterns and attention of your own exchange heads"
        return None

    def ring(self, shape: MeshShape) -> int:
        """How many of the devices that share tokens pass keys round.

        For dense attention the fewest that let the heads divide (12 heads on 8 devices: 2, and 4 exchange heads);
        sparse patterns have none, and pad their heads.
        """
        devices = self.token_devices(shape)
        if shape.ring is not None:
            return shape.ring
        return devices // math.gcd(devices, self.heads // shape.tensor) if self.dense else 1


def fsdp_takes_batch(shape: MeshShape, batch: int) -> bool:
    """Whether the devices of `fsdp` share the batch; otherwise they share the tokens."""
    return batch % (shape.data * shape.fsdp) == 0


def read_mesh(value: Any) -> MeshShape | str | None:
    """A config's `mesh`: None, "auto", a mapping, or text such as "sequence=4,tensor=2".

    Raises:
        UsageError: anything else.
    """
    if value is None or isinstance(value, MeshShape):
        return value
    if isinstance(value, str):
        if value.strip() == "auto":
            return "auto"
        pairs = [part.split("=") for part in re.split(r"[,\s]+", value.strip())]
        if not all(len(pair) == 2 and pair[1].isdecimal() for pair in pairs):
            raise UsageError(f"mesh is {value!r:.80}; expected axes and devices, {_EXAMPLE}.")
        value = {name: int(number) for name, number in pairs}
    names = [field.name for field in dataclasses.fields(MeshShape)]
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if not isinstance(value, Mapping):
        raise UsageError(f"mesh is {value!r:.80}; expected axes and devices, {_EXAMPLE}.")
    for name, number in value.items():
        if name not in names:
            raise UsageError(f"mesh has an axis {name!r:.80}; expected some of {', '.join(names)}, {_EXAMPLE}.")
        if number is None and name == "ring":
            continue
        if type(number) is not int or not 1 <= number <= 2**16:
            raise UsageError(f"mesh has {name}={number!r:.80}; expected a whole number of devices from 1.")
    return MeshShape(**value)


def check_mesh(shape: MeshShape, sizes: Sizes, devices: int, *, exactly: bool = False) -> None:
    """Checks that `devices` devices can run a model of these sizes under this mesh; needs neither weights nor devices.

    exactly: every device must have its place (several processes: each has some).

    Raises:
        UsageError: they cannot; the sentence names the nearest mesh that can.
    """
    reason = sizes.problem(shape)
    if shape.devices > devices or (exactly and shape.devices < devices):
        reason = f"it has {shape.devices} devices, and there are {devices}"
    if reason is not None:
        near = nearest(shape, sizes, devices, exactly=exactly)
        advice = f"The nearest mesh that works is {near}." if near else "No mesh of these devices works."
        raise UsageError(f"mesh {shape}: {reason}.\n{advice}")


def nearest(shape: MeshShape, sizes: Sizes, devices: int, *, exactly: bool = False) -> MeshShape | None:
    """The working mesh whose axes differ least from `shape`, in halvings and doublings; the larger one on ties."""

    def distance(other: MeshShape) -> tuple[float, float, float]:
        steps = [abs(math.log2(getattr(other, axis) / getattr(shape, axis))) for axis in AXES]
        return abs(math.log2(other.devices / min(shape.devices, devices))), sum(steps), -other.devices

    rings = {None, shape.ring}
    every = (MeshShape(*sides, ring=ring) for sides in _splits(devices, len(AXES)) for ring in rings)
    able = [m for m in every if sizes.problem(m) is None and (m.devices == devices or not exactly)]
    return min(able, key=distance, default=None)


def _splits(most: int, axes: int) -> Iterator[tuple[int, ...]]:
    """Every way to give each of `axes` a number of devices, their product at most `most`."""
    if axes == 0:
        yield ()
        return
    for first in range(1, most + 1):
        yield from ((first, *rest) for rest in _splits(most // first, axes - 1))


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the first `shape.devices` devices (of all processes), an axis for each prime factor of `AXES` in turn.

    Raises:
        UsageError: there are fewer.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < shape.devices:
        raise UsageError(f"mesh {shape}: it has {shape.devices} devices, and there are {len(devices)}.")
    sides = {f"{name}{i}": n for name in AXES for i, n in enumerate(_primes(getattr(shape, name)))} or {"one": 1}
    grid = np.array(devices[: shape.devices]).reshape(tuple(sides.values()))  # [data..,fsdp..,sequence..,tensor..]
    return Mesh(grid, tuple(sides), axis_types=(AxisType.Auto,) * len(sides))


def _primes(number: int) -> list[int]:
    factor = next((n for n in range(2, number + 1) if number % n == 0), None)
    return [] if factor is None else [factor, *_primes(number // factor)]


def axes_of(mesh: Mesh, name: str) -> tuple[str, ...]:
    """The axes of a mesh of `make_mesh` that one of `AXES` stands for; () where it has one device."""
    return tuple(axis for axis in mesh.axis_names if axis.rstrip("0123456789") == name)


def spec_on(mesh: Mesh, spec: PartitionSpec) -> PartitionSpec:
    """A spec that speaks of `AXES`, by the axes of a mesh of `make_mesh`."""

    def entry(names: Any) -> Any:
        names = names if isinstance(names, tuple) else (names,)
        return sum((axes_of(mesh, name) for name in names if name), ()) or None

    return PartitionSpec(*map(entry, spec))


def shape_of(mesh: Mesh, ring: int | None = None) -> MeshShape:
    """The shape that `make_mesh` made a mesh of."""
    sizes = {name: math.prod(mesh.shape[axis] for axis in axes_of(mesh, name)) for name in AXES}
    return MeshShape(**sizes, ring=ring)
