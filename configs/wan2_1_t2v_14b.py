"""Wan 2.1 text-to-video, 14B parameters, 720x1280 pixels, 81 frames, as its authors run it.

    hf download Wan-AI/Wan2.1-T2V-14B-Diffusers --local-dir checkpoints/Wan2.1-T2V-14B-Diffusers
    jvdiff sample --config wan2_1_t2v_14b --prompt="..." --seed=3

50 steps, guidance 5, shift 5 (720p; for --height=480 --width=832 use --shift=3) and the authors' negative prompt.
diffusers makes 480x832 by default, and has no negative prompt.

Planned by compile for an H200 in bfloat16, not measured (--plan --plan_target=h200): weights 27 GiB
(DiT), 10.6 GiB (text), 0.5 GiB (VAE); one step 33 GiB and 13 PFLOP, decoding 20 GiB; 57 GiB in all, 653 PFLOP a clip.
On eight: --mesh=sequence=8; a step would take an eighth of the time, to within 4 % (docs/scaling.md, predicted).
"""

from ml_collections import ConfigDict

from jvdiff.commands import sample

NEGATIVE_PROMPT = (  # of the authors' program, for every model of theirs but the distilled ones
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留"
    "，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止"
    "不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def get_config() -> ConfigDict:
    config = sample.default_config()
    config.checkpoint = "checkpoints/Wan2.1-T2V-14B-Diffusers"
    config.num_frames = 81
    config.height = 720
    config.width = 1280
    config.fps = 16
    config.steps = 50
    config.guidance = 5.0
    config.shift = 5.0
    config.negative_prompt = NEGATIVE_PROMPT
    return config
