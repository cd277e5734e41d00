"""Wan 2.2 image-to-video, two transformers of 14B parameters, 720x1280 pixels or as many of other proportions.

    hf download Wan-AI/Wan2.2-I2V-A14B-Diffusers --local-dir checkpoints/Wan2.2-I2V-A14B-Diffusers
    jvdiff sample --config wan2_2_i2v_a14b --image=picture.jpg --prompt="..." --seed=3

The picture is the first frame, and gives the clip its proportions, at the area of 720x1280 pixels; --last_image gives
the last one too. 40 steps, shift 5, guidance 3.5 in both transformers and the authors' negative prompt; the boundary
between the two, 0.9, is the files'. By default diffusers makes 50 steps of 480x832 pixels at guidance 5 and at the
shift of the files, which is 3.

The recipe of four steps (weights distilled for it, such as lightx2v's merged into a folder) is --steps=4
--boundary_step=2 --guidance=1.
"""

from ml_collections import ConfigDict

from jvdiff.config import load


def get_config() -> ConfigDict:
    config = load("wan2_1_t2v_14b")  # whose negative prompt it shares
    config.checkpoint = "checkpoints/Wan2.2-I2V-A14B-Diffusers"
    config.height = 720
    config.width = 1280
    config.steps = 40
    config.guidance = 3.5
    config.guidance_2 = 3.5
    config.shift = 5.0
    return config
