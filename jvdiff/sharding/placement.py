"""What a model is told about the mesh: where its activations live, and when it needs a layer's weights whole.

B batch · L video tokens · N heads · K head dim · T latent frames · H W latent grid · C channels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jvdiff.kernels.linear import linear
from jvdiff.sharding import rules as tables
from jvdiff.sharding.mesh import MeshShape, Sizes, check_mesh, shape_of
from jvdiff.types import Array, Params

P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a model works. Static under jit.

    mesh: with the axes of `AXES`.
    ring: how many devices pass keys round, see `MeshShape`.
    """

    mesh: Mesh
    ring: int | None = None

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
        if self.mesh.shape["fsdp"] == 1:
            return params
        tree: Any = params
        if stack:
            tree = {stack: jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), params)}
        places = tables.specs(rules, tree, self.mesh.shape)
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
        ring, tokens = sizes.ring(shape), sizes.token_devices(shape)
        batch = shape.devices // tokens // shape.tensor
        # data, fsdp, sequence, tensor -> batch, tokens, tensor: the same devices in the same order
        mesh, axes = _cut(self.mesh, batch=batch, ring=ring, heads=tokens // ring, tensor=shape.tensor)
        return Split(mesh, tokens=sizes.tokens, **axes)

    def spread(self, height: int, width: int) -> Picture:
        """How pictures [B,T,H,W,C], and whatever the VAE remembers of them, are divided among all devices of the mesh.

        height, width: of the grid of latents. The largest number of devices that divides it shares it, whatever the
            axes of `mesh`. Strips come before tiles: neighbours exchange half as many messages, which cost more than
            their bytes.
        """
        devices = self.mesh.size
        able = (
            (h, w)
            for h in range(1, devices + 1)
            for w in range(1, devices // h + 1)
            if devices % (h * w) == 0 and height % h == 0 and width % w == 0
        )

        def cost(cut: tuple[int, int]) -> tuple[int, int, int]:
            h, w = cut
            return -h * w, (h > 1) + (w > 1), (h > 1) * width // w + (w > 1) * height // h

        h, w = min(able, key=cost)
        mesh, axes = _cut(self.mesh, height=h, width=w, copies=devices // (h * w))
        return Picture(mesh, axes["height"], axes["width"])


Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Picture:
    """The devices once more, as they share a picture.

    mesh: of the same devices, with axes for this division.
    height, width: the axes of `mesh` that divide it.
    """

    mesh: Mesh
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
    """The devices once more, as the activations of one forward pass are divided among them.

    mesh: of the same devices, with axes for this division.
    batch: the axes of `mesh` that divide the clips.
    ring, heads: those that divide the tokens, to pass keys round and to exchange heads for tokens.
    tensor: those that divide heads and feed-forward columns.
    tokens: L, unpadded.
    """

    mesh: Mesh
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
        """Tokens to add so that every device has the same number."""
        return -self.tokens % self.devices(self.ring + self.heads)

    def constrain(self, x: Array, *axes: Any) -> Array:
        """x divided as `axes` say, one for each of its axes; further ones are whole."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*axes)))

    def along_tokens(self, x: Array) -> Array:
        """Activations [B,L,...], L padded."""
        return self.constrain(x, self.batch, self.ring + self.heads)


def _cut(mesh: Mesh, **sizes: int) -> tuple[Mesh, dict[str, Axes]]:
    """The devices of a mesh in the same order, divided otherwise: a mesh, and which of its axes each name stands for.

    Every axis has a prime number of devices. XLA's partitioner brings two meshes of one program together only where the
    axes of one are made of those of the other, and otherwise (4 by 2 and 2 by 4) divides nothing, without a word.
    """
    factors = {name: {f"{name}{i}": n for i, n in enumerate(_primes(size))} for name, size in sizes.items()}
    each = {axis: n for group in factors.values() for axis, n in group.items()} or {"one": 1}
    devices = mesh.devices.reshape(tuple(each.values()))  # the same order, an axis for each prime
    cut = Mesh(devices, tuple(each), axis_types=(AxisType.Auto,) * len(each))
    return cut, {name: tuple(group) for name, group in factors.items()}


def _primes(number: int) -> list[int]:
    factor = next((n for n in range(2, number + 1) if number % n == 0), None)
    return [] if factor is None else [factor, *_primes(number // factor)]


def _gathered(mesh: Mesh, specs: tuple[PartitionSpec, ...], shards: tuple[Array, ...]) -> tuple[Array, ...]:
    """Arrays of one dtype, divided as `specs` say, whole along `fsdp`: one all-gather, however many they are."""

    def gather(*shards: Array) -> tuple[Array, ...]:
        every = jax.lax.all_gather(jnp.concatenate([x.reshape(-1) for x in shards]), "fsdp")  # [fsdp,elements]
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
        pairs = zip(grads, specs, strict=True)
        return [jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)) for x, spec in pairs]

    out = tuple(P(*(None if axis == "fsdp" else axis for axis in spec)) for spec in specs)
    run = jax.shard_map(gather, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return linear(lambda _, *shards: run(*shards), scatter, (), shards, shards)
