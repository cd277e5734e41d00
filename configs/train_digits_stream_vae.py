"""Goes on training the decoder of the digits VAE on digits that cross the border; latents stay as they are.

    python -m jvdiff.train --config configs/train_digits_stream_vae.py
    python -m convert.to_hf --source runs/digits_stream/repository --vae runs/digits_stream_vae/vae --target TARGET

The decoder of checkpoints/digits has never seen a digit at the border, and leaves coloured fringes there. Figures:
docs/log.md.
"""

from ml_collections import ConfigDict

from configs import train_digits_vae_decoder


def get_config() -> ConfigDict:
    config = train_digits_vae_decoder.get_config()
    config.folder = "runs/digits_stream_vae"
    config.decoder_of = "checkpoints/digits/vae"
    config.endless = True
    return config
