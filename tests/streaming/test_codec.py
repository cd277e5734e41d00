"""Encoders and decoders of a rollout: chunks joined are the whole clip, sizes fit or are refused.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import UsageError
from jvdiff.models import wan
from jvdiff.sharding import MeshShape, Placement, make_mesh
from jvdiff.streaming.codec import (
    ImageEncoder,
    NullEncoder,
    StreamingVideoDecoder,
    StreamingVideoEncoder,
    concatenated,
    stamped,
)

VAE = wan.VAEConfig(
    base_dim=4,
    dim_mult=(1, 1, 1),
    num_res_blocks=1,
    temperal_downsample=(True, True),
    z_dim=4,
    latents_mean=(0.5, -0.5, 0.1, 0.0),
    latents_std=(2.0, 1.0, 0.5, 1.5),
)
SMALL = dataclasses.replace(VAE, dim_mult=(1, 1), temperal_downsample=(True,))  # for what is compiled: ratios of 2
ABSTRACT = wan.abstract_params(VAE)
DECODER, ENCODER = StreamingVideoDecoder(VAE), StreamingVideoEncoder(VAE)
decode = jax.jit(StreamingVideoDecoder.decode, static_argnums=0, static_argnames="placement")
encode = jax.jit(StreamingVideoEncoder.encode, static_argnums=0, static_argnames=("latent_frames", "placement"))
encode_image = jax.jit(ImageEncoder.encode, static_argnums=0, static_argnames=("latent_frames", "placement"))
whole_encode = jax.jit(wan.encode, static_argnums=1, static_argnames="chunk")
whole_decode = jax.jit(wan.decode, static_argnums=1, static_argnames="chunk")


@pytest.fixture(scope="module")
def params():
    """Parameters that are all away from their trivial start."""
    random = np.random.default_rng(0)

    def fill(path, leaf):
        values = random.standard_normal(leaf.shape, np.float32) * np.float32(max(math.prod(leaf.shape[:-1]), 4) ** -0.5)
        return values + np.float32("scale" in jax.tree_util.keystr(path))

    return jax.tree_util.tree_map_with_path(fill, wan.abstract_params(SMALL))


def video(F, Y=4, X=6, B=2):
    return jax.random.uniform(jax.random.key(0), (B, F, Y, X, 3), minval=-1.0)


def latents(T, H=2, W=3, B=2):
    return jax.random.normal(jax.random.key(0), (B, T, H, W, VAE.z_dim))


def rollout(step, x, sizes, cache):
    """The chunks joined, `sizes` frames in each."""
    pieces, start = [], 0
    for size in sizes:
        piece, cache = step(x[:, start : start + size], cache)
        pieces.append(piece)
        start += size
    assert start == x.shape[1]
    return jnp.concatenate(pieces, axis=1)


def outputs(codec, size, index):
    return codec.get_output_temporal_size(autoregressive_index=index, input_temporal_size=size)


def inputs(codec, size, index):
    return codec.get_input_temporal_size(autoregressive_index=index, output_temporal_size=size)


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (2, 2, 2), (3, 3), (1, 2, 3)])
def test_chunks_joined_are_the_whole_clip(params, sizes):
    decoder, encoder, T = StreamingVideoDecoder(SMALL), StreamingVideoEncoder(SMALL), sum(sizes)
    z = latents(T)
    frames = rollout(lambda z, cache: decode(decoder, params, z, cache), z, sizes, decoder.initialize_cache())
    assert frames.dtype == jnp.float32 and jnp.abs(frames).max() <= 1
    assert error(frames, whole_decode(params, SMALL, wan.denormalize_latents(SMALL, z))) <= 1e-5

    x = video(2 * T - 1)
    counts = [
        encoder.get_input_temporal_size(autoregressive_index=i, output_temporal_size=size)
        for i, size in enumerate(sizes)
    ]
    means = rollout(lambda x, cache: encode(encoder, params, x, cache), x, counts, encoder.initialize_cache())
    assert means.dtype == jnp.float32
    assert error(means, wan.normalize_latents(SMALL, whole_encode(params, SMALL, x))) <= 1e-5


@pytest.mark.parametrize("T", [1, 3])
def test_arrays_have_the_sizes_that_the_maps_say(T):
    params, first, later = ABSTRACT, None, None
    for index in (0, 1):
        z = jax.ShapeDtypeStruct((2, T, 2, 3, 4), jnp.float32)
        frames, first = jax.eval_shape(DECODER.decode, params, z, first)
        assert frames.shape == (2, outputs(DECODER, T, index), 8, 12, 3)
        again, later = jax.eval_shape(ENCODER.encode, params, frames, later)
        assert (again.shape, again.dtype) == (z.shape, z.dtype)


def test_two_programs_decode_a_rollout_of_any_length(params):
    decode = jax.jit(lambda decoder, *arguments: decoder.decode(*arguments), static_argnums=0)
    rollout(lambda z, cache: decode(StreamingVideoDecoder(SMALL), params, z, cache), latents(4), (1, 1, 1, 1), None)
    assert decode._cache_size() == 2


def test_bytes_are_pixels(params):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 1, 4, 6, 3)).astype(np.uint8)
    scaled = np.float32(2) * (pixels.astype(np.float32) / np.float32(255)) - np.float32(1)
    encoder = StreamingVideoEncoder(SMALL)
    want = encode(encoder, params, scaled, None, latent_frames=1)[0]
    assert error(encode(encoder, params, pixels, None, latent_frames=1)[0], want) <= 1e-5
    image = encode_image(ImageEncoder(SMALL), params, pixels[:, 0], None, latent_frames=1)[0]
    assert error(image["latent"], want) <= 1e-5


def test_one_device_is_eight(params):
    """A grid that is divided otherwise than the mesh is: 2 by 4 and 4 by 2."""
    placement = Placement(make_mesh(MeshShape(sequence=4, tensor=2)))
    given = jax.device_put((params, latents(2, H=4, W=4)), placement.everywhere)

    def both(placement, params, z):
        decoder, image = StreamingVideoDecoder(SMALL), ImageEncoder(SMALL, "concat")
        frames, _ = decode(decoder, params, z, None, placement=placement)
        first, cache = encode_image(image, params, frames[:, 0], None, latent_frames=2, placement=placement)
        later, _ = encode_image(image, params, None, cache, latent_frames=2, placement=placement)
        return frames, first["latent"], later["latent"]

    for eight, one in zip(both(placement, *given), both(None, params, latents(2, H=4, W=4)), strict=True):
        assert error(eight, one) <= 1e-5


# ------------------------------------------------------------------------------------------------------------- sizes


def test_size_maps_are_inverses_of_one_another():
    assert (DECODER.spatial_compression_ratio, DECODER.temporal_compression_ratio) == (4, 4)
    assert StreamingVideoDecoder(wan.WAN_2_1_VAE).spatial_compression_ratio == 8
    assert StreamingVideoEncoder(wan.WAN_2_1_VAE).spatial_compression_ratio == 8
    assert [outputs(DECODER, 3, i) for i in range(7)] == [9, *[12] * 6]  # 81 frames
    for index in (0, 1, 2, 9):
        for T in range(1, 9):
            F = outputs(DECODER, T, index)
            assert (F + 3 if index == 0 else F) == 4 * T
            assert inputs(DECODER, F, index) == T
            for encoder in (ENCODER, ImageEncoder(VAE)):
                assert inputs(encoder, T, index) == F and outputs(encoder, F, index) == T
            assert inputs(NullEncoder(), T, index) == outputs(NullEncoder(), T, index) == T
    with pytest.raises(TypeError):
        DECODER.get_output_temporal_size(3, 0)  # flashdreams has the index first; a name leaves no doubt


@pytest.mark.parametrize(
    ("frames", "index", "nearest"),
    [(0, 0, 1), (2, 0, 1), (4, 0, 5), (8, 0, 9), (10, 0, 9), (-3, 0, 1), (0, 1, 4), (1, 1, 4), (9, 2, 8), (11, 9, 12)],
)
def test_sizes_that_do_not_fit_are_refused_with_the_nearest(frames, index, nearest):
    for ask, codec in ((inputs, DECODER), (outputs, ENCODER)):
        with pytest.raises(UsageError, match=rf"found {frames}; the nearest is {nearest}\."):
            ask(codec, frames, index)
        assert ask(codec, nearest, index) >= 1


def test_sizes_of_no_chunk_are_refused():
    for ask, codec in ((outputs, DECODER), (inputs, ENCODER), (inputs, NullEncoder())):
        with pytest.raises(UsageError, match="at least 1 frame, found 0"):
            ask(codec, 0, 1)
        with pytest.raises(UsageError, match="counted from 0, found -1"):
            ask(codec, 1, -1)
    with pytest.raises(UsageError, match="counted from 0, found -1"):
        inputs(DECODER, 4, -1)


def shape(*sizes, dtype=np.float32):
    return np.zeros(sizes, dtype)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda p: DECODER.decode(p, shape(1, 2, 2, 3, 5), None), r"\[B,T,H,W,4\].*\[1, 2, 2, 3, 5\]"),
        (lambda p: DECODER.decode(p, shape(1, 0, 2, 3, 4), {}), "at least 1"),
        (lambda p: DECODER.decode(p, shape(2, 2, 3, 4), None), r"found \[2, 2, 3, 4\]"),
        (lambda p: ENCODER.encode(p, shape(1, 6, 8, 12, 3), None), r"chunk 0 has 1 \+ 4k.*found 6; the nearest is 5"),
        (lambda p: ENCODER.encode(p, shape(1, 5, 8, 12, 3), {}), "later chunk has 4k.*found 5; the nearest is 4"),
        (lambda p: ENCODER.encode(p, shape(1, 5, 9, 15, 3), None), "divisible by 4, found 9x15; the nearest is 8x16"),
        (lambda p: ENCODER.encode(p, shape(1, 5, 8, 12, 3, dtype=np.int32), None), r"uint8 or float32.*int32"),
        (lambda p: ENCODER.encode(p, shape(1, 5, 8, 12, 4), None), r"found float32 \[1, 5, 8, 12, 4\]"),
        (lambda p: ENCODER.encode(p, None, None), "takes a video .*found None"),
        (
            lambda p: ENCODER.encode(p, shape(1, 5, 8, 12, 3), None, latent_frames=3),
            "chunk 0 of 3 latent frames takes 9 pixel frames, found 5",
        ),
        (
            lambda p: ENCODER.encode(p, shape(1, 9, 8, 12, 3), {}, latent_frames=3),
            "later chunk of 3 latent frames takes 12 pixel frames, found 9",
        ),
        (lambda p: NullEncoder().encode(None, None, None), "found None"),
        (lambda p: ImageEncoder(VAE).encode(p, None, None, latent_frames=2), "chunk 0 takes a picture"),
        (lambda p: ImageEncoder(VAE).encode(p, shape(1, 8, 8, 3), {}, latent_frames=2), "only chunk 0"),
        (lambda p: ImageEncoder(VAE).encode(p, shape(1, 1, 8, 8, 3), None, latent_frames=2), r"\[B,Y,X,3\]"),
        (lambda p: ImageEncoder(VAE).encode(p, shape(1, 8, 13, 3), None, latent_frames=2), "nearest is 8x12"),
        (lambda p: ImageEncoder(VAE).encode(p, shape(1, 8, 8, 3), None, latent_frames=0), "found 0"),
        (lambda p: ImageEncoder(VAE, "glue"), "mode is 'glue', expected 'stamp' or 'concat'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(run, says):
    with pytest.raises(UsageError, match=says):
        run(ABSTRACT)


def test_configurations_are_plain_frozen_values():
    encoders = ENCODER, NullEncoder(), ImageEncoder(VAE), ImageEncoder(VAE, "concat")
    parts = [DECODER, *encoders, StreamingVideoDecoder(SMALL)]
    assert len(set(parts)) == 6
    for part in parts:
        fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        assert all(isinstance(value, str | wan.VAEConfig | None) for value in fields.values())
        assert part == type(part)(**fields) and hash(part) == hash(type(part)(**fields))
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.vae = VAE


# ------------------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("mode", ["stamp", "concat"])
@pytest.mark.parametrize("T", [1, 2])
def test_a_picture_is_the_first_frame_of_a_grey_video(params, mode, T):
    image = video(1)[:, 0]
    encoder, chunks = ImageEncoder(SMALL, mode), 2
    grey = jnp.concatenate([image[:, None], jnp.zeros((2, 2 * chunks * T - 2, 4, 6, 3))], axis=1)
    want = wan.normalize_latents(SMALL, whole_encode(params, SMALL, grey))
    cache = encoder.initialize_cache()
    for i in range(chunks):
        payload, cache = encode_image(encoder, params, None if i else image, cache, latent_frames=T)
        latent, mask = payload["latent"], payload["mask"]
        assert payload.keys() == {"latent", "mask"}
        assert latent.shape == (2, T, 2, 3, 4) and mask.shape == (2, T, *((1, 1, 1) if mode == "stamp" else (2, 3, 2)))
        assert latent.dtype == mask.dtype == jnp.float32
        given = np.zeros(T)
        given[0] = i == 0
        np.testing.assert_array_equal(mask, np.broadcast_to(given[:, None, None, None], mask.shape))
        if mode == "concat":
            assert error(latent, want[:, i * T : (i + 1) * T]) <= 1e-5
        elif i == 0:
            assert error(latent[:, :1], want[:, :1]) <= 1e-5
        assert jnp.all(jnp.isfinite(latent))


def test_stamped_and_concatenated():
    x, latent = latents(3), latents(3) + 5.0
    stamp = {"latent": latent, "mask": jnp.zeros((2, 3, 1, 1, 1)).at[:, 0].set(1.0)}
    got = stamped(stamp, x)
    np.testing.assert_array_equal(got[:, 0], latent[:, 0])
    np.testing.assert_array_equal(got[:, 1:], x[:, 1:])
    assert stamped(stamp, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16

    mask = jax.random.uniform(jax.random.key(1), (2, 3, 2, 3, 4))
    got = concatenated({"latent": latent, "mask": mask}, x)
    np.testing.assert_array_equal(got, np.concatenate([x, mask, latent], axis=-1))
    np.testing.assert_array_equal(concatenated(latent, x), np.concatenate([x, latent], axis=-1))
    with pytest.raises(UsageError, match="gives no mask; this network takes a latent only where a mask says so"):
        stamped(latent, x)
    with pytest.raises(UsageError, match=r"gives \[2, 2, 2, 3, 4\]; chunks here are \[2, 3, 2, 3, 4\], their channels"):
        concatenated(latent[:, :2], x)
    assert stamped(None, x) is x and concatenated(None, x) is x


def test_a_null_encoder_passes_its_input():
    payload = {"latent": latents(3)}
    assert NullEncoder().encode(None, payload, None, latent_frames=3) == (payload, None)
    assert NullEncoder().spatial_compression_ratio == NullEncoder().temporal_compression_ratio == 1
