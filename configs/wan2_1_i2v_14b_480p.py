"""Wan 2.1 image-to-video, 14B parameters, 480x832 pixels or as many of other proportions, as its authors run it.

    hf download Wan-AI/Wan2.1-I2V-14B-480P-Diffusers --local-dir checkpoints/Wan2.1-I2V-14B-480P-Diffusers
    jvdiff sample --config wan2_1_i2v_14b_480p --image=picture.jpg --prompt="..." --seed=3

The picture is the first frame, and gives the clip its proportions, at the area of 480x832 pixels. 40 steps, guidance
5, shift 3 and the authors' negative prompt; diffusers makes 50 steps by default, and has no negative prompt. The
files of the 480p and the 720p model are alike but for their weights: size and shift stand here.
"""

from ml_collections import ConfigDict

from jvdiff.config import load


def get_config() -> ConfigDict:
    config = load("wan2_1_t2v_14b")  # whose negative prompt it shares
    config.checkpoint = "checkpoints/Wan2.1-I2V-14B-480P-Diffusers"
    config.height = 480
    config.width = 832
    config.steps = 40
    config.shift = 3.0
    return config
