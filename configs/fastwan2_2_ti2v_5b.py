"""FastWan 2.2 text-to-video, 5B parameters, 704x1280 pixels, 121 frames at 24 a second in three steps, dense.

    hf download FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers \\
        --local-dir checkpoints/FastWan2.2-TI2V-5B-FullAttn-Diffusers
    jvdiff sample --config fastwan2_2_ti2v_5b --prompt="..." --seed=3

Three steps at timesteps 1000, 757 and 522, shift 8, without guidance: of FastVideo's program, whatever the
scheduler's file says. Text alone: it was not distilled with pictures. diffusers has no pipeline for it.
"""

from ml_collections import ConfigDict

from jvdiff.commands import sample


def get_config() -> ConfigDict:
    config = sample.default_config()
    config.checkpoint = "checkpoints/FastWan2.2-TI2V-5B-FullAttn-Diffusers"
    config.num_frames = 121
    config.height = 704
    config.width = 1280
    config.fps = 24
    config.shift = 8.0
    config.steps = 3
    config.guidance = 1.0
    return config
