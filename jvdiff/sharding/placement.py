"""What a model is told about the mesh: where its activations live, and when it needs a layer's weights whole.

B batch · L video tokens · N heads · K head dim · T latent frames · H W latent grid · C channels.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jvdiff.sharding import rules as tables
from jvdiff.sharding.mesh import MeshShape, Sizes, fsdp_takes_batch, shape_of
from jvdiff.types import Array, Params

P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh with the axes of `AXES`, and how many devices pass keys round (`MeshShape.ring`). Static under jit."""

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
        outer = (
            {stack: jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), params)} if stack else params
        )
        found: Any = tables.specs(rules, outer, self.mesh.shape)
        leaves, structure = jax.tree.flatten(params)
        specs = jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, P))
        specs = [P(*spec[1:]) if stack else spec for spec in specs]
        for dtype in {x.dtype for x in leaves}:
            own = [i for i, x in enumerate(leaves) if x.dtype == dtype and "fsdp" in specs[i]]
            if own:
                gathered: Any = _gathered(self.mesh, tuple(specs[i] for i in own), tuple(leaves[i] for i in own))
                for i, x in zip(own, gathered, strict=True):
                    leaves[i] = x
        return jax.tree.unflatten(structure, leaves)

    def split(self, sizes: Sizes) -> Split:
        """How the activations of a batch of these sizes are divided."""
        shape = self.shape
        ring, tokens = sizes.ring(shape), sizes.token_devices(shape)
        batch = shape.devices // tokens // shape.tensor
        # data, fsdp, sequence, tensor -> batch, tokens, tensor: the same devices in the same order
        assert fsdp_takes_batch(shape, sizes.batch) or batch == shape.data
        devices = self.mesh.devices.reshape(batch, ring, tokens // ring, shape.tensor)
        names = ("batch", "ring", "heads", "tensor")
        return Split(Mesh(devices, names, axis_types=(AxisType.Auto,) * 4), sizes.tokens)


@dataclasses.dataclass(frozen=True)
class Split:
    """The devices once more, as the activations of one forward pass are divided among them.

    mesh: axes batch, ring, heads (ring times heads devices share the tokens), tensor. tokens: L, unpadded.
    """

    mesh: Mesh
    tokens: int

    TOKENS = ("ring", "heads")

    @property
    def padding(self) -> int:
        """Tokens to add so that every device has as many."""
        return -self.tokens % (self.mesh.shape["ring"] * self.mesh.shape["heads"])

    def constrain(self, x: Array, *axes: Any) -> Array:
        """x divided as `axes` say, one for each of its axes; further ones are whole."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*axes)))

    def along_tokens(self, x: Array) -> Array:
        """Activations [B,L,...], L padded."""
        return self.constrain(x, "batch", self.TOKENS)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(mesh: Mesh, specs: tuple[PartitionSpec, ...], shards: tuple[Array, ...]) -> tuple[Array, ...]:
    """Arrays of one dtype, divided as `specs` say, whole along `fsdp`: one all-gather, however many they are."""

    def gather(*shards: Array) -> tuple[Array, ...]:
        every = jax.lax.all_gather(jnp.concatenate([x.reshape(-1) for x in shards]), "fsdp")
        out, start = [], 0
        for x, spec in zip(shards, specs, strict=True):
            axis = spec.index("fsdp")
            part = every[:, start : start + x.size].reshape(-1, *x.shape)
            out.append(jnp.moveaxis(part, 0, axis).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :]))
            start += x.size
        return tuple(out)

    out = tuple(P(*(None if axis == "fsdp" else axis for axis in spec)) for spec in specs)
    return jax.shard_map(gather, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*shards)


def _gathered_backward(mesh: Mesh, specs: tuple[PartitionSpec, ...], _: None, grads: tuple[Array, ...]) -> Any:
    """Each device keeps its shard of the gradients' sum, which the partitioner makes a reduce-scatter."""
    pairs = zip(grads, specs, strict=True)
    return (tuple(jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)) for x, spec in pairs),)


_gathered.defvjp(lambda mesh, specs, shards: (_gathered(mesh, specs, shards), None), _gathered_backward)
