"""Goes on training the decoder of the digits VAE, on whole clips; latents, and so the transformer, stay as they are.

    jvdiff train --config train_digits_vae_decoder

The result is runs/digits_vae_decoder/vae: name it in train_digits_dit.py, or put it into a repository with

    jvdiff to_hf --source=runs/digits_dit/repository --vae=runs/digits_vae_decoder/vae --target=TARGET

L2 alone, with little noise, is what raises the PSNR: 29.4 to 30.8 dB in 17 minutes on two cores (docs/log.md).
"""

from ml_collections import ConfigDict

from jvdiff.config import load


def get_config() -> ConfigDict:
    config = load("train_digits_vae")
    config.folder = "runs/digits_vae_decoder"
    config.decoder_of = "runs/digits_vae/vae"
    config.stages = ((1500, 2, 17, 64),)
    config.loss.foreground_weight = 3.0
    config.loss.latent_noise = 0.01
    config.loss.l1 = 0.0
    config.schedule.steps = 1500
    config.schedule.learning_rate = 5e-4
    return config
