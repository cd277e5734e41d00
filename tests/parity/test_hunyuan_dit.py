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


SOON = {"xla_backend_optimization_level": 0}  # compiled quickly, since each program runs once or twice
velocity = jax.jit(dit.velocity, static_argnums=1, compiler_options=SOON)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("cfg", "size", "lengths"),
    [
        (TINY, (3, 2, 6, 10), (9, 1, 4)),
        (REAL_HEADS, (2, 5, 4, 14), (30, 270)),
        (PICTURE_CHANNELS, (1, 1, 4, 6), (1,)),
    ],
    ids=["tiny", "real-heads", "channels"],
)
def test_float32(cfg, size, lengths, seed):
    model, args = reference(cfg, seed), inputs(cfg, *size, lengths, seed)
    got = velocity(converted(model, cfg), cfg, *args)
    assert error(got, theirs(model, *args)) <= 1e-5


def test_bfloat16_is_nearer_to_float32_than_diffusers_is():
    model, args = reference(TINY), inputs(TINY, 3, 2, 6, 10, (9, 1, 4))
    exact = theirs(model, *args)
    ours = velocity(converted(model, TINY, jnp.bfloat16), TINY, *args)
    for tensor in model.parameters():
        tensor.data = tensor.data.to(torch.bfloat16)
    assert error(ours, exact) <= 0.6 * error(theirs(model, *args, torch.bfloat16), exact)


def test_a_clean_first_frame_and_gradients_of_blocks_that_are_computed_again():
    """By all weights and the latents, of a scalar that every number of the velocity has a part in."""
    cfg = CLEAN_FRAME
    model, args = reference(cfg).double(), inputs(cfg, 2, 3, 4, 6, (4, 2))
    weights = np.random.default_rng(3).standard_normal(args[0].shape, np.float32)

    def loss(params, latents):
        v = dit.velocity(params, cfg, latents, *args[1:], remat=True)
        return jnp.sum(weights * v), v

    tensors = [torch.from_numpy(np.array(x)) for x in args]
    x = tensors[0].permute(0, 4, 1, 2, 3).double().requires_grad_()
    text = tensors[2].double(), tensors[3].long(), tensors[4].double()
    out = model(x, tensors[1], *text, tensors[5], return_dict=False)[0].permute(0, 2, 3, 4, 1)
    (out * torch.from_numpy(weights)).sum().backward()
    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True), compiler_options=SOON)
    (ours, along), v = run(converted(model, cfg), args[0])
    assert error(v, out.detach()) <= 1e-5
    assert error(along, x.grad.permute(0, 2, 3, 4, 1)) <= 1e-5
    theirs = {name: tensor.grad.numpy() for name, tensor in model.named_parameters()}
    for name, grad in naming.disassemble(names.transformer(cfg), ours):
        limit = 1e-5 * max(np.abs(theirs[name]).max(), 0.1)  # a key's bias changes nothing: its gradient is zero
        assert np.abs(grad - theirs[name]).max() <= limit, name


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
