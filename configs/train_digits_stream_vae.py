"""Goes on training the decoder of the digits VAE on digits that cross the border; latents stay as they are.

    jvdiff train --config train_digits_stream_vae
    jvdiff to_hf --source=runs/digits_stream/repository --vae=runs/digits_stream_vae/vae --target=TARGET

The decoder of checkpoints/digits has never seen a digit at the border, and leaves coloured fringes there. 600 steps, 7
minutes on two cores, take 1.1 dB off that (docs/log.md).
"""

from ml_collections import ConfigDict

from jvdiff.config import load


def get_config() -> ConfigDict:
    config = load("train_digits_vae_decoder")
    config.folder = "runs/digits_stream_vae"
    config.decoder_of = "checkpoints/digits/vae"
    config.endless = True
    config.stages = ((600, 2, 17, 64),)
    config.loss.latent_noise = 0.05  # what is decoded will be a model's, not quite the encoder's
    config.schedule.steps = 600
    return config
