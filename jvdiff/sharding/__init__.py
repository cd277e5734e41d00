"""Where arrays live: the mesh, the rules for weights, what models are told of it, sequence parallelism."""

from jvdiff.sharding import rules, sequence
from jvdiff.sharding.mesh import AXES, MeshShape, Sizes, check_mesh, make_mesh, nearest, read_mesh, shape_of, spec_on
from jvdiff.sharding.placement import Picture, Placement, Split
from jvdiff.sharding.rules import bytes_per_device, param_shardings, specs

__all__ = [
    "AXES",
    "MeshShape",
    "Picture",
    "Placement",
    "Sizes",
    "Split",
    "bytes_per_device",
    "check_mesh",
    "make_mesh",
    "nearest",
    "param_shardings",
    "read_mesh",
    "rules",
    "sequence",
    "shape_of",
    "spec_on",
    "specs",
]
