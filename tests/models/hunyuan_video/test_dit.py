"""HunyuanVideo's transformer by itself; the live comparison with diffusers is in tests/parity/test_hunyuan_dit.py."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import CheckpointError, UsageError
from jvdiff.kernels import Dense
from jvdiff.models.hunyuan_video import dit, names
from jvdiff.models.hunyuan_video.config import HUNYUAN_VIDEO, DiTConfig
from jvdiff.models.quantised import quantise
from jvdiff.weights import naming
from tests.goldens import make_hunyuan_dit as golden

TESTS = Path(__file__).parents[2]
CFG = DiTConfig.from_json(golden.CONFIG)
CHANNELS = dataclasses.replace(
    HUNYUAN_VIDEO, in_channels=33, guidance_embeds=False, image_condition_type="latent_concat"
)
velocity = jax.jit(dit.velocity, static_argnums=1, static_argnames=("pattern", "remat"))


@pytest.fixture(scope="module")
def params():
    """The weights of the golden numbers."""
    abstract = dit.abstract_params(CFG)
    shapes = {name: entry.shape for name, entry in naming.expected(names.transformer(CFG), abstract).items()}
    tensors = {name: golden.tensor(name, shape) for name, shape in shapes.items()}
    source = SimpleNamespace(tensors=tensors, read=tensors.__getitem__)
    return naming.assemble(names.transformer(CFG), abstract, source)


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def published():
    tensors = {}
    for line in (TESTS / "data" / "tensors" / "hunyuan_video_transformer.tsv").read_text().splitlines()[1:]:
        pattern, shape, layers = line.split("\t")
        each = [pattern.format(layer=i) for i in range(int(layers))] or [pattern]
        tensors.update(dict.fromkeys(each, tuple(json.loads(shape))))
    return tensors


def test_the_published_tensors():
    """As in the published file; and with 33 channels and no guidance, as image-to-video's is described."""
    for cfg, count, parameters in ((HUNYUAN_VIDEO, 1264, 12_821_012_544), (CHANNELS, 1260, 12_810_991_680)):
        abstract = dit.abstract_params(cfg, jnp.bfloat16)
        ours = {name: entry.shape for name, entry in naming.expected(names.transformer(cfg), abstract).items()}
        wide = {"x_embedder.proj.weight": (3072, cfg.in_channels, 1, 2, 2)}
        theirs = published() | wide
        if not cfg.guidance_embeds:
            theirs = {name: shape for name, shape in theirs.items() if "guidance" not in name}
        assert ours == theirs and len(ours) == count
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == parameters


def test_bfloat16_is_for_the_blocks_only():
    tree = naming.flatten(dit.abstract_params(HUNYUAN_VIDEO, jnp.bfloat16))
    kept = {path for path, leaf in tree.items() if leaf.dtype == jnp.float32}
    assert {path.split("/")[-1] for path in kept if "blocks" in path} == {"scale", "bias"}
    assert all("norm" in path for path in kept if "blocks" in path)
    assert sum(tree[path].size for path in kept) < 0.01 * sum(leaf.size for leaf in tree.values())


def test_the_numbers_of_diffusers(params):
    """Interleaved rotation by 256 of video alone, the refiner's own embedding of the raw states' mean, scale before
    shift in the head, channels slowest in a patch, guidance and pooled text, the mask of keys, rounded rates."""
    assert error(velocity(params, CFG, *golden.inputs()), golden.expected()) < 1e-5


def test_what_is_masked_is_not_seen_and_what_is_not_is(params):
    expected = golden.expected()
    latents, t, states, mask, pooled, guidance = golden.inputs()
    garbage = np.where(mask[..., None], states, 1e3 * states[::-1])
    assert error(velocity(params, CFG, latents, t, garbage, mask, pooled, guidance), expected) < 1e-5
    for i, changed in enumerate(
        (
            (latents, t, states, mask | True, pooled, guidance),
            (latents, t, states, mask, 0 * pooled, guidance),
            (latents, t, states, mask, pooled, 0 * guidance),
            (latents, 0 * t, states, mask, pooled, guidance),
        )
    ):
        out = np.asarray(velocity(params, CFG, *changed))
        assert error(out[1:], expected[1:]) > 0.02, i
    other = [x[::-1] for x in (latents, t, states, mask, pooled, guidance)]  # a clip does not depend on its neighbour
    assert error(velocity(params, CFG, *other)[::-1], expected) < 1e-5


def test_rates_are_those_of_float32_rounded_at_every_step():
    """Worked out in higher precision the angles at 6000 are up to 4e-4 off, and the velocity by more than 1e-5."""
    steps = np.float32(-math.log(10000.0)) * np.arange(128, dtype=np.float32) / np.float32(128)
    exact = np.exp(steps.astype(np.float64))
    cos, sin = np.split(np.asarray(dit.sinusoid(jnp.float32([1.0]))), 2, axis=1)
    rates = np.arctan2(sin[0].astype(np.float64), cos[0].astype(np.float64))
    np.testing.assert_allclose(rates, exact, rtol=2e-6)
    rates = exact.astype(np.float32)
    rates[[12, 106]] = np.nextafter(rates[[12, 106]], np.float32(1))  # as torch's exp has them
    angles = np.float32(6000) * rates
    found = np.asarray(dit.sinusoid(jnp.float32([6000.0])))[0]
    np.testing.assert_allclose(found, np.concatenate([np.cos(angles), np.sin(angles)]), atol=2e-7)


def test_a_kernel_of_eight_bits_stands_for_its_rows(params):
    """The one that takes attention and feed-forward side by side is cut, and its scale is not."""
    small = quantise(params["single"]["blocks"]["out"]["kernel"][0])
    x = np.random.default_rng(0).standard_normal((1, 3, CFG.width + CFG.ffn_dim), np.float32)
    weights = {"kernel": small, "bias": np.ones(CFG.width, np.float32)}
    got = dit._Joined(CFG.width).apply({"params": weights}, x[..., : CFG.width], x[..., CFG.width :])
    assert error(got, x @ np.asarray(small.array(np.float32)) + 1) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(latents=np.zeros((2, 3, 5, 6, 2), np.float32)), "latent H is 5; expected a multiple of the patch size 2"),
        (dict(latents=np.zeros((2, 3, 4, 6, 3), np.float32)), r"expected \[B,T,H,W,2\]"),
        (dict(timestep=np.zeros(2, np.float16)), r"timestep is float16\[2\]; expected float32\[2\]"),
        (dict(guidance=None), "guidance is not given, and guidance_embeds of this model is True"),
        (dict(states=np.zeros((2, 0, 6), np.float32)), r"states are \[2, 0, 6\]"),
        (dict(mask=np.ones((2, 5), np.int32)), r"mask is int32\[2, 5\]; expected bool\[2,5\]"),
        (dict(pooled=np.zeros((2, 6), np.float32)), r"pooled is \[2, 6\]; expected \[2,5\]"),
        (dict(pattern="dense"), r"expected Dense\(\)"),
        (dict(implementation=lambda q, k, v: q), "a function of your own"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    order = ("latents", "timestep", "states", "mask", "pooled", "guidance")
    given = dict(zip(order, golden.inputs(), strict=True)) | {"pattern": Dense()} | change
    with pytest.raises(UsageError, match=message):
        dit.velocity({}, CFG, **given)


def test_config_round_trip():
    for cfg in (CFG, CHANNELS, HUNYUAN_VIDEO):
        assert DiTConfig.from_json(json.loads(json.dumps(cfg.to_json()))) == cfg
    assert DiTConfig.from_json({}) == HUNYUAN_VIDEO
    assert DiTConfig.from_json({"in_channels": 33, "out_channels": None}).out_channels == 33


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            {"_class_name": "WanTransformer3DModel"},
            "_class_name is 'WanTr.*allowed is 'HunyuanVideoTrans",
        ),
        ({"num_single_layers": 10**9}, "num_single_layers is 1000000000; allowed is an integer from 1 to 1024"),
        ({"patch_size": [1, 2, 2]}, r"patch_size is \[1, 2, 2\]"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is nan"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"guidance_embeds": 1}, "guidance_embeds is 1; allowed is true or false"),
        ({"qk_norm": None}, "qk_norm is None"),
        ({"rope_axes_dim": [16, 56]}, r"rope_axes_dim is \[16, 56\]; allowed is three even numbers that make 128"),
        ({"image_condition_type": "both"}, "image_condition_type is 'both'"),
        ({"num_heads": 12}, "unknown field 'num_heads' = 12"),
    ],
)
def test_bad_config_names_field_value_and_range(change, found):
    with pytest.raises(CheckpointError, match=found) as e:
        DiTConfig.from_json(HUNYUAN_VIDEO.to_json() | change)
    assert len(str(e.value).splitlines()) <= 3
