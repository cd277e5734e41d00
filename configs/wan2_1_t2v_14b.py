"""Wan 2.1 text-to-video, 14B parameters, 720x1280 pixels, 81 frames, as its authors run it.

    hf download Wan-AI/Wan2.1-T2V-14B-Diffusers --local-dir checkpoints/Wan2.1-T2V-14B-Diffusers
    jvdiff sample --config wan2_1_t2v_14b --prompt="..." --seed=3

50 steps, guidance 5, shift 5 (720p; for --height=480 --width=832 use --shift=3). The authors'
program has a long Chinese negative prompt; here it is empty, as in diffusers, unless --negative_prompt is given.

Planned by compile for an H200 in bfloat16, not measured (--plan --plan_target=h200): weights 27 GiB
(DiT), 10.6 GiB (text), 0.5 GiB (VAE); one step 33 GiB and 13 PFLOP, decoding 20 GiB; 57 GiB in all, 653 PFLOP a clip.
On eight: --mesh=sequence=8; a step would take an eighth of the time, to within 4 % (docs/scaling.md, predicted).
"""

from ml_collections import ConfigDict

from jvdiff.commands import sample


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
    return config
