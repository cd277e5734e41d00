"""What a model is told about the mesh: where its activations live, and when it needs a layer's weights whole.

B batch · L video tokens · N heads · K head dim · T latent frames · H W latent grid · C channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
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
        """The same weights, gathered over `fsdp` and still divided over `tensor`.

        stack: the weights are those of one layer of this stack ("blocks"), taken out of its axis 0.
        """
        if self.mesh.shape["fsdp"] == 1:
            return params
        outer = (
            {stack: jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), params)} if stack else params
        )
        found: Any = tables.specs(rules, outer, {**self.mesh.shape, "fsdp": 1})

        def gather(x: Array, spec: PartitionSpec) -> Array:
            one_layer = spec[1:] if stack else spec
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*one_layer)))

        return jax.tree.map(gather, params, found[stack] if stack else found)

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
