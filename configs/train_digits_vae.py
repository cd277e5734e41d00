"""Trains the causal VAE of the digits model: Wan 2.1's classes, 2.5 M parameters, 64x64 clips of 17 frames.

    jvdiff train --config train_digits_vae

Pictures first, then whole clips: trained on short clips only, the colours of later chunks drift away. Figures and
curves: docs/log.md. The result is runs/digits_vae/vae.
"""

from ml_collections import ConfigDict

from jvdiff.runtime import peers


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "vae",
            "folder": "runs/digits_vae",
            "seed": 0,
            "vae": {
                "base_dim": 8,
                "dim_mult": (1, 4, 8, 8),
                "num_res_blocks": 1,
                "z_dim": 8,
                "latents_mean": (0.0,) * 8,  # measured when training is done
                "latents_std": (1.0,) * 8,
            },
            "stages": ((400, 32, 1, 64), (1400, 4, 17, 32), (1850, 2, 17, 64)),  # (until step, batch, frames, crop)
            "loss": {"foreground_weight": 9.0, "latent_noise": 0.05, "l1": 1.0},
            "schedule": {"steps": 1850, "learning_rate": 1e-3, "warmup": 50, "average_decay": 0.99},
            "loop": {"save_every": 100, "log_every": 10, "mesh": "data=1"},
            **peers.fields(),
        }
    )
