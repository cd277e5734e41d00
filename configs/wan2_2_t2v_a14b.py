"""Wan 2.2 text-to-video, two transformers of 14B parameters, 720x1280 pixels, as its authors run it.

    hf download Wan-AI/Wan2.2-T2V-A14B-Diffusers --local-dir checkpoints/Wan2.2-T2V-A14B-Diffusers
    jvdiff sample --config wan2_2_t2v_a14b --prompt="..." --seed=3

40 steps, shift 12, guidance 4 in the first transformer and 3 in the second, and the authors' negative prompt; the
boundary between the two, 0.875, is the files'. By default diffusers makes 50 steps of 480x832 pixels at guidance 5 in
both and at the shift of the files, which is 3: half as many steps are the first transformer's then.
"""

from ml_collections import ConfigDict

from jvdiff.config import load


def get_config() -> ConfigDict:
    config = load("wan2_1_t2v_14b")  # whose negative prompt it shares
    config.checkpoint = "checkpoints/Wan2.2-T2V-A14B-Diffusers"
    config.height = 720
    config.width = 1280
    config.steps = 40
    config.guidance = 4.0
    config.guidance_2 = 3.0
    config.shift = 12.0
    return config
