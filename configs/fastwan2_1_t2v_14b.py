"""FastWan 2.1 text-to-video, 14B parameters, 448x832 pixels, 61 frames in three steps with video sparse attention.

    hf download FastVideo/FastWan2.1-T2V-14B-Diffusers --local-dir checkpoints/FastWan2.1-T2V-14B-Diffusers
    jvdiff sample --config fastwan2_1_t2v_14b --prompt="..." --seed=3

Three steps at timesteps 1000, 757 and 522, shift 8, without guidance: of FastVideo's program, whatever the
scheduler's file says. The attention leaves out 80 % of the tiles, with which the model was trained. diffusers has no
pipeline for it.
"""

from ml_collections import ConfigDict

from jvdiff.config import load


def get_config() -> ConfigDict:
    config = load("fastwan2_1_t2v_1_3b")
    config.checkpoint = "checkpoints/FastWan2.1-T2V-14B-Diffusers"
    return config
