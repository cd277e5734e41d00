"""Where arrays live. So far: data parallelism, every device with a share of the batch and a copy of everything else."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvdiff.errors import UsageError

__all__ = ["data_parallel"]


def data_parallel(devices: int) -> tuple[NamedSharding, NamedSharding]:
    """(sharding of what every device holds a copy of, sharding of batches along their axis 0) on a mesh `data`.

    Raises:
      UsageError: this machine has fewer devices.
    """
    if not 1 <= devices <= jax.device_count():
        raise UsageError(f"devices is {devices}; expected 1 to {jax.device_count()}, the devices of this machine.")
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
