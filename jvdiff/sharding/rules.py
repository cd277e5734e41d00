"""Where weights live: tables of (regex, PartitionSpec) over the parameter trees, and what `fsdp` adds to them.

A pattern is matched with the end of a leaf's path ("blocks/ffn/up/kernel"), so that a table serves the parameters,
their moving average and the optimiser's moments alike. Tables speak of the axis `tensor` alone: column-parallel layers
(their outputs divided) feed row-parallel ones (their inputs divided), whose partial sums are added up once. `fsdp`
takes the largest axis of a leaf that it divides, whatever the table says of the others.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvdiff.sharding.mesh import shape_of, spec_on
from jvdiff.types import Params

P = PartitionSpec
Rules = Sequence[tuple[str, PartitionSpec]]
SMALL = 2**15  # elements; what is smaller is not worth a gather of its own
_STACKED = ("blocks", "layers")  # axis 0 of what is in them is the layer, and is never divided

REPLICATED: Rules = ((r".*", P()),)  # the VAE: small, and spread over space instead


def specs(rules: Rules, tree: Params, axes: Mapping[str, int]) -> Any:
    """The PartitionSpec of every leaf of a tree of arrays or ShapeDtypeStructs; scalars are on every device.

    axes: devices on each axis of the mesh. What `tensor` does not divide stays whole, which only a small text encoder
    meets: a transformer is checked by its heads.

    Raises:
        LookupError: no rule is about a leaf.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    kernels: dict[str, tuple[int, ...]] = {}  # the shape of the first leaf of each name
    places = []
    for path, leaf in leaves:
        name = _name(path)
        places.append(_spec(rules, name, leaf.shape, kernels.setdefault(name, leaf.shape), axes))
    return jax.tree.unflatten(structure, places)


def _name(path: Sequence[Any]) -> str:
    """The name of a leaf; of a dataclass's field within a dict that of the dataclass, which stands for one kernel."""
    dicts = [i for i, key in enumerate(path) if isinstance(key, jax.tree_util.DictKey)]
    rest = path[dicts[-1] + 1 :] if dicts else ()
    end = dicts[-1] + 1 if all(isinstance(key, jax.tree_util.GetAttrKey) for key in rest) and dicts else len(path)
    return jax.tree_util.keystr(tuple(path[:end]), simple=True, separator="/")


def _spec(
    rules: Rules, name: str, shape: tuple[int, ...], kernel: tuple[int, ...], axes: Mapping[str, int]
) -> PartitionSpec:
    """The PartitionSpec of a leaf. Where it is part of a kernel of another shape (the scale of integers), only axes of
    the kernel's size are divided, as the kernel's are."""
    if not shape:
        return P()
    rule = next((spec for pattern, spec in rules if re.search(rf"(^|/)({pattern})$", name)), None)
    if rule is None:
        raise LookupError(f"no sharding rule is about the leaf {name!r} {list(shape)}")
    if rules is REPLICATED:
        return rule
    same = [size == whole for size, whole in zip(shape, kernel, strict=True)]
    sides = zip(rule, shape, same, strict=False)
    spec = P(*(axis if axis and here and size % axes[axis] == 0 else None for axis, size, here in sides))
    return _with_fsdp(spec, shape, same, axes["fsdp"], int(any(part in _STACKED for part in name.split("/"))))


def _with_fsdp(
    spec: PartitionSpec, shape: tuple[int, ...], same: Sequence[bool], fsdp: int, first: int
) -> PartitionSpec:
    """`fsdp` on the largest axis that it divides and `spec` leaves free, from axis `first` on, of those that `same`
    allows; small leaves stay as they are."""
    if fsdp == 1 or math.prod(shape[first:]) < SMALL:
        return spec
    axes = [*spec, *(None,) * (len(shape) - len(spec))]
    free = [i for i in range(first, len(shape)) if axes[i] is None and same[i] and shape[i] % fsdp == 0]
    if not free:
        return spec
    axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return P(*axes)


def param_shardings(mesh: Mesh, tree: Params, rules: Rules) -> Any:
    """`specs` on a mesh of `make_mesh`: a tree of NamedShardings like `tree`."""
    places = specs(rules, tree, dataclasses.asdict(shape_of(mesh)))
    here = lambda spec: NamedSharding(mesh, spec_on(mesh, spec))  # noqa: E731
    return jax.tree.map(here, places, is_leaf=lambda x: isinstance(x, P))


def bytes_per_device(mesh_axes: Mapping[str, int], spec: PartitionSpec, leaf: Any) -> int:
    """Bytes of a leaf that one device holds under a mesh with `mesh_axes` devices on each axis."""
    shards = math.prod(mesh_axes[axis] for axis in spec if axis is not None)
    return math.prod(leaf.shape) * leaf.dtype.itemsize // shards
