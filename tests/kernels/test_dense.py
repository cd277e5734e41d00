"""Every attention implementation against the definition in float64, and what the dispatcher promises."""

import functools
import logging
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jvdiff import kernels, plan
from jvdiff.errors import SetupError
from jvdiff.kernels import dense, linear
from jvdiff.kernels.block_sparse import mosaic_gpu, triton
from jvdiff.kernels.dense import cudnn, xla
from jvdiff.runtime.target import Target, here

HOPPER = Target("gpu", "NVIDIA H200", (9, 0))
# (B, L, S, N, K): odd lengths, one token, more keys than queries and fewer.
SHAPES = [(2, 7, 7, 3, 8), (1, 33, 5, 2, 48), (1, 1, 1, 1, 6), (2, 19, 64, 1, 128), (1, 101, 101, 2, 16)]


def operands(B, L, S, N, K, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(B, L, N, K), (B, S, N, K), (B, S, N, K)]
    return [(rng.standard_normal(s) * 2).astype(dtype) for s in shapes]


def attend(q, k, v, **how):
    """`kernels.attention` as one program, traced anew."""
    return jax.jit(partial(kernels.attention, **how))(q, k, v)


def definition(q, k, v):
    """Output and log-sum-exp in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("blnk,bsnk->bnls", q, k) * q.shape[-1] ** -0.5
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bnls,bsnk->blnk", weights / total, v), (top + np.log(total))[..., 0]


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


WAYS = {"reference": ("reference", None), "xla": ("xla", None), "16-logits": ("xla", 16), "300-logits": ("xla", 300)}


@pytest.fixture(params=WAYS)
def name(request, monkeypatch):
    """An implementation; of xla's also with few logits in a block."""
    implementation, logits = WAYS[request.param]
    if logits:
        monkeypatch.setitem(xla.LOGITS, jax.default_backend(), logits)
    return implementation


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, shape) for name in ("reference", "xla") for shape in SHAPES),
        *(("16-logits", shape) for shape in SHAPES[:3]),
        *(("300-logits", shape) for shape in (SHAPES[1], *SHAPES[3:])),
    ],
    indirect=["name"],
)
def test_output_and_lse(name, shape):
    q, k, v = operands(*shape)
    q, k, v = map(jnp.asarray, (q, k, v))
    out, lse = kernels.attention(q, k, v, return_lse=True, implementation=name)
    want, want_lse = definition(q, k, v)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert error(out, want) < 1e-6
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(out, kernels.attention(q, k, v, implementation=name))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["xla", "16-logits"], indirect=True)
def test_lower_precision_rounds_only_operands_weights_and_result(name, dtype):
    q, k, v = operands(2, 33, 21, 2, 16, dtype)
    out, lse = attend(q, k, v, return_lse=True, implementation=name)
    want, want_lse = definition(q, k, v)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert error(out, want) < 1.5 * float(jnp.finfo(dtype).eps)
    assert np.abs(lse - want_lse).max() < 1e-5


@functools.cache
def reference_gradients(shape):
    return gradients("reference", shape)


def gradients(name, shape):
    q, k, v = operands(*shape)
    cotangent = operands(*shape, seed=1)[0]
    lse_cotangent = np.random.default_rng(2).standard_normal((q.shape[0], q.shape[2], q.shape[1]), np.float32)

    def f(q, k, v):
        out, lse = kernels.attention(q, k, v, return_lse=True, implementation=name)
        return jnp.sum(out * cotangent) + jnp.sum(lse * lse_cotangent)

    return jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v)


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("name", ["xla", "16-logits", "300-logits"], indirect=True)
def test_gradients(name, shape):
    for got, want in zip(gradients(name, shape), reference_gradients(shape), strict=True):
        scale = max(np.abs(want).max(), 1e-3)
        np.testing.assert_allclose(got / scale, want / scale, rtol=0, atol=3e-6)


def test_large_logits_do_not_overflow(name):
    q, k, v = map(jnp.asarray, operands(1, 9, 9, 1, 8))
    out, lse = kernels.attention(q * 100, k * 100, v, return_lse=True, implementation=name)
    want, want_lse = definition(q * 100, k * 100, v)
    assert np.isfinite(out).all() and error(out, want) < 1e-3  # float32 logits near 1e5
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)


def test_merge_is_attention_over_the_union():
    q, k, v = operands(2, 9, 20, 3, 8)

    @jax.jit
    def union(q, k, v):
        parts = [kernels.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 7), slice(7, 20))]
        return kernels.merge(*parts[0], *parts[1])

    out, lse = union(q, k, v)
    want, want_lse = definition(q, k, v)
    assert error(out, want) < 1e-6
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=1e-5)


def test_only_the_first_keys_count(name):
    """Output and gradients, for a traced number of keys for each entry, against a call with those keys alone."""
    q, k, v = operands(2, 9, 20, 3, 8)
    cotangent = operands(2, 9, 20, 3, 8, seed=1)[0]

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def run(q, k, v, kv_length=None):
        out, lse = kernels.attention(q, k, v, kv_length=kv_length, return_lse=True, implementation=name)
        return jnp.sum(out * cotangent) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse)), (out, lse)

    (_, (out, lse)), gradients = run(q, k, v, np.int32([0, 0]))
    assert np.isneginf(lse).all() and not any(np.any(x) for x in (out, *gradients))
    (_, (out, lse)), (dq, dk, dv) = run(q, k, v, np.int32([13, 99]))
    for i, length in enumerate((13, 99)):
        (_, wants), (want_dq, *wants_kv) = run(q, k[:, :length], v[:, :length])
        found = (out, lse, dq, dk[:, :length], dv[:, :length])
        for got, want in zip(found, (*wants, want_dq, *wants_kv), strict=True):
            np.testing.assert_allclose(got[i], want[i], rtol=0, atol=2e-5)
        assert not np.any(dk[i, length:]) and not np.any(dv[i, length:])


def test_merge_takes_sets_without_keys():
    q, k, v = operands(2, 9, 20, 3, 8)
    cotangent = operands(2, 9, 20, 3, 8, seed=1)[0]

    def loss(out, lse):
        return jnp.sum(out * cotangent) + jnp.sum(lse), (out, lse)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def run(q, k, v, n, m):
        first = kernels.attention(q, k[:, :7], v[:, :7], kv_length=n, return_lse=True)
        second = kernels.attention(q, k[:, 7:], v[:, 7:], kv_length=m, return_lse=True)
        return loss(*kernels.merge(*first, *second))

    @partial(jax.jit, static_argnums=3)
    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def whole(q, k, v, keys):
        keys = np.array(keys)
        return loss(*kernels.attention(q, k[:, keys], v[:, keys], return_lse=True, implementation="reference"))

    for n, m in ((5, 0), (0, 3), (2, 13)):
        (_, (out, lse)), gradients = run(q, k, v, n, m)
        (_, (want, want_lse)), want_gradients = whole(q, k, v, (*range(n), *range(7, 7 + m)))
        assert error(out, want) < 1e-6
        np.testing.assert_allclose(lse, want_lse, rtol=0, atol=1e-5)
        for got, want in zip(gradients, want_gradients, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    (_, (out, lse)), gradients = run(q, k, v, 0, 0)
    assert np.isneginf(lse).all() and not any(np.any(x) for x in (out, *gradients))


@pytest.fixture(params=["triton", "mosaic_gpu"])
def interpreted(request, monkeypatch):
    """One of the GPU kernels runs on a CPU."""
    if request.param == "triton":
        monkeypatch.setattr(triton, "INTERPRET", True)
    elif jax.__version_info__ < (0, 11):
        pytest.skip("Mosaic's interpreter needs JAX 0.11 (Python 3.12)")
    else:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        monkeypatch.setattr(mosaic_gpu, "INTERPRET", plgpu.InterpretGPUParams())


def test_blocks_are_dense_attention(interpreted):
    """By the block-sparse kernels, ragged ends and keys that do not count included, forwards and backwards."""
    q, k, v = operands(1, 70, 150, 1, 64, jnp.bfloat16)
    cotangent = operands(1, 70, 150, 1, 64, seed=1)[0]

    def run(name):
        @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
        def f(q, k, v, n):
            out, lse = kernels.attention(q, k, v, kv_length=n, return_lse=True, implementation=name)
            return jnp.sum(out.astype(jnp.float32) * cotangent) + jnp.sum(lse), (out, lse)

        (_, results), gradients = jax.jit(f)(q, k, v, 130)
        return *results, *gradients

    assert kernels.choose(q, k, v, return_lse=True) == "blocks"
    assert kernels.choose(q, k, v) == "xla"  # nobody needs the log-sum-exp
    got, want = run("blocks"), run("reference")
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    assert np.abs(got[1] - want[1]).max() < 1e-5
    assert all(error(a, b) < 0.01 for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic's kernels need JAX 0.11 (Python 3.12)")
def test_blocks_compile_for_a_gpu_that_is_not_there():
    """A ring's step of Wan 1.3B at 480p on eight H200s, the number of keys traced; no array of L x L."""
    try:
        plan.check_target("h200")
    except SetupError as error:
        pytest.skip(str(error))
    placement = plan.target_placement("h200")
    x = jax.ShapeDtypeStruct((1, 16_380, 3, 128), jnp.bfloat16, sharding=placement.everywhere)
    n = jax.ShapeDtypeStruct((), jnp.int32, sharding=placement.everywhere)

    def f(q, k, v, n):
        return kernels.attention(q, k, v, kv_length=n, return_lse=True, target=placement.target)

    both = lambda q, k, v, n: jax.vjp(lambda *x: f(*x, n), q, k, v)[1](f(q, k, v, n))  # noqa: E731
    program = plan.compile_for(placement, jax.jit(both), x, x, x, n)
    assert plan.attention_in(program.as_text() or "") == ("cudnn", "mosaic_gpu")  # the latter where there is a gradient
    memory = program.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 12 * 16_384 * 3 * 128 * 4


@pytest.mark.parametrize("gradient", [False, True])
def test_long_sequences_never_hold_all_logits(gradient):
    L, N, K = 30_000, 2, 16  # all logits would be 7.2 GB
    shape = jax.ShapeDtypeStruct((1, L, N, K), jnp.float32)

    def f(q, k, v):
        return jnp.sum(kernels.attention(q, k, v, implementation="xla"))

    f = jax.grad(f, (0, 1, 2)) if gradient else f
    largest = max(_sizes(jax.make_jaxpr(f)(shape, shape, shape).jaxpr))
    assert largest <= 2 * max(xla.LOGITS["cpu"], L * N * K)
    memory = jax.jit(f).lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**27


def _sizes(jaxpr):
    """Elements of every value that a program makes, inner programs included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from _sizes(inner)


def test_blocks_cover_the_work():
    for heads, queries, keys in [(1, 1, 1), (24, 75_600, 75_600), (12, 390, 390), (8, 80, 80), (1, 3, 2**22)]:
        g, q = xla.block_sizes(heads, queries, keys, here().platform)
        assert heads % g == 0 and 1 <= q <= queries
        assert g * q * keys <= xla.LOGITS["cpu"] * 1.1 or (g, q) == (1, 1)


def test_none_picks_one_that_works_and_says_which(caplog):
    q, k, v = operands(1, 11, 5, 2, 8, seed=3)
    name = kernels.choose(q, k, v)
    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    assert kernels.choose(*abstract) == name == "xla"
    assert kernels.choose(q, k, v, implementation="reference") == "reference"
    kernels.attention.__globals__["_log_once"].cache_clear()
    with caplog.at_level(logging.INFO, "jvdiff.kernels"):
        out = kernels.attention(q, k, v)
        kernels.attention(q, k, v)
    assert [r.getMessage() for r in caplog.records] == ["attention q=[1, 11, 2, 8] keys=5 float32: xla"]
    np.testing.assert_array_equal(out, kernels.attention(q, k, v, implementation=name))


@pytest.mark.parametrize(
    ("dtype", "target", "head_dim", "reason"),
    [
        (jnp.float32, HOPPER, 128, "takes bfloat16 and float16 operands, not float32"),
        (jnp.bfloat16, Target("cpu", "cpu"), 128, "needs an NVIDIA GPU, and the backend is 'cpu'"),
        (jnp.bfloat16, Target("gpu", "AMD Instinct MI300X"), 128, "needs an NVIDIA GPU"),
        (jnp.bfloat16, Target("gpu", "Tesla T4", (7, 5)), 128, "8.0 or later, and Tesla T4 is not one"),
        (jnp.bfloat16, HOPPER, 20, "multiples of 8 up to 128, not 20"),
        (jnp.bfloat16, HOPPER, 512, "multiples of 8 up to 128, not 512"),
    ],
)
def test_cudnn_says_why_it_cannot(dtype, target, head_dim, reason):
    x = jax.ShapeDtypeStruct((1, 8, 2, head_dim), dtype)
    with pytest.raises(NotImplementedError, match=f"'cudnn': .*{reason}"):
        kernels.choose(x, x, x, implementation="cudnn", target=target)
    assert kernels.choose(x, x, x, target=target) == "xla"


def test_cudnn_gives_the_log_sum_exp_where_jax_has_it(monkeypatch):
    x = jax.ShapeDtypeStruct((1, 128, 2, 128), jnp.bfloat16)
    how = dict(return_lse=True, target=HOPPER)
    assert kernels.choose(x, x, x, **how) == "cudnn"
    monkeypatch.setattr(cudnn, "_private", lambda: None)
    assert kernels.choose(x, x, x, **how) == "blocks" and kernels.choose(x, x, x, target=HOPPER) == "cudnn"
    with pytest.raises(NotImplementedError, match="no float32 log-sum-exp through JAX"):
        kernels.choose(x, x, x, implementation="cudnn", **how)


def test_cudnns_log_sum_exp_has_a_cotangent(monkeypatch):
    """An imitation of JAX's function, whose backward pass forgets it: it is not asked for one."""

    def imitation(query, key, value, *, q_seqlen=None, kv_seqlen=None, scale, mask_type=None, return_residual):
        assert (
            return_residual and scale == query.shape[-1] ** -0.5 and (mask_type == "padding") == (kv_seqlen is not None)
        )
        n = None if kv_seqlen is None else kv_seqlen[0]
        return jax.lax.stop_gradient(kernels.attention(query, key, value, kv_length=n, return_lse=True))

    private = SimpleNamespace(dot_product_attention=imitation, MaskType=SimpleNamespace(PADDING="padding"))
    monkeypatch.setattr(cudnn, "_private", lambda: private)
    monkeypatch.setattr(cudnn, "unsupported", lambda *_: None)
    monkeypatch.setattr(dense, "IMPLEMENTATIONS", {"xla": xla, "cudnn": cudnn})
    x, cotangents = operands(2, 5, 9, 2, 8), (operands(2, 5, 9, 2, 8, seed=1)[0], jnp.ones((2, 2, 5)))

    def run(name, n):
        f = lambda *x: kernels.attention(*x, kv_length=n, return_lse=True, implementation=name)  # noqa: E731

        @jax.jit
        def both(*x):
            out, pull = jax.vjp(f, *x)
            return f(*x), out, pull(cotangents)

        return both(*x)

    for n in (None, 7):
        for a, b in zip(*(jax.tree.leaves(run(name, n)) for name in ("cudnn", "xla")), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_cudnn_gives_gradients_and_leaves_tangents_to_xla(monkeypatch, caplog):
    """An imitation of it, as `jax.nn` has it: with a backward pass of its own, and without a jvp."""
    plain, backwards = jax.nn.dot_product_attention, []

    @jax.custom_vjp
    def imitation(q, k, v, lengths):
        return plain(q, k, v, key_value_seq_lengths=lengths)

    def backward(residuals, cotangent):
        backwards.append(cotangent)
        q, k, v, lengths, _ = residuals
        return *jax.vjp(lambda *x: plain(*x, key_value_seq_lengths=lengths), q, k, v)[1](cotangent), None

    imitation.defvjp(lambda *x: (out := imitation(*x), (*x, out)), backward)
    called = lambda q, k, v, key_value_seq_lengths, implementation: imitation(q, k, v, key_value_seq_lengths)  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", called)
    monkeypatch.setattr(cudnn, "unsupported", lambda *_: None)
    linear.say_left.cache_clear()
    x, dots, target = (tuple(operands(2, 5, 9, 2, 8, seed=s)) for s in range(3))

    def flow(f, q, k, v):
        """A loss of mean flows: the tangent is a part of its target, and kept from the gradient."""
        out, dot = jax.jvp(f, (q, k, v), dots)
        return jnp.sum((out - target[0] - jax.lax.stop_gradient(dot)) ** 2)

    def derivatives(name, n):
        f = lambda *x: kernels.attention(*x, kv_length=n, implementation=name)  # noqa: E731
        pulled = lambda *x: jax.vjp(f, *x)[1](target[0])  # noqa: E731
        yield pulled(*x)
        assert backwards and (name != "cudnn" or not caplog.records)  # of a gradient there is nothing to say
        yield from (jax.grad(partial(flow, f))(*x), jax.jvp(pulled, x, dots)[1])

    got, want = jax.jit(lambda n: [list(derivatives(name, n)) for name in ("cudnn", "xla")])(7)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)
    assert [r.args for r in caplog.records] == [("cuDNN",)]


def test_cudnn_is_the_choice_on_a_gpu():
    x = jax.ShapeDtypeStruct((1, 75_600, 12, 128), jnp.bfloat16)
    assert kernels.choose(x, x, x, target=HOPPER) == "cudnn"
    assert kernels.choose(x, x, x) == "xla"


def test_mistakes_are_named():
    q, k, v = operands(1, 4, 5, 2, 8)
    with pytest.raises(
        ValueError, match="no attention implementation 'flash'; there are cudnn, blocks, xla, reference"
    ):
        kernels.attention(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match="k is bfloat16"):
        kernels.attention(q, k.astype(jnp.bfloat16), v)
    with pytest.raises(ValueError, match=r"kv_length is int32\[2\]; it must be one whole number.*int32\[1\]"):
        kernels.attention(q, k, v, kv_length=jnp.array([4, 4]))
    with pytest.raises(ValueError, match=r"v is float32\[1, 4, 2, 8\]"):
        kernels.attention(q, k, v[:, :4])
