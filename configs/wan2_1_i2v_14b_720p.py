"""Wan 2.1 image-to-video, 14B parameters, 720x1280 pixels or as many of other proportions, as its authors run it.

    hf download Wan-AI/Wan2.1-I2V-14B-720P-Diffusers --local-dir checkpoints/Wan2.1-I2V-14B-720P-Diffusers
    jvdiff sample --config wan2_1_i2v_14b_720p --image=picture.jpg --prompt="..." --seed=3

The picture is the first frame, and gives the clip its proportions, at the area of 720x1280 pixels. 40 steps, guidance
5, shift 5 and the authors' negative prompt. By default diffusers makes 50 steps of 480x832 pixels at the shift of the
files, which is 3, and has no negative prompt.
"""

from ml_collections import ConfigDict

from jvdiff.config import load


def get_config() -> ConfigDict:
    config = load("wan2_1_t2v_14b")  # whose negative prompt it shares
    config.checkpoint = "checkpoints/Wan2.1-I2V-14B-720P-Diffusers"
    config.height = 720
    config.width = 1280
    config.steps = 40
    config.shift = 5.0
    return config
