"""Wan 2.2 text- and image-to-video, 5B parameters, 704x1280 pixels, 121 frames at 24 a second, as its authors run it.

    hf download Wan-AI/Wan2.2-TI2V-5B-Diffusers --local-dir checkpoints/Wan2.2-TI2V-5B-Diffusers
    jvdiff sample --config wan2_2_ti2v_5b --prompt="..." --seed=3

--image=FILE makes a picture the first frame; it gives the clip its proportions, at the area of 704x1280 pixels. 50
steps, guidance 5, shift 5 and the authors' negative prompt. diffusers makes 81 frames of 480x832 pixels by default,
has no negative prompt, and takes a picture by another pipeline of the same files.
"""

from ml_collections import ConfigDict

from jvdiff.config import load


def get_config() -> ConfigDict:
    config = load("wan2_1_t2v_14b")  # whose negative prompt it shares
    config.checkpoint = "checkpoints/Wan2.2-TI2V-5B-Diffusers"
    config.num_frames = 121
    config.height = 704
    config.width = 1280
    config.fps = 24
    config.steps = 50
    config.shift = 5.0
    return config
