"""Goes on training the decoder of the digits VAE, on whole clips; latents, and so the transformer, stay as they are.

    python -m jvdiff.train --config configs/train_digits_vae_decoder.py

The result is runs/digits_vae_decoder/vae: copy it over the `vae` of a repository, or name it in train_digits_dit.py.
"""

from ml_collections import ConfigDict

from configs import train_digits_vae


def get_config() -> ConfigDict:
    config = train_digits_vae.get_config()
    config.folder = "runs/digits_vae_decoder"
    config.decoder_of = "runs/digits_vae/vae"
    config.stages = ((1000, 2, 17, 64),)
    config.loss.latent_noise = 0.02
    config.schedule.steps = 1000
    config.schedule.learning_rate = 5e-4
    return config
