"""Denoises a clip of the digits checkpoint under several meshes and prints, as JSON, how it differs from one device's.

    python tests/same_clip.py MESH [MESH ...] --eight_bits MESH [MESH ...]

Prints two dictionaries: of the weights as they are, and read through a transform that rounds the kernels of the
transformer's layers. Each has, for each mesh, the latents' largest difference relative to the largest latent.

A script, because XLA:CPU has to be told before it starts. What its products and sums give, to the last bit, depends on
how many rows they have, which is what a mesh changes. So that bits can be compared at all, the clip and the prompt are
large enough for every product on every device to take the same path (about 3 million multiplications), and sums are
left to XLA's own loops, which know one path only.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
)
CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "digits"
PROMPT = "a red seven moving left " * 60
SIZES = dict(num_frames=21, height=256, width=128, steps=2)


def eight_bits(pipe):
    """The pipeline with kernels of eight bits in the layers of its transformer."""
    from jvdiff.models.family import read_weights
    from jvdiff.models.quantised import quantise
    from jvdiff.pipeline import Weights

    class EightBits:
        digest = "int8"

        def abstract(self, path, struct):
            return self.apply(path, struct)

        def apply(self, path, leaf):
            return quantise(leaf) if path.startswith("blocks/") and path.endswith("/kernel") else leaf

    part, cfg = pipe.family.parts["transformer"], pipe.models.configs["transformer"]
    params = read_weights(CHECKPOINT / "transformer", part, cfg, "float32", pipe.placement, transform=EightBits())
    return dataclasses.replace(pipe, weights=Weights({**pipe.weights, "transformer": params}))


def differences(meshes: list[str], change=lambda pipe: pipe) -> dict[str, float]:
    import jax
    import numpy as np

    from jvdiff import pipeline
    from jvdiff.models.family import Request

    jax.config.update("jax_default_matmul_precision", "highest")
    alone, found = None, {}
    for mesh in [None, *meshes]:
        pipe = change(pipeline.load(CHECKPOINT, "float32", mesh))
        clip = pipe.clip(**SIZES)
        solver, inputs = clip.sampler.make(), pipe.family.inputs(pipe.models, clip, Request(prompts=(PROMPT,)))
        conditions = pipeline.encode(pipe.context, clip, inputs, pipe.run)
        state = pipeline.begin(clip, solver, pipeline.initial_noise([0], clip.latents), [0])
        latents = np.array(pipeline.denoise(pipe.context, clip, conditions, state, solver, pipe.run).x)
        if alone is None:
            alone = latents
        else:
            found[mesh] = float(np.abs(latents - alone).max() / np.abs(alone).max())
    return found


if __name__ == "__main__":
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS=FLAGS)
    at = sys.argv.index("--eight_bits")
    print(json.dumps([differences(sys.argv[1:at]), differences(sys.argv[at + 1 :], eight_bits)]))
