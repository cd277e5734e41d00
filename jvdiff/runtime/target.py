"""What programs are made for: the kind of device that decides which kernels they hold.

A value that is handed down, so that a program for a GPU is the same wherever it is compiled. Nothing else asks JAX
which backend it has in order to choose how something is computed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """What programs are made for. Static under jit.

    platform: "cpu", "gpu", or what else JAX calls it
    kind: of the device, as its driver names it: "NVIDIA H200"
    capability: CUDA's, (9, 0) of a Hopper; None: not an NVIDIA GPU
    devices: how many share the work
    cudnn: version that a GPU which is not there is taken to have, 91200 for 9.12; None: JAX asks the library at hand
    refused: (name, reason) of the kernels that were seen to be wrong there (`kernels.admission`)
    """

    platform: str
    kind: str
    capability: tuple[int, int] | None = None
    devices: int = 1
    cudnn: int | None = None
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def epilogues(self) -> bool:
        """Whether cuBLASLt makes bias and GELU behind a product in its own kernel: asked for on Hopper alone."""
        return self.capability is not None and self.capability[0] == 9

    @property
    def options(self) -> dict[str, bool]:
        """XLA's options of a transformer's programs; they go beside what XLA_FLAGS says, and before it.

        Where products may be Triton's, XLA leaves their bias and GELU to another kernel.
        """
        return {"xla_gpu_enable_triton_gemm": False} if self.epilogues else {}

    @property
    def rows(self) -> int:
        """The number of which a product's rows should be a multiple: XLA pads others of 16 bits to it, by copies."""
        return 1 if self.capability is None else 8

    def refusal(self, kernel: str) -> str | None:
        """Why a kernel is not to run there, or None."""
        reason = dict(self.refused).get(kernel)
        return reason and f"failed its check on {self.kind}: {reason}"


_refused: dict[str, str] = {}


def refuse(kernel: str, reason: str) -> None:
    """From now on the GPUs at hand refuse a kernel; reason: the end of a sentence."""
    _refused[kernel] = reason


def of(devices: Sequence[Any]) -> Target:
    """That of these devices, which are alike."""
    device = devices[0]
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
    numbers = (int(capability[1]), int(capability[2])) if capability and platform == "gpu" else None
    refused = tuple(_refused.items()) if platform == "gpu" else ()
    return Target(platform, device.device_kind, numbers, len(devices), refused=refused)


def here() -> Target:
    """That of the devices at hand."""
    return of(jax.devices())
