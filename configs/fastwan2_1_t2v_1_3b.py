"""FastWan 2.1 text-to-video, 1.3B parameters, 448x832 pixels, 61 frames in three steps with video sparse attention.

    hf download FastVideo/FastWan2.1-T2V-1.3B-Diffusers --local-dir checkpoints/FastWan2.1-T2V-1.3B-Diffusers
    jvdiff sample --config fastwan2_1_t2v_1_3b --prompt="..." --seed=3

Three steps at timesteps 1000, 757 and 522, shift 8, without guidance: of FastVideo's program, whatever the
scheduler's file says. The attention leaves out 80 % of the tiles, with which the model was trained; FastVideo's
default sparsity of 0 still adds the coarse branch: --pattern=video_sparse:4x4x4:0.0. diffusers has no pipeline for
it.
"""

from ml_collections import ConfigDict

from jvdiff.commands import sample


def get_config() -> ConfigDict:
    config = sample.default_config()
    config.checkpoint = "checkpoints/FastWan2.1-T2V-1.3B-Diffusers"
    config.num_frames = 61
    config.height = 448
    config.width = 832
    config.fps = 16
    config.shift = 8.0
    config.pattern = "video_sparse:4x4x4:0.8"
    config.steps = 3
    config.guidance = 1.0
    return config
