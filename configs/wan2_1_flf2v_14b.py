"""Wan 2.1 from a first to a last frame, 14B parameters, 720x1280 pixels or as many of other proportions.

    hf download Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers --local-dir checkpoints/Wan2.1-FLF2V-14B-720P-diffusers
    jvdiff sample --config wan2_1_flf2v_14b --image=picture.jpg --last_image=last.jpg --prompt="..." --seed=3

The first picture gives the clip its proportions, at the area of 720x1280 pixels; the last one is squashed into them.
50 steps, guidance 5, shift 16 and the authors' negative prompt, as their program has it; diffusers' documentation
shows guidance 5.5, and its default size is 480x832.
"""

from ml_collections import ConfigDict

from jvdiff.config import load


def get_config() -> ConfigDict:
    config = load("wan2_1_t2v_14b")  # whose negative prompt it shares
    config.checkpoint = "checkpoints/Wan2.1-FLF2V-14B-720P-diffusers"
    config.height = 720
    config.width = 1280
    config.steps = 50
    config.shift = 16.0
    return config
