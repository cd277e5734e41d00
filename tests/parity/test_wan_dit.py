"""The Wan transformer against diffusers' WanTransformer3DModel, live, with weights scaled so that no layer is idle."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.models import wan
from jvdiff.models.wan import names
from jvdiff.weights import naming as rules

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.parity

TINY = wan.DiTConfig(num_attention_heads=3, attention_head_dim=16, ffn_dim=80, num_layers=3, text_dim=24, freq_dim=32)
IMAGE = dataclasses.replace(TINY, num_layers=2, in_channels=9, out_channels=4, image_dim=20, added_kv_proj_dim=48)
TWO_PICTURES = dataclasses.replace(IMAGE, pos_embed_seq_len=6)
REAL_HEADS = wan.DiTConfig(num_attention_heads=2, ffn_dim=300, num_layers=2, text_dim=40)


def reference(cfg, seed=0):
    """A torch model whose every layer changes the result."""
    torch.manual_seed(seed)
    model = diffusers.WanTransformer3DModel.from_config(cfg.to_json()).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "scale_shift_table" in name or "pos_embed" in name:  # gates and scales of order one
                tensor.normal_(0, 0.5)
            elif tensor.ndim > 1:
                tensor.normal_(0, (2 if "to_q" in name or "to_k" in name else 1) * tensor[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                tensor.normal_(1, 0.2)
            else:
                tensor.normal_(0, 0.2)
    return model


def converted(model, cfg, dtype=jnp.float32):
    """The same weights in our tree."""
    tensors = {k: v.float().numpy() for k, v in model.state_dict().items()}
    source = SimpleNamespace(tensors=tensors, read=tensors.__getitem__)
    tree = rules.assemble(names.transformer(cfg), wan.abstract_params(cfg, dtype), source)
    return jax.tree.map(jnp.asarray, tree)


def inputs(cfg, B, T, H, W, S, seed=0):
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((B, T, H, W, cfg.in_channels), np.float32)
    text = rng.standard_normal((B, S, cfg.text_dim), np.float32)
    return latents, np.array([937.5, 12.25, 500.0], np.float32)[:B], text


def theirs(model, latents, timestep, text, dtype=torch.float32, image=None):
    with torch.inference_mode():
        x = torch.from_numpy(latents.transpose(0, 4, 1, 2, 3).copy()).to(dtype)
        image = None if image is None else torch.from_numpy(image)
        out = model(x, torch.from_numpy(timestep), torch.from_numpy(text).to(dtype), image, return_dict=False)[0]
    return out.float().numpy().transpose(0, 2, 3, 4, 1)


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


velocity = jax.jit(wan.velocity, static_argnums=1, static_argnames=("text_length",))


@pytest.mark.parametrize(
    ("cfg", "size"),
    [
        (REAL_HEADS, (1, 1, 4, 6, 7)),
        (REAL_HEADS, (2, 2, 6, 10, 512)),
        (REAL_HEADS, (1, 5, 8, 2, 3)),
        (TINY, (3, 2, 4, 10, 9)),
        (TINY, (1, 5, 6, 8, 1)),
        (wan.DiTConfig(num_attention_heads=2, attention_head_dim=10, ffn_dim=33, num_layers=2), (2, 3, 4, 6, 5)),
    ],
)
def test_float32(cfg, size):
    model = reference(cfg)
    params, args = converted(model, cfg), inputs(cfg, *size)
    want = theirs(model, *args)
    assert error(velocity(params, cfg, *args), want) <= 1e-5


@pytest.mark.parametrize("cfg", [IMAGE, TWO_PICTURES], ids=["one", "two"])
def test_picture_tokens(cfg):
    """The text has 512 rows, which is how diffusers tells the two apart; ours stand for them."""
    model = reference(cfg)
    tensors = {k: v.numpy() for k, v in model.state_dict().items() if "norm_added_q" not in k}  # nobody uses it
    source = SimpleNamespace(tensors=tensors, read=tensors.__getitem__)
    params = jax.tree.map(jnp.asarray, rules.assemble(names.transformer(cfg), wan.abstract_params(cfg), source))
    latents, timestep, text = inputs(cfg, 2, 2, 4, 6, 9)
    text[:, 6:] = 0
    tokens = np.random.default_rng(1).standard_normal((2, 6, cfg.image_dim), np.float32)
    pictures = tokens.reshape(4, 3, -1) if cfg.pos_embed_seq_len else tokens
    want = theirs(model, latents, timestep, np.pad(text, ((0, 0), (0, 503), (0, 0))), image=pictures)
    assert error(velocity(params, cfg, latents, timestep, text, image=tokens, text_length=512), want) <= 1e-5


@pytest.mark.parametrize(
    "path",
    ["self_attn/out", "cross_attn/out", "ffn/down", "self_attn/q", "self_attn/k", "cross_attn/q", "cross_attn/k"],
)
def test_no_layer_is_idle(path):
    """The comparison means something only where each layer matters: leaving one out must be visible."""
    params, args = converted(reference(REAL_HEADS), REAL_HEADS), inputs(REAL_HEADS, 2, 2, 6, 10, 20)
    want = velocity(params, REAL_HEADS, *args)
    part, leaf = path.split("/")
    for layer in range(REAL_HEADS.num_layers):
        idle = jax.tree.map(lambda x: x, params)
        kernel = idle["blocks"][part][leaf]["kernel"]
        idle["blocks"][part][leaf]["kernel"] = kernel.at[layer].set(0.0)
        assert error(velocity(idle, REAL_HEADS, *args), want) > 0.02


def test_text_length_is_the_zero_padding_of_the_pipeline():
    model = reference(REAL_HEADS)
    latents, timestep, text = inputs(REAL_HEADS, 2, 2, 4, 6, 9)
    text[0, 5:], text[1, 8:] = 0, 0
    want = theirs(model, latents, timestep, np.pad(text, ((0, 0), (0, 503), (0, 0))))
    got = velocity(converted(model, REAL_HEADS), REAL_HEADS, latents, timestep, text, text_length=512)
    assert error(got, want) <= 1e-5


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("cfg", [TINY, REAL_HEADS], ids=["tiny", "real-heads"])
def test_bfloat16_is_no_further_from_float32_than_diffusers_is(cfg, seed):
    model, args = reference(cfg, seed), inputs(cfg, 2, 2, 6, 10, 33, seed)
    ours = velocity(converted(model, cfg, jnp.bfloat16), cfg, *args)
    exact = theirs(model, *args)
    kept = type(model)._keep_in_fp32_modules  # what from_pretrained(torch_dtype=bfloat16) leaves in float32
    for name, tensor in model.named_parameters():
        if not any(word in name.split(".") for word in kept):
            tensor.data = tensor.data.to(torch.bfloat16)
    limit = error(theirs(model, *args, torch.bfloat16), exact)
    assert error(ours, exact) <= limit


def test_config_json_is_read_by_diffusers_and_back():
    for cfg in (TINY, REAL_HEADS):
        config = diffusers.WanTransformer3DModel.from_config(cfg.to_json()).config
        assert wan.DiTConfig.from_json(config) == cfg


@pytest.mark.slow
def test_full_size_1_3b():
    """All 30 layers at width 1536; 5.7 GB of float32 weights pass from torch to here, leaf by leaf."""
    cfg = wan.WAN_2_1_T2V_1_3B
    args = inputs(cfg, 1, 2, 4, 6, 32)
    model = reference(cfg)
    want = theirs(model, *args)
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    del model

    source = SimpleNamespace(tensors=tensors, read=tensors.pop)  # frees each as it is read
    params = {}
    for path, leaf in rules.stream(names.transformer(cfg), wan.abstract_params(cfg), source):
        params[path] = jnp.asarray(leaf)
    got = velocity(rules.unflatten(params), cfg, *args)
    assert error(got, want) <= 1e-5
