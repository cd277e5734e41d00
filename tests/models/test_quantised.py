"""Kernels of eight bits: what rounding explains and no more, on one device and on a mesh; no integers by mistake."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jvdiff.errors import UsageError
from jvdiff.models import latent_video, wan
from jvdiff.models.layers import as_array, product
from jvdiff.models.quantised import Quantised, quantise
from jvdiff.models.text import clip_text, llama, umt5
from jvdiff.models.wan import places
from jvdiff.sharding import Placement, make_mesh, param_shardings, read_mesh, specs

# Wide enough that `fsdp` divides every matrix of a layer.
DIT = wan.DiTConfig(
    num_attention_heads=2,
    attention_head_dim=96,
    in_channels=4,
    out_channels=4,
    text_dim=192,
    freq_dim=16,
    ffn_dim=256,
    num_layers=2,
)
TEXT = umt5.Config(vocab_size=50, d_model=192, d_kv=96, d_ff=256, num_layers=2, num_heads=2)
LAYERS = {"transformer": ("blocks", places.DIT), "text": ("layers", umt5.PLACES)}


def random_like(path, leaf):
    """Values in which no layer is idle; kernels keep the variance of what goes through them."""
    random = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
    kernel = path[-1].key == "kernel"
    values = random.standard_normal(leaf.shape, np.float32) * np.float32(leaf.shape[-2] ** -0.5 if kernel else 0.3)
    return values + np.float32(path[-1].key == "scale")


def in_layers(change, params, stack):
    """`params` with `change(kernel)` in the place of every kernel of the stacked layers."""
    with_path = lambda path, leaf: change(leaf) if path[-1].key == "kernel" else leaf  # noqa: E731
    return {**params, stack: jax.tree_util.tree_map_with_path(with_path, params[stack])}


@functools.cache
def floats(part):
    if part == "text":
        return umt5.init_params(jax.random.key(0), TEXT)
    return jax.tree_util.tree_map_with_path(random_like, abstract_params(DIT))


@functools.cache
def program(part, mesh=None):
    """(the jitted network of its parameters, where it has the devices)."""
    placement = mesh and Placement(make_mesh(read_mesh(mesh)))
    random = np.random.default_rng(1)
    if part == "text":
        ids, mask = random.integers(2, 50, (2, 9), np.int32), np.ones((2, 9), bool)
        return jax.jit(lambda p: umt5.encode(p, TEXT, ids, mask, placement=placement)), placement
    draw = lambda *shape: random.standard_normal(shape, np.float32)  # noqa: E731
    x, t, text = draw(1, 2, 4, 6, 4), np.float32([500]), draw(1, 5, 192)  # one clip: its tokens are shared
    return jax.jit(lambda p: wan.velocity(p, DIT, x, t, text, placement=placement)), placement


def run(part, params, mesh=None):
    network, placement = program(part, mesh)
    if placement:
        params = jax.device_put(params, param_shardings(placement.mesh, params, LAYERS[part][1]))
    return np.asarray(network(params))


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# ------------------------------------------------------------------------------------------------- one product


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("wrong", [False, True])
def test_a_product_is_as_far_from_the_float_one_as_half_a_scale_allows(dtype, wrong):
    """|x W - x W'| <= sum |x| scale/2 for each column, beside the rounding of the operands' dtype."""
    random = np.random.default_rng(0)
    x = np.asarray(random.standard_normal((3, 7, 64)), dtype).astype(np.float32)
    kernel = random.standard_normal((64, 24), np.float32) * random.uniform(0.1, 10, 24).astype(np.float32)
    small = quantise(kernel)
    if wrong:
        small = Quantised(small.values, np.roll(small.scale, 1, axis=-1))
    found = np.asarray(product(x, small, dtype).astype(jnp.float32))
    bound = np.abs(x).sum(-1, keepdims=True) * small.scale[0, None, None] / 2
    size = np.abs(x) @ np.abs(kernel)
    excess = np.abs(found - x @ kernel) - bound - size * float(jnp.finfo(dtype).eps)
    assert (excess.max() > 0.1 * size.max()) == wrong
    assert wrong or excess.max() <= 0


def test_what_is_quantised_is_near_and_a_column_of_zeros_stays_one():
    kernel = np.random.default_rng(0).standard_normal((2, 8, 6)).astype(np.float32)
    kernel[0, :, 3] = 0
    for array in (kernel, jnp.asarray(kernel)):
        small = quantise(array)
        assert type(small.values) is type(small.scale) and isinstance(small.values, type(array))
        assert (small.values.dtype, small.values.shape) == (jnp.int8, kernel.shape)
        assert (small.scale.dtype, small.scale.shape) == (jnp.float32, (2, 1, 6))
        whole = np.asarray(small.values, np.float32) * np.asarray(small.scale)
        assert np.all(np.abs(whole - kernel) <= small.scale * (0.5 + 1e-6))
        np.testing.assert_array_equal(as_array(jax.tree.map(jnp.asarray, small)), whole)
    abstract = quantise(jax.ShapeDtypeStruct(kernel.shape, jnp.bfloat16))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), small)


# -------------------------------------------------------------------------------------------------- no integers


def test_integers_without_a_scale_are_refused():
    kernel = jnp.ones((4, 3), jnp.int8)
    for use in (product, lambda _, kernel: as_array(kernel)):
        with pytest.raises(UsageError, match=r"A kernel is int8\[4, 3\]; expected floats"):
            use(jnp.ones((2, 4)), kernel)
    with pytest.raises(UsageError, match="The compute dtype is int8; expected a float"):
        product(jnp.ones((2, 4)), jnp.ones((4, 3)), jnp.int8)


VIDEO = latent_video.VAEConfig(width=4, groups=4, blocks=1)
WAN_VAE = wan.VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 1), temperal_downsample=(True,), num_res_blocks=1,
                        latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)  # fmt: skip
LLAMA = llama.Config(
    1e-5, 1e4, 50, 16, 24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=4
)
TOWER = clip_text.Config(50, 16, 24, num_hidden_layers=1, num_attention_heads=2)
CLASSES = latent_video.DiTConfig(hidden_size=16, depth=1, num_heads=2, num_classes=3, freq_dim=16)
ones = jnp.ones
DECODES = {None: None, jnp.float32: "exact", jnp.bfloat16: "bf16"}
FACES = {
    "wan": (DIT, lambda p, d: wan.velocity(p, DIT, ones((1, 1, 2, 2, 4)), ones(1), ones((1, 1, 192)), dtype=d)),
    "text": (TEXT, lambda p, d: umt5.encode(p, TEXT, ones((1, 2), jnp.int32), ones((1, 2), bool), dtype=d)),
    "llama": (LLAMA, lambda p, d: llama.encode(p, LLAMA, ones((1, 2), jnp.int32), ones((1, 2), bool), dtype=d)),
    "clip text": (TOWER, lambda p, d: clip_text.encode(p, TOWER, ones((1, 2), jnp.int32), dtype=d)),
    "wan encoder": (WAN_VAE, lambda p, d: wan.encode(p, WAN_VAE, ones((1, 3, 4, 4, 3)), dtype=d)),
    "wan decoder": (WAN_VAE, lambda p, d: wan.decode(p, WAN_VAE, ones((1, 2, 2, 2, 4)), arithmetic=DECODES[d])),
    "latent video": (
        CLASSES,
        lambda p, d: latent_video.denoise(
            p, CLASSES, ones((1, 1, 2, 2, CLASSES.in_channels)), ones(1), ones(1, jnp.int32), dtype=d
        ),
    ),
    "latent video encoder": (VIDEO, lambda p, d: latent_video.encode(p, VIDEO, ones((1, 4, 8, 8, 3)), dtype=d)[0]),
    "latent video decoder": (
        VIDEO,
        lambda p, d: latent_video.decode(p, VIDEO, ones((1, 1, 1, 1, 4)), arithmetic=DECODES[d]),
    ),
}


def abstract_params(cfg, dtype=jnp.float32):
    room = next(
        room for room in (wan, latent_video, umt5, llama, clip_text) if type(cfg).__module__.startswith(room.__name__)
    )
    return room.abstract_params(cfg, dtype)


@pytest.mark.parametrize("face", FACES)
def test_every_network_works_in_the_dtype_asked_for_and_refuses_integers(face):
    """Traced only. Matrices in bfloat16 or eight bits multiply in float32 if that is asked for, and the other way."""
    cfg, call = FACES[face]
    change = lambda to: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, x: to(x) if path[-1].key == "kernel" else x, abstract_params(cfg)
    )
    with pytest.raises(UsageError, match="A kernel is int8"):
        jax.eval_shape(lambda p: call(p, None), change(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.int8)))
    for params in (abstract_params(cfg, jnp.bfloat16), change(quantise)):
        for dtype in (jnp.float32, jnp.bfloat16):
            products = dots(jax.make_jaxpr(lambda p, dtype=dtype: call(p, dtype))(params).jaxpr)
            assert jnp.dtype(dtype) in products
            assert products <= {jnp.dtype(dtype), jnp.dtype(jnp.float32)}


def dots(jaxpr):
    """The dtypes of the operands of all products and convolutions of a program."""
    found = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            found |= {var.aval.dtype for var in eqn.invars}
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                found |= dots(inner)
    return found


# ------------------------------------------------------------------------------------------------ whole networks


@pytest.mark.parametrize("part", LAYERS)
def test_a_network_moves_as_far_as_rounding_its_weights_explains(part):
    """Rounding moves a weight by up to half a scale, as if at random. The answer moves no farther than it does for
    weights that are moved at random by as much; a scale that belongs to another column moves it much farther."""
    stack, _ = LAYERS[part]
    expected = run(part, floats(part))

    def shaken(seed):
        random = np.random.default_rng(seed)
        shake = lambda w: w + quantise(w).scale * random.uniform(-0.5, 0.5, w.shape).astype(np.float32)  # noqa: E731
        return distance(run(part, in_layers(shake, floats(part), stack)), expected)

    bound = 1.3 * max(shaken(seed) for seed in range(4))
    small = in_layers(quantise, floats(part), stack)
    assert 0 < distance(run(part, small), expected) < bound
    ffn, up = small[stack]["ffn"], small[stack]["ffn"]["up"]
    rolled = Quantised(up["kernel"].values, np.roll(up["kernel"].scale, 1, axis=-1))
    wrong = {**small, stack: {**small[stack], "ffn": {**ffn, "up": {**up, "kernel": rolled}}}}
    assert distance(run(part, wrong), expected) > bound


@pytest.mark.parametrize("part", LAYERS)
def test_a_mesh_gives_the_numbers_of_one_device(part):
    small = in_layers(quantise, floats(part), LAYERS[part][0])
    expected = run(part, small)
    np.testing.assert_array_equal(run(part, small, "fsdp=2"), expected)
    assert distance(run(part, small, "tensor=2"), expected) < 1e-5


def test_a_scale_is_divided_as_the_columns_of_its_kernel_are():
    small = in_layers(quantise, wan.abstract_params(wan.WAN_2_1_T2V_1_3B), "blocks")
    blocks = specs(places.DIT, small, {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 4})["blocks"]
    up, down = blocks["ffn"]["up"]["kernel"], blocks["ffn"]["down"]["kernel"]
    assert (up.values, up.scale) == (P(None, "fsdp", "tensor"), P(None, None, "tensor"))
    assert (down.values, down.scale) == (P(None, "tensor", "fsdp"), P(None, None))
