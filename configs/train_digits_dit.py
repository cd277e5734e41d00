"""Trains the transformer and text encoder of the digits model on latents of its VAE (that first: train_digits_vae.py).

    jvdiff train --config train_digits_dit
    jvdiff to_hf --source=runs/digits_dit/repository --target=checkpoints/digits --dtype=float16

Flow matching, logit-normal noise levels with shift 3, a tenth of the prompts dropped for guidance, prompts with the 32
held-out combinations never seen. Figures and curves: docs/log.md.
"""

from ml_collections import ConfigDict

from jvdiff.runtime import peers


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "text_to_video",
            "folder": "runs/digits_dit",
            "vae": "runs/digits_vae/vae",
            "seed": 0,
            "clips": 8000,
            "batch": 32,
            "tokens": 8,  # text tokens in a batch; a prompt has six
            "drop_text": 0.1,
            "transformer": {
                "num_attention_heads": 3,
                "attention_head_dim": 64,
                "num_layers": 6,
                "ffn_dim": 768,
            },
            "text_encoder": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
            "loss": {"shift": 3.0},
            "schedule": {"steps": 5600, "learning_rate": 1e-3, "warmup": 200, "average_decay": 0.999},
            "loop": {"save_every": 500, "log_every": 50, "mesh": "data=1"},
            **peers.fields(),
            "scheduler": {
                "_class_name": "UniPCMultistepScheduler",
                "num_train_timesteps": 1000,
                "solver_order": 2,
                "solver_type": "bh2",
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
                "flow_shift": 3.0,
                "predict_x0": True,
                "lower_order_final": True,
                "final_sigmas_type": "zero",
            },
            "defaults": {"num_frames": 17, "height": 64, "width": 64, "fps": 8, "steps": 20, "guidance": 4.0},
        }
    )
