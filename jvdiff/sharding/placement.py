"""What a model is told about the mesh: where its activations live, and when it needs a layer's weights whole.

B batch · L video tokens · N heads · K head dim · T latent frames · H W latent grid · C channels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvdiff.kernels.linear import linear
from jvdiff.runtime import target as targets
from jvdiff.runtime.target import Target
from jvdiff.sharding import rules as tables
from jvdiff.sharding.mesh import AXES, MeshShape, Sizes, axes_of, check_mesh, fsdp_takes_batch, shape_of, spec_on
from jvdiff.types import Array, Params

P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a model works. Static under jit.

    mesh: of `make_mesh`.
    ring: how many devices pass keys round, see `MeshShape`.
    described: what programs are made for, where the devices are not there; None: what the mesh's devices are.
    """

    mesh: Mesh
    ring: int | None = None
    described: Target | None = None

    @property
    def target(self) -> Target:
        """What programs on this mesh are made for."""
        return self.described or targets.of(list(self.mesh.devices.flat))

    @property
    def shape(self) -> MeshShape:
        """Devices on each axis."""
        return shape_of(self.mesh, self.ring)

    @property
    def everywhere(self) -> NamedSharding:
        """Every device has a copy."""
        return NamedSharding(self.mesh, P())

    def replicate(self, tree: Any) -> Any:
        """The same values, a copy on every device."""
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self.everywhere), tree)

    def whole(self, params: Params, rules: tables.Rules, stack: str | None = None) -> Any:
        """The same weights, gathered over `fsdp` (all of one dtype at once) and still divided over `tensor`.

        stack: the weights are those of one layer of this stack ("blocks"), taken out of its axis 0.
        """
        shape = self.shape
        if shape.fsdp == 1:
            return params
        tree: Any = params
        if stack:
            tree = {stack: jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), params)}
        places = tables.specs(rules, tree, dataclasses.asdict(shape))
        leaves, structure = jax.tree.flatten(params)
        specs = jax.tree.leaves(places, is_leaf=lambda x: isinstance(x, P))
        specs = [P(*spec[1:]) if stack else spec for spec in specs]
        for dtype in sorted({x.dtype.name for x in leaves}):  # the same order in every process
            numbers = [i for i, x in enumerate(leaves) if x.dtype.name == dtype and "fsdp" in specs[i]]
            if numbers:
                divided = tuple(leaves[i] for i in numbers)
                gathered: Any = _gathered(self.mesh, tuple(specs[i] for i in numbers), divided)
                for i, x in zip(numbers, gathered, strict=True):
                    leaves[i] = x
        return jax.tree.unflatten(structure, leaves)

    def split(self, sizes: Sizes) -> Split:
        """How the activations of a batch of these sizes are divided.

        Raises:
            UsageError: this mesh cannot run such a model; the sentence names the nearest that can.
        """
        shape = self.shape
        check_mesh(shape, sizes, shape.devices)
        sides = {name: axes_of(self.mesh, name) for name in AXES}
        batch, tokens = sides["data"], sides["sequence"]
        if fsdp_takes_batch(shape, sizes.batch):
            batch += sides["fsdp"]
        else:
            tokens = sides["fsdp"] + tokens
        ring, heads = _shared(self.mesh, tokens, sizes.ring(shape))
        return Split(self.mesh, self.target, batch, ring, heads, sides["tensor"], sizes.tokens)

    def spread(self, height: int, width: int) -> Picture:
        """How pictures [B,T,H,W,C], and whatever the VAE remembers of them, are divided among all devices of the mesh.

        height, width: of the grid of latents. The largest number of devices that divides it shares it, whatever the
            axes of `mesh`, but none has a single cell of several, whose convolutions XLA computes wrongly. Strips come
            before tiles: neighbours exchange half as many messages, which cost more than their bytes.
        """
        devices = self.mesh.size
        able = (
            (h, w)
            for h in range(1, devices + 1)
            for w in range(1, devices // h + 1)
            if devices % (h * w) == 0 and height % h == 0 and width % w == 0
            if h * w == 1 or height * width > h * w
        )

        def cost(cut: tuple[int, int]) -> tuple[int, int, int]:
            h, w = cut
            return -h * w, (h > 1) + (w > 1), (h > 1) * width // w + (w > 1) * height // h

        h, w = min(able, key=cost)
        rows, rest = _shared(self.mesh, self.mesh.axis_names, h)
        return Picture(self.mesh, self.target, rows, _shared(self.mesh, rest, w)[0])


Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Picture:
    """How the devices share a picture.

    mesh, target: the placement's.
    height, width: the axes of `mesh` that divide it.
    """

    mesh: Mesh
    target: Target
    height: Axes
    width: Axes

    @property
    def spec(self) -> PartitionSpec:
        """How [B,T,H,W,C] is divided."""
        return P(None, None, self.height, self.width)

    @property
    def sharding(self) -> NamedSharding:
        """Where [B,T,H,W,C] lives."""
        return NamedSharding(self.mesh, self.spec)

    def divide(self, tree: Any) -> Any:
        """The same pictures [B,T,H,W,C], a part of each on every device."""
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self.sharding), tree)


@dataclasses.dataclass(frozen=True)
class Split:
    """How the activations of one forward pass are divided among the devices.

    mesh, target: the placement's.
    batch: the axes of `mesh` that divide the clips.
    ring, heads: those that divide the tokens, to pass keys round and to exchange heads for tokens.
    tensor: those that divide heads and feed-forward columns.
    tokens: L, unpadded.
    """

    mesh: Mesh
    target: Target
    batch: Axes
    ring: Axes
    heads: Axes
    tensor: Axes
    tokens: int

    def devices(self, axes: Axes) -> int:
        """How many there are along some axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def padding(self) -> int:
        """Tokens to add so that every device has the same number, and products rows that a GPU does not pad."""
        devices = self.devices(self.ring + self.heads)
        return 0 if devices == 1 else -self.tokens % (devices * self.target.rows)

    def constrain(self, x: Array, *axes: Any) -> Array:
        """x divided as `axes` say, one for each of its axes; further ones are whole."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*axes)))

    def along_tokens(self, x: Array) -> Array:
        """Activations [B,L,...], L padded."""
        return self.constrain(x, self.batch, self.ring + self.heads)


def _shared(mesh: Mesh, axes: Axes, size: int) -> tuple[Axes, Axes]:
    """Of these axes, each of a prime number of devices, the first that make `size` together; and the others."""
    taken: list[str] = []
    for axis in axes:
        if size % mesh.shape[axis] == 0:
            taken.append(axis)
            size //= mesh.shape[axis]
    return tuple(taken), tuple(axis for axis in axes if axis not in taken)


def _gathered(mesh: Mesh, specs: tuple[PartitionSpec, ...], shards: tuple[Array, ...]) -> tuple[Array, ...]:
    """Arrays of one dtype, divided as `specs` say, whole along `fsdp`: one all-gather, however many they are.

    specs: they speak of `AXES`.
    """
    fsdp = axes_of(mesh, "fsdp")

    def gather(*shards: Array) -> tuple[Array, ...]:
        every = jax.lax.all_gather(jnp.concatenate([x.reshape(-1) for x in shards]), fsdp)  # [fsdp,elements]
        out, start = [], 0
        for x, spec in zip(shards, specs, strict=True):
            axis = spec.index("fsdp")
            part = every[:, start : start + x.size].reshape(-1, *x.shape)  # [fsdp,..,shard,..]
            part = jnp.moveaxis(part, 0, axis)  # [..,fsdp,shard,..]
            out.append(part.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :]))  # [..,whole,..]
            start += x.size
        return tuple(out)

    def scatter(_: tuple[()], *grads: Array) -> list[Array]:
        """Each device keeps its shard of the gradients' sum, which the partitioner makes a reduce-scatter."""
        pairs = zip(grads, places, strict=True)
        return [jax.lax.with_sharding_constraint(x, NamedSharding(mesh, place)) for x, place in pairs]

    whole = (P(*(None if axis == "fsdp" else axis for axis in spec)) for spec in specs)
    places, out = (tuple(spec_on(mesh, spec) for spec in every) for every in (specs, whole))
    run = jax.shard_map(gather, mesh=mesh, in_specs=places, out_specs=out, check_vma=False)
    return linear(lambda _, *shards: run(*shards), scatter, (), shards, shards)
