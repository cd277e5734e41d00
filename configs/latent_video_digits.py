"""The small latent video model's little sibling: moving digits by class, on two CPU cores.

    jvdiff digits --output=runs/digits_clips --clips=4000
    export XLA_FLAGS=--xla_force_host_platform_device_count=2
    jvdiff train --config latent_video_digits --loop.mesh=data=2
    jvdiff sample --config latent_video_digits --class_label=seven

Clips are 16 frames of 64x64, latents 4x8x8. On two slow AVX2 cores: 5 minutes for the clips, 53 for the VAE, 5 for the
latents, 145 for the transformer. Nearly this made checkpoints/digits-classes (docs/log.md); what that can do:
docs/latent_video.md.
"""

from ml_collections import ConfigDict

from jvdiff.config import load


def get_config() -> ConfigDict:
    config = load("latent_video_small")
    config.folder = "runs/latent_video_digits"
    config.clips = "runs/digits_clips"
    config.height = config.width = 64
    config.workers = 1
    config.cache_latents = True
    config.vae = ConfigDict(
        {
            # What a CPU waits for is full size: few channels there, and more below.
            # Norms of single channels would take away how bright each is, and with it the colours: few groups.
            "model": {"width": 8, "multipliers": (1, 2, 4, 8), "groups": 2, "blocks": 1, "latent_channels": 8},
            "batch": 2,
            "short_clips": {"steps": 800, "num_frames": 4},
            "loss": {"kl": 1e-4, "l1": 1.0, "foreground_weight": 9.0},
            "schedule": {"steps": 2800, "learning_rate": 1e-3, "warmup": 100, "average_decay": 0.998},
        }
    )
    with config.ignore_type():  # a size's name there, fields here
        config.transformer = ConfigDict({"hidden_size": 192, "depth": 6, "num_heads": 3})
    config.noise_schedule = "linear"  # has more timesteps where it is decided which digit it will be
    config.batch = 32
    config.precision = "float32"
    config.loss = ConfigDict({"drop_label": 0.1, "timesteps": "logit_normal", "remat": "dots"})
    config.schedule = ConfigDict({"steps": 6500, "learning_rate": 1e-3, "warmup": 200, "average_decay": 0.998})
    config.guidance = 4.0
    config.loop.save_every = 500
    config.loop.show_every = 500
    return config
