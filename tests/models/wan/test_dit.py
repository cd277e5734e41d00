"""The Wan transformer by itself; the comparison with diffusers is in tests/parity/test_wan_dit.py."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models import wan
from jvdiff.models.wan.layers import rope_tables
from jvdiff.weights.naming import flatten

TREES = Path(__file__).parents[2] / "data" / "params"
CFG = wan.DiTConfig(num_attention_heads=2, attention_head_dim=16, ffn_dim=40, num_layers=3, text_dim=12, freq_dim=8)
velocity = jax.jit(
    wan.velocity, static_argnums=1, static_argnames=("text_length", "remat", "implementation", "pattern")
)


@pytest.fixture(scope="module")
def start():
    return wan.init_params(jax.random.key(0), CFG)


@pytest.fixture(scope="module")
def params(start):
    """Parameters that are all away from their trivial start."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x) + np.float32(0.2) * rng.standard_normal(x.shape, np.float32), start)


def inputs(B=2, T=3, H=4, W=6, S=5):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((B, T, H, W, CFG.in_channels), np.float32)
    text = rng.standard_normal((B, S, CFG.text_dim), np.float32)
    return latents, np.linspace(937.5, 20, B, dtype=np.float32), text


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
    ("name", "cfg", "count"),
    [
        ("wan_2_1_t2v_1_3b", wan.WAN_2_1_T2V_1_3B, 1_418_996_800),
        ("wan_2_1_t2v_14b", wan.WAN_2_1_T2V_14B, 14_288_491_584),
        ("wan_2_2_ti2v_5b", wan.WAN_2_2_TI2V_5B, 4_999_787_712),
        ("fastwan_2_1_t2v_1_3b", dataclasses.replace(wan.WAN_2_1_T2V_1_3B, gate_compress=True), 1_489_821_760),
    ],
)
def test_published_trees(name, cfg, count):
    """The tree is a contract: saved checkpoints have these names and shapes, and a change must be deliberate."""
    tree = flatten(wan.abstract_params(cfg))
    assert sum(x.size for x in tree.values()) == count
    assert {x.dtype for x in tree.values()} == {jnp.dtype(jnp.float32)}
    found = sorted(f"{path}\t{list(x.shape)}" for path, x in tree.items())
    assert found == (TREES / f"{name}.tsv").read_text().splitlines()


def test_bfloat16_is_for_the_large_matrices_only():
    tree = flatten(wan.abstract_params(wan.WAN_2_1_T2V_14B, jnp.bfloat16))
    kept = {path for path, x in tree.items() if x.dtype == jnp.float32}
    assert {path.split("/")[0] for path in kept} == {"patch_embed", "time_embed", "time_proj", "head", "blocks"}
    assert {path.split("/")[-1] for path in kept if path.startswith("blocks")} == {"modulation", "scale", "bias"}
    assert sum(tree[path].size for path in kept) < 0.015 * sum(x.size for x in tree.values())


def test_init_fits_the_abstract_tree(start):
    abstract = wan.abstract_params(CFG)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), start) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    kernels = start["blocks"]["ffn"]["up"]["kernel"]
    assert error(kernels[0], kernels[1]) > 0.5  # each layer has its own random numbers


def test_zero_head_gives_zero_and_gradients_reach_it(start):
    args = inputs()
    assert not np.asarray(velocity(start, CFG, *args)).any()
    target = np.random.default_rng(1).standard_normal(args[0].shape, np.float32)
    grads = jax.jit(jax.grad(lambda p: jnp.mean((wan.velocity(p, CFG, *args) - target) ** 2)))(start)
    assert np.abs(grads["head"]["proj"]["kernel"]).max() > 1e-3


def test_shape_and_dtype(params):
    latents, t, text = inputs()
    for dtype in (jnp.float32, jnp.bfloat16):
        p = jax.tree.map(lambda x, a: np.asarray(x, a.dtype), params, wan.abstract_params(CFG, dtype))
        out = velocity(p, CFG, latents, t, text)
        assert out.shape == latents.shape and out.dtype == jnp.float32 and np.isfinite(out).all()
    wide = dataclasses.replace(CFG, in_channels=5, out_channels=3)
    run = partial(wan.velocity, cfg=wide, latents=latents[..., :5], timestep=t, text=text)
    assert jax.eval_shape(run, wan.abstract_params(wide)).shape == (*latents.shape[:-1], 3)


@pytest.mark.parametrize(("rows", "implementation"), [(1, None), (5, None), (5, "reference")])
def test_text_length_equals_explicit_padding(params, rows, implementation):
    latents, t, text = inputs(S=rows)
    text[:, -1] = 0
    padded = np.pad(text, ((0, 0), (0, 64 - rows), (0, 0)))
    want = velocity(params, CFG, latents, t, padded)
    got = velocity(params, CFG, latents, t, text, text_length=64, implementation=implementation)
    assert error(got, want) < 1e-6
    if rows > 1:  # the padding does matter
        assert error(velocity(params, CFG, latents, t, text), want) > 1e-3


def test_text_length_equals_explicit_padding_in_gradients(params):
    latents, t, text = inputs(S=4)
    text[:, -1] = 0

    @partial(jax.jit, static_argnums=2)
    @jax.grad
    def grad(params, text, length):
        return jnp.mean(wan.velocity(params, CFG, latents, t, text, text_length=length) ** 2)

    got, want = grad(params, text, 64), grad(params, np.pad(text, ((0, 0), (0, 60), (0, 0))), None)
    for a, b in zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (got, want)), strict=True):
        assert np.abs(a - b).max() < 1e-5 * max(np.abs(b).max(), 1e-3)


def test_text_length_by_cudnn(params, monkeypatch):
    """It attends to the rows that there are; under a gradient, which what is merged has none of, to all that count."""
    from jvdiff import kernels
    from jvdiff.models.wan import attention

    latents, t, text = inputs()
    monkeypatch.setattr(attention.kernels, "choose", lambda *a, **k: "cudnn")
    seen = []
    real = kernels.attention

    def noted(q, k, v, **kw):
        seen.append(k.shape[1])
        return real(q, k, v, **kw)

    monkeypatch.setattr(attention.kernels, "attention", noted)
    monkeypatch.setitem(real.__globals__, "choose", lambda *a, **k: "xla")
    run = lambda p: wan.velocity(p, CFG, latents, t, text, text_length=64)  # noqa: E731
    jax.eval_shape(run, params)
    assert text.shape[1] in seen and 64 not in seen
    jax.eval_shape(jax.grad(lambda p: jnp.sum(run(p))), params)
    assert 64 in seen


def test_remat_changes_nothing(params):
    args = inputs()

    @partial(jax.jit, static_argnums=1)
    @jax.value_and_grad
    def run(params, remat):
        return jnp.mean(wan.velocity(params, CFG, *args, remat=remat) ** 2)

    (value, plain), (same, remat) = run(params, False), run(params, True)
    np.testing.assert_array_equal(value, same)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(np.abs(a).max(), 1e-3))


def test_remat_saves_memory():
    deep = dataclasses.replace(CFG, num_layers=12, ffn_dim=256)
    latents, t, text = inputs(B=1, T=5, H=16, W=16)

    def temporary(remat):
        def loss(params):
            return jnp.mean(wan.velocity(params, deep, latents, t[:1], text, remat=remat) ** 2)

        return jax.jit(jax.grad(loss)).lower(wan.abstract_params(deep)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(True) < 0.4 * temporary(False)


def test_program_does_not_grow_with_depth():
    def lines(layers):
        cfg = dataclasses.replace(CFG, num_layers=layers)
        return len(velocity.lower(wan.abstract_params(cfg), cfg, *inputs()).as_text().splitlines())

    assert lines(24) == lines(2)


def test_batch_rows_are_independent(params):
    latents, t, text = inputs()
    whole = velocity(params, CFG, latents, t, text)
    for i in range(2):
        assert error(velocity(params, CFG, latents[i:][:1], t[i:][:1], text[i:][:1]), whole[i:][:1]) < 1e-6


def test_rotation_angles_are_those_of_float64():
    """Trap: the axes are split 44/42/42 for 128 channels, time first; token order is (t,h,w), w fastest."""
    grid = (3, 5, 7)
    cos, sin = rope_tables(grid, 128)
    assert cos.shape == sin.shape == (105, 64)
    for token, position in enumerate(np.ndindex(grid)):
        angles = [p / 10000 ** (2 * i / n) for p, n in zip(position, (44, 42, 42), strict=True) for i in range(n // 2)]
        np.testing.assert_allclose(cos[token], np.cos(angles), rtol=0, atol=6e-8)
        np.testing.assert_allclose(sin[token], np.sin(angles), rtol=0, atol=6e-8)


def test_attention_choice_names_what_runs():
    assert wan.attention_choice(wan.WAN_2_1_T2V_14B, (21, 90, 160)) == {"self": "xla", "cross": "xla"}
    assert wan.attention_choice(CFG, (1, 4, 4), implementation="reference")["self"] == "reference"
    with pytest.raises(NotImplementedError, match="'cudnn': takes bfloat16"):
        wan.attention_choice(CFG, (1, 4, 4), implementation="cudnn")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(H=5), "latent H is 5; expected a multiple of the patch size 2"),
        (dict(W=2 * 1025), "latent W is 2050; .* at most 2048"),
        (dict(S=0), r"text is \(2, 0, 12\)"),
        (dict(C=3), r"expected \[B,T,H,W,16\]"),
        (dict(t=np.float16), r"timestep is float16\[2\]; expected float32\[2\]"),
        (dict(rows=9), "text_length is 4, and text has 5 rows"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    sizes = {k: v for k, v in change.items() if k in "THWS"}
    latents, t, text = inputs(**sizes)
    if "C" in change:
        latents = latents[..., :3]
    t = t.astype(change.get("t", np.float32))
    with pytest.raises(UsageError, match=message):
        wan.velocity({}, CFG, latents, t, text, text_length=4 if "rows" in change else None)


def test_config_round_trip():
    gated = dataclasses.replace(CFG, gate_compress=True)
    for cfg in (CFG, gated, dataclasses.replace(CFG, causal=True), wan.WAN_2_1_T2V_1_3B, wan.WAN_2_1_T2V_14B):
        assert wan.DiTConfig.from_json(json.loads(json.dumps(cfg.to_json()))) == cfg
    assert wan.DiTConfig.from_json({}) == wan.WAN_2_1_T2V_14B
    assert (
        wan.DiTConfig.from_json({"_diffusers_version": "0.42", "in_channels": 36, "out_channels": None}).out_channels
        == 36
    )


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"_class_name": "HunyuanVideoTransformer3DModel"}, "_class_name is 'HunyuanVideo.*WanTransformer3DModel"),
        ({"num_layers": 10**9}, "num_layers is 1000000000; allowed is an integer from 1 to 1024"),
        ({"num_layers": "30"}, "num_layers is '30'"),
        ({"num_layers": True}, "num_layers is True"),
        ({"ffn_dim": 0}, "ffn_dim is 0"),
        ({"ffn_dim": None}, "ffn_dim is None"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"eps": "1e-6"}, "eps is '1e-6'"),
        ({"attention_head_dim": 127}, "attention_head_dim is 127; allowed is an even number"),
        ({"patch_size": [1, 2]}, r"patch_size is \[1, 2\]"),
        ({"patch_size": 2}, "patch_size is 2"),
        ({"image_dim": 0}, "image_dim is 0"),
        ({"qk_norm": None}, "qk_norm is None"),
        ({"gate_compress": 1}, "gate_compress is 1; allowed is true or false"),
        ({"causal": True}, "unknown field 'causal' = True"),
        ({"num_heads": 12}, "unknown field 'num_heads' = 12 .did you mean num_attention_heads"),
    ],
)
def test_bad_config_names_field_value_and_range(change, found):
    with pytest.raises(CheckpointError, match=found) as e:
        wan.DiTConfig.from_json(wan.WAN_2_1_T2V_1_3B.to_json() | change)
    assert len(str(e.value).splitlines()) <= 6
