"""Trains the digits model on, so that it continues a picture as well (Wan 2.2 TI2V: the first frame is given).

    jvdiff train --config train_digits_image
    jvdiff to_hf --source=runs/digits_image/repository --target=checkpoints/digits-image --dtype=float16

Starts from the dense model that ships with the project. Of three quarters of the clips the first latent frame is given,
without noise and at timestep 0; the others come from the text alone, as before.
"""

from ml_collections import ConfigDict

from jvdiff.config import load


def get_config() -> ConfigDict:
    config = load("train_digits_dit")
    config.folder = "runs/digits_image"
    config.vae = "checkpoints/digits/vae"
    config.initial = "checkpoints/digits"
    config.loss.pictures = 0.75
    config.defaults.guidance = 2.0  # a picture says much of what guidance is for: at 4 more digits change on their way
    config.schedule = ConfigDict({"steps": 1600, "learning_rate": 5e-4, "warmup": 50, "average_decay": 0.995})
    return config
