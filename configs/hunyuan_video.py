"""HunyuanVideo text-to-video, 13B parameters, 720x1280 pixels, 129 frames at 24 a second, as its authors run it.

    hf download hunyuanvideo-community/HunyuanVideo --local-dir checkpoints/HunyuanVideo
    jvdiff sample --config hunyuan_video --prompt="..." --seed=3

50 steps, shift 7, guidance 6, which the transformer is told: there is one pass a step, and no negative prompt. For the
smaller of the two published sizes --height=544 --width=960.

The weights are not under Apache's licence but under the Tencent Hunyuan Community License Agreement: it does not hold
in the European Union, the United Kingdom and South Korea, and has rules for what is made with them. Read it first.
"""

from ml_collections import ConfigDict

from jvdiff.commands import sample


def get_config() -> ConfigDict:
    config = sample.default_config()
    config.checkpoint = "checkpoints/HunyuanVideo"
    config.num_frames = 129
    config.height = 720
    config.width = 1280
    config.fps = 24
    config.steps = 50
    config.guidance = 6.0
    config.shift = 7.0
    return config
