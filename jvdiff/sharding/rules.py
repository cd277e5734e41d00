"""Where weights live: tables of (regex, PartitionSpec) over the parameter trees, and what `fsdp` adds to them.

A pattern is matched with the end of a leaf's path ("blocks/ffn/up/kernel"), so that a table serves the parameters,
their moving average and the optimiser's moments alike. Tables speak of the axis `tensor` alone: column-parallel layers
(their outputs divided) feed row-parallel ones (their inputs divided), whose partial sums are added up once. `fsdp`
takes the largest axis of a leaf that it divides, whatever the table says of the others.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvdiff.types import Params

P = PartitionSpec
Rules = Sequence[tuple[str, PartitionSpec]]
SMALL = 2**15  # elements; what is smaller is not worth a gather of its own

# `blocks` and `layers` are stacked: axis 0 is the layer, and is never divided.
WAN_DIT: Rules = (
    (r"blocks/(self|cross)_attn/(q|k|v|gate)/kernel", P(None, None, "tensor")),
    (r"blocks/(self|cross)_attn/(q|k|v|gate)/bias", P(None, "tensor")),
    (r"blocks/(self|cross)_attn/(q|k)_norm/scale", P(None, "tensor")),
    (r"blocks/(self|cross)_attn/out/kernel", P(None, "tensor")),
    (r"blocks/ffn/up/kernel", P(None, None, "tensor")),
    (r"blocks/ffn/up/bias", P(None, "tensor")),
    (r"blocks/ffn/down/kernel", P(None, "tensor")),
    (r"blocks/((self|cross)_attn/out|ffn/down)/bias", P()),
    (r"blocks/(cross_norm/(scale|bias)|modulation)", P()),
    (r"(time|text)_embed/linear_1/kernel", P(None, "tensor")),
    (r"(time|text)_embed/linear_1/bias", P("tensor")),
    (r"(time|text)_embed/linear_2/kernel", P("tensor")),
    (r"(time|text)_embed/linear_2/bias", P()),
    (r"time_proj/kernel", P(None, "tensor")),
    (r"time_proj/bias", P("tensor")),
    (r"patch_embed/(kernel|bias)|head/(modulation|proj/(kernel|bias))", P()),
)

LATENT_VIDEO_DIT: Rules = (
    (r"blocks/(spatial|temporal)_attn/(q|k|v)/kernel", P(None, None, "tensor")),
    (r"blocks/(spatial|temporal)_attn/(q|k|v)/bias", P(None, "tensor")),
    (r"blocks/(spatial|temporal)_attn/out/kernel", P(None, "tensor")),
    (r"blocks/ffn/(gate|up)/kernel", P(None, None, "tensor")),
    (r"blocks/ffn/(gate|up)/bias", P(None, "tensor")),
    (r"blocks/ffn/down/kernel", P(None, "tensor")),
    (r"blocks/modulation/kernel", P(None, None, "tensor")),
    (r"blocks/modulation/bias", P(None, "tensor")),
    (r"blocks/((spatial|temporal)_attn/(out/bias|(q|k)_norm/scale)|ffn/down/bias)", P()),
    (r"time_embed/linear_1/kernel", P(None, "tensor")),
    (r"time_embed/linear_1/bias", P("tensor")),
    (r"time_embed/linear_2/kernel", P("tensor")),
    (r"time_embed/linear_2/bias", P()),
    (r"label_embed/embedding|(patch_embed|head_modulation|head)/(kernel|bias)", P()),
)

UMT5: Rules = (
    (r"layers/attn/(q|k|v)/kernel", P(None, None, "tensor")),
    (r"layers/attn/out/kernel", P(None, "tensor")),
    (r"layers/attn/relative_bias/embedding", P(None, None, "tensor")),
    (r"layers/ffn/(gate|up)/kernel", P(None, None, "tensor")),
    (r"layers/ffn/down/kernel", P(None, "tensor")),
    (r"layers/(attn|ffn)/norm/scale|final_norm/scale", P()),
    (r"token_embed/embedding", P(None, "tensor")),
)

REPLICATED: Rules = ((r".*", P()),)  # the VAE: small, and spread over space instead

_STACKED = ("blocks", "layers")


def specs(rules: Rules, tree: Params, axes: Mapping[str, int]) -> Any:
    """The PartitionSpec of every leaf of a tree of arrays or ShapeDtypeStructs; scalars are on every device.

    axes: devices on each axis of the mesh. What `tensor` does not divide stays whole, which only a small text encoder
    meets: a transformer is checked by its heads.

    Raises:
        LookupError: no rule is about a leaf.
    """

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.ndim == 0:
            return P()
        found = next((spec for pattern, spec in rules if re.search(rf"(^|/)({pattern})$", name)), None)
        if found is None:
            raise LookupError(f"no sharding rule is about the leaf {name!r} {list(leaf.shape)}")
        if rules is REPLICATED:
            return found
        fits = (
            axis if axis and size % axes[axis] == 0 else None for axis, size in zip(found, leaf.shape, strict=False)
        )
        return _with_fsdp(P(*fits), leaf.shape, axes["fsdp"], any(part in _STACKED for part in name.split("/")))

    return jax.tree_util.tree_map_with_path(spec, tree)


def _with_fsdp(spec: PartitionSpec, shape: Sequence[int], fsdp: int, stacked: bool) -> PartitionSpec:
    """`fsdp` on the largest axis that it divides and that `spec` leaves free; small leaves stay as they are."""
    first = int(stacked)
    if fsdp == 1 or math.prod(shape[first:]) < SMALL:
        return spec
    axes = [*spec, *(None,) * (len(shape) - len(spec))]
    free = [i for i in range(first, len(shape)) if axes[i] is None and shape[i] % fsdp == 0]
    if not free:
        return spec
    axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return P(*axes)


def param_shardings(mesh: Mesh, tree: Params, rules: Rules) -> Any:
    """`specs` on a mesh with the axes of `jvdiff.sharding.AXES`: a tree of NamedShardings like `tree`."""
    found = specs(rules, tree, mesh.shape)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), found, is_leaf=lambda x: isinstance(x, P))


def bytes_per_device(mesh_axes: Mapping[str, int], spec: PartitionSpec, leaf: Any) -> int:
    """Bytes of a leaf that one device holds under a mesh with so many devices on each axis."""
    shards = math.prod(mesh_axes[axis] for axis in spec if axis is not None)
    return math.prod(leaf.shape) * leaf.dtype.itemsize // shards
