"""The digits model's causal sibling: 64x64 pixels, 12 frames a chunk, a digit that moves on and on across the border.

    jvdiff stream --config stream_digits --chunks=40
    jvdiff stream --config stream_digits --prompt="a blue two moving up" \\
        --then.10="a blue two moving right" --seed=0 --chunks=20

Runs the checkpoint that ships with the project, trained by configs/train_digits_stream.py; its folder holds window,
steps, guidance and the noise of the past. Without --chunks it goes on until Ctrl-C. Memory: well under 1 GB, on any
CPU.
"""

from ml_collections import ConfigDict

from jvdiff.commands import stream


def get_config() -> ConfigDict:
    config = stream.default_config()
    config.checkpoint = "checkpoints/digits-stream"
    config.prompt = "a red seven moving left"
    config.then = {10: "a red seven moving up", 20: "a red seven moving right", 30: "a red seven moving down"}
    config.save_every = 10
    return config
