"""HunyuanVideo's transformer against diffusers' HunyuanVideoTransformer3DModel, live, with no layer idle."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from jvdiff.models.hunyuan_video import dit, names  # noqa: E402
from jvdiff.models.hunyuan_video.config import HUNYUAN_VIDEO, DiTConfig  # noqa: E402
from jvdiff.weights import naming  # noqa: E402

pytestmark = pytest.mark.parity

TINY = DiTConfig(
    num_attention_heads=3, attention_head_dim=16, rope_axes_dim=(4, 6, 6), num_layers=2, num_single_layers=2,
    num_refiner_layers=2, mlp_ratio=2.5, text_embed_dim=24, pooled_projection_dim=20, in_channels=4, out_channels=4,
)  # fmt: skip
REAL_HEADS = dataclasses.replace(
    HUNYUAN_VIDEO, num_attention_heads=2, num_layers=1, num_single_layers=2, text_embed_dim=40
)
PICTURE_CHANNELS = dataclasses.replace(TINY, in_channels=9, guidance_embeds=False, image_condition_type="latent_concat")
CLEAN_FRAME = dataclasses.replace(TINY, image_condition_type="token_replace")


def reference(cfg, seed=0):
    """A torch model whose every layer changes the result."""
    torch.manual_seed(seed)
    model = diffusers.HunyuanVideoTransformer3DModel.from_config(cfg.to_json()).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1:
                sharp = any(word in name for word in ("to_q", "to_k", "add_q", "add_k"))
                tensor.normal_(0, (2 if sharp else 1) * tensor[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                tensor.normal_(1, 0.2)
            else:
                tensor.normal_(0, 0.2)
    return model


def converted(model, cfg, dtype=jnp.float32):
    """The same weights in our tree."""
    tensors = {k: v.float().numpy() for k, v in model.state_dict().items()}
    source = SimpleNamespace(tensors=tensors, read=tensors.__getitem__)
    return jax.tree.map(jnp.asarray, naming.assemble(names.transformer(cfg), dit.abstract_params(cfg, dtype), source))


def inputs(cfg, B, T, H, W, lengths, seed=0):
    """latents, timestep, states, mask, pooled, guidance; texts padded with numbers that would be seen."""
    rng = np.random.default_rng(seed)
    lengths = np.array(lengths)
    mask = np.arange(lengths.max() + 2)[None] < lengths[:, None]
    latents = rng.standard_normal((B, T, H, W, cfg.in_channels), np.float32)
    states = rng.standard_normal((*mask.shape, cfg.text_embed_dim), np.float32)
    pooled = rng.standard_normal((B, cfg.pooled_projection_dim), np.float32)
    guidance = np.array([6000, 1000, 3500], np.float32)[:B] if cfg.guidance_embeds else None
    return latents, np.array([882.3529, 12.25, 1000], np.float32)[:B], states, mask, pooled, guidance


def theirs(model, latents, timestep, states, mask, pooled, guidance, dtype=torch.float32):
    tensor = lambda a, dtype: torch.from_numpy(np.array(a)).to(dtype)  # noqa: E731
    with torch.inference_mode():
        out = model(
            tensor(latents.transpose(0, 4, 1, 2, 3), dtype),
            tensor(timestep, torch.float32),
            tensor(states, dtype),
            tensor(mask, torch.int64),
            tensor(pooled, dtype),
            None if guidance is None else tensor(guidance, torch.float32),
            return_dict=False,
        )[0]
    return out.float().numpy().transpose(0, 2, 3, 4, 1)


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


velocity = jax.jit(dit.velocity, static_argnums=1)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("cfg", "size", "lengths"),
    [
        (TINY, (3, 2, 6, 10), (9, 1, 4)),
        (TINY, (1, 5, 4, 2), (1,)),
        (REAL_HEADS, (2, 1, 4, 14), (30, 270)),
        (PICTURE_CHANNELS, (2, 3, 4, 6), (5, 3)),
        (CLEAN_FRAME, (2, 3, 4, 6), (5, 3)),
    ],
    ids=["tiny", "one-row", "real-heads", "channels", "clean-frame"],
)
def test_float32(cfg, size, lengths, seed):
    model, args = reference(cfg, seed), inputs(cfg, *size, lengths, seed)
    got = velocity(converted(model, cfg), cfg, *args)
    assert error(got, theirs(model, *args)) <= 1e-5


def test_sinusoids_are_rounded_as_the_reference_rounds_them():
    """Rates or angles in higher precision are up to 4e-4 off."""
    times = [882.3529, 6000.0, 1000.0, 0.5]
    embed = diffusers.models.embeddings.get_timestep_embedding
    want = embed(torch.tensor(times), 256, flip_sin_to_cos=True, downscale_freq_shift=0).numpy()
    np.testing.assert_allclose(dit.sinusoid(jnp.float32(times)), want, rtol=0, atol=2e-7)


def test_config_json_is_read_by_diffusers_and_back():
    for cfg in (TINY, REAL_HEADS, PICTURE_CHANNELS, CLEAN_FRAME):
        config = diffusers.HunyuanVideoTransformer3DModel.from_config(cfg.to_json()).config
        assert DiTConfig.from_json(config) == cfg
