"""Where arrays live: the mesh, the rules for weights, what models are told of it, sequence parallelism."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvdiff.errors import UsageError
from jvdiff.sharding import rules, sequence
from jvdiff.sharding.mesh import AXES, MeshShape, Sizes, check_mesh, make_mesh, nearest, read_mesh, shape_of
from jvdiff.sharding.placement import Placement, Split
from jvdiff.sharding.rules import bytes_per_device, param_shardings, specs

__all__ = [
    "AXES",
    "MeshShape",
    "Placement",
    "Sizes",
    "Split",
    "bytes_per_device",
    "check_mesh",
    "data_parallel",
    "make_mesh",
    "nearest",
    "param_shardings",
    "read_mesh",
    "rules",
    "sequence",
    "shape_of",
    "specs",
]


def data_parallel(devices: int) -> tuple[NamedSharding, NamedSharding]:
    """(sharding of what every device holds a copy of, sharding of batches along their axis 0) on a mesh `data`.

    Raises:
      UsageError: this machine has fewer devices.
    """
    if not 1 <= devices <= jax.device_count():
        raise UsageError(f"devices is {devices}; expected 1 to {jax.device_count()}, the devices of this machine.")
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
