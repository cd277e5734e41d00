"""Self-Forcing (arXiv 2506.08009): Wan 2.1 1.3B causal and distilled to 4 steps; 480x832 pixels, 12 frames a chunk.

    hf download wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers --local-dir checkpoints/SFWan2.1-T2V-1.3B-Diffusers
    jvdiff stream --config self_forcing_wan2_1_t2v_1_3b --prompt="..." --chunks=7

Reproduces the authors' inference: chunks of 3 latent frames that see 21 (18 of them past), timesteps 1000, 750, 500 and
250 warped by shift 5, no guidance, context noise 0. Seven chunks, 81 frames, are what it was trained on; then
its window rolls on, and the video drifts: less with a sink and positions within the cache, as flashdreams has them:

    --pipeline.diffusion_model.transformer.sink_size_t=5
    --pipeline.diffusion_model.transformer.window_size_t=7
    --pipeline.diffusion_model.transformer.apply_rope_before_kvcache=false

Memory in bfloat16, from sizes and not measured: weights 2.7 GiB (DiT), 10.6 GiB (text), 0.5 GiB (VAE); keys and values
of 18 latent frames 4.8 GiB; a saved state as much.
"""

from ml_collections import ConfigDict

from jvdiff.commands import stream


def get_config() -> ConfigDict:
    config = stream.default_config()
    config.checkpoint = "checkpoints/SFWan2.1-T2V-1.3B-Diffusers"
    config.fps = 16
    return config
