"""Fine-tunes the digits model for video sparse attention: a tile of 2x2 tokens sees the best 5 of the 20 tiles.

    jvdiff train --config train_digits_sparse
    jvdiff to_hf --source=runs/digits_sparse/repository --target=checkpoints/digits_sparse --dtype=float16

Starts from the dense model that ships with the project, with the gate of the coarse branch at zero. The sparsity rises
to 25, 50 and 75 % after 100 steps each; every sparsity is a step to compile.
"""

from ml_collections import ConfigDict

from jvdiff.config import load


def get_config() -> ConfigDict:
    config = load("train_digits_dit")
    config.folder = "runs/digits_sparse"
    config.vae = "checkpoints/digits/vae"
    config.initial = "checkpoints/digits"
    config.pattern = "video_sparse:1x2x2:0.75"
    config.sparsity_warmup = ConfigDict({"rate": 0.25, "interval": 100})
    config.transformer.gate_compress = True
    config.schedule = ConfigDict({"steps": 1000, "learning_rate": 3e-4, "warmup": 50, "average_decay": 0.99})
    config.defaults.pattern = config.pattern
    return config
