"""Denoises clips of the digits checkpoint under several meshes and prints, as JSON, how they differ from one device's.

    python tests/same_clip.py CLIPS MESH [MESH ...]

A script, because XLA:CPU has to be told before it starts. What its products and sums give, to the last bit, depends on
how many rows they have, which is what a mesh changes. So that bits can be compared at all, the clips and the prompt are
large enough for every product on every device to take the same path (about 3 million multiplications), and sums are
left to XLA's own loops, which know one path only.
"""

import json
import os
import sys
from pathlib import Path

FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
)
CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "digits"
PROMPT = "a red seven moving left " * 60
SIZES = dict(num_frames=29, height=256, width=256, steps=2)


def main(clips: int, meshes: list[str]) -> None:
    import jax
    import numpy as np

    from jvdiff import pipeline
    from jvdiff.models.family import Request

    jax.config.update("jax_default_matmul_precision", "highest")
    alone, found = None, {}
    for mesh in [None, *meshes]:
        pipe = pipeline.load(CHECKPOINT, "float32", mesh)
        clip = pipe.clip(**SIZES)
        solver, inputs = clip.sampler.make(), pipe.family.inputs(pipe.models, clip, Request(prompts=(PROMPT,) * clips))
        conditions = pipeline.encode(pipe.context, clip, inputs, pipe.run)
        state = pipeline.begin(clip, solver, pipeline.initial_noise(range(clips), clip.latents), range(clips))
        latents = np.array(pipeline.denoise(pipe.context, clip, conditions, state, solver, pipe.run).x)
        if alone is None:
            alone = latents
        else:
            found[mesh] = float(np.abs(latents - alone).max() / np.abs(alone).max())
    print(json.dumps(found))


if __name__ == "__main__":
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS=FLAGS)
    main(int(sys.argv[1]), sys.argv[2:])
