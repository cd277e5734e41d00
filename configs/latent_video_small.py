"""Trains a class-conditional video model from nothing on a folder of labelled clips, and samples it.

    jvdiff train --config latent_video_small --clips=FOLDER
    jvdiff sample --config latent_video_small --class_label=NAME

FOLDER holds class_name/clip.mp4, or is a CSV with the columns path and label. The VAE comes first, then the transformer
on its latents, of the size small (`jvdiff.models.latent_video.SIZES`; --transformer=medium, large or xl). Clips
are 16 frames of 256x256; --plan says what a step takes, without data. A scaled-down sibling is
configs/latent_video_digits.py.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "latent_video",
            "folder": "runs/latent_video_small",
            "seed": 0,
            # The clips, and how they are read.
            "clips": "clips",
            "num_frames": 16,
            "height": 256,
            "width": 256,
            "fps": 8,  # of what is sampled
            "stride": 1,  # frames of a file from one to the next that is taken
            "workers": 8,  # threads that read ahead
            "most_bad": 0.05,  # the share of clips that may be unreadable
            "cache_latents": False,  # encode every clip once, instead of anew in every epoch, cut out elsewhere
            # The models.
            "vae": {  # or the folder of one that was trained before, as FOLDER/vae is
                "model": {"width": 128},
                "batch": 8,
                "loss": {"kl": 1e-4, "l1": 1.0, "remat": True},
                "schedule": {"steps": 100_000, "learning_rate": 1e-4, "warmup": 1000},
            },
            "transformer": "small",
            "initial": config_dict.placeholder(str),  # a repository to train on: its transformer, with its VAE as it is
            "prediction": "v_prediction",  # epsilon, sample
            "noise_schedule": "cosine",  # linear
            # The training of the transformer.
            "batch": 8,
            "precision": "bfloat16",
            "loss": {"drop_label": 0.1, "timesteps": "uniform", "remat": "dots"},  # or "logit_normal"
            "schedule": {"steps": 200_000, "learning_rate": 1e-4, "warmup": 1000, "average_decay": 0.9999},
            "loop": {
                "save_every": 1000,
                "log_every": 50,
                "show_every": 5000,
                "keep": 3,
                "accumulate": 1,
                "log_to": (),
                "mesh": "data=1",
            },
            "plan": False,
            # Sampling.
            "steps": 50,
            "guidance": 7.5,
            "solver": "ddim",  # ddpm, unipc, euler
            "class_label": config_dict.placeholder(object),  # a number, a name, or a tuple of them
            "checkpoint": config_dict.placeholder(str),  # None: what the training in `folder` made
            "output": "out",
            "save_arrays": False,
            "compile_cache": config_dict.placeholder(str),
        }
    )
