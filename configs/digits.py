"""The digits model: 64x64 pixels, 17 frames, a coloured handwritten digit that moves.

    jvdiff sample --config digits --prompt="a red seven moving left" --seed=3

Runs the checkpoint that ships with the project, trained by configs/train_digits_vae.py and configs/train_digits_dit.py;
its folder holds its own defaults (20 steps, guidance 4). Memory: well under 1 GB, on any CPU.
"""

from ml_collections import ConfigDict

from jvdiff.commands import sample


def get_config() -> ConfigDict:
    config = sample.default_config()
    config.checkpoint = "checkpoints/digits"
    config.num_frames = 17
    config.height = 64
    config.width = 64
    config.steps = 20
    config.guidance = 4.0
    return config
