"""Trains the digits model's causal sibling, which makes a video chunk by chunk without end, from the one that ships.

    jvdiff train --config train_digits_stream
    jvdiff train --config train_digits_stream_vae
    jvdiff to_hf --source=runs/digits_stream/repository --vae=runs/digits_stream_vae/vae \\
        --target=checkpoints/digits-stream --dtype=float16

Teacher forcing: chunks of 3 latent frames that see two chunks before them and the first one of the video, which may be
long ago, in streams where the digit moves on across the border and takes another direction when the prompt says so.
Every other step is of first chunks only, whose shape comes from the text alone and is soon forgotten. Guidance is
strong for the first chunk only. What ships came here in six trainings, of 17,400 steps together: the last 1,600 as
below (learning rate 6e-4), those before them without `first`, some with other flags.
Its decoder is that of train_digits_stream_vae.py. Figures and flags: docs/log.md.
"""

from ml_collections import ConfigDict

from jvdiff.config import load


def get_config() -> ConfigDict:
    config = load("train_digits_dit")
    config.task = "stream"
    config.folder = "runs/digits_stream"
    config.vae = "checkpoints/digits/vae"
    config.initial = "checkpoints/digits"
    config.clips = 2400
    config.batch = 10
    config.chunks = 4
    config.gap = 4
    config.first = ConfigDict({"clips": 12000, "batch": 64})
    config.change = 0.4
    config.pattern = ConfigDict({"chunk": 3, "window": 9, "sink": 3})
    config.transformer.causal = True
    config.loss.context_noise = 0.6
    config.loss.resample = 0.7
    config.loss.remat = True  # on a CPU the residuals of six layers cost more to write than to compute
    config.loop.log_every = 25  # an odd number: both kinds of step
    config.schedule = ConfigDict({"steps": 7000, "learning_rate": 1e-3, "warmup": 100, "average_decay": 0.998})
    config.defaults = ConfigDict(
        {
            "fps": 8,
            "stream": {
                "transformer": {
                    "height": 8,
                    "width": 8,
                    "len_t": 3,
                    "window_size_t": 9,
                    "sink_size_t": 3,
                    "apply_rope_before_kvcache": False,
                    "text_rows": 32,
                    "guidance_scale": 2.0,
                    "first_guidance_scale": 4.0,
                },
                "scheduler": {"class": "UniPCSchedulerConfig", "num_inference_steps": 10, "shift": 3.0},
            },
        }
    )
    return config
