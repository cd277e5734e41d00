"""FastHunyuan text-to-video: HunyuanVideo distilled to six steps, 720x1280 pixels, 125 frames at 24 a second.

    hf download FastVideo/FastHunyuan-diffusers --local-dir checkpoints/FastHunyuan-diffusers
    jvdiff sample --config fast_hunyuan --prompt="..." --seed=3

Six steps with shift 17 and guidance 6, which the transformer is told; no file of the repository says so. Its authors
found that a larger guidance makes faster videos.

The weights are under HunyuanVideo's licence, which is not Apache's: the Tencent Hunyuan Community License Agreement. It
does not hold in the European Union, the United Kingdom and South Korea. Read it first.
"""

from ml_collections import ConfigDict

from jvdiff.config import load


def get_config() -> ConfigDict:
    config = load("hunyuan_video")
    config.checkpoint = "checkpoints/FastHunyuan-diffusers"
    config.num_frames = 125
    config.steps = 6
    config.shift = 17.0
    return config
