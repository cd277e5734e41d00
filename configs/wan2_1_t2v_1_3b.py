"""Wan 2.1 text-to-video, 1.3B parameters, 480x832 pixels, 81 frames: diffusers' defaults, the authors' negative prompt.

    hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir checkpoints/Wan2.1-T2V-1.3B-Diffusers
    jvdiff sample --config wan2_1_t2v_1_3b --prompt="..." --seed=3

50 steps, guidance 5; solver, shift and sigma grid from the repository (UniPC, shift 3 as published for 480p; the
official README advises --shift=8 --guidance=6). The negative prompt is the authors'; diffusers has none.

Planned by compile for an H200 in bfloat16, not measured (--plan --plan_target=h200): weights 2.7 GiB
(DiT), 10.6 GiB (text), 0.5 GiB (VAE); one step 3.8 GiB and 566 TFLOP, decoding 8.7 GiB; 22 GiB
in all, 28.6 PFLOP a clip.
"""

from ml_collections import ConfigDict

from jvdiff.config import load


def get_config() -> ConfigDict:
    config = load("wan2_1_t2v_14b")  # whose negative prompt it shares
    config.checkpoint = "checkpoints/Wan2.1-T2V-1.3B-Diffusers"
    config.num_frames = 81
    config.height = 480
    config.width = 832
    config.fps = 16
    config.steps = 50
    config.guidance = 5.0
    config.shift = None
    return config
