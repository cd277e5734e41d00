"""Linear maps with a transpose of their own: which half runs when, and every derivative of both."""

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.kernels.linear import linear

M, X, D, C = (np.random.default_rng(i).standard_normal(s).astype(np.float32) for i, s in enumerate([(2, 3), 3, 3, 2]))


def times(m, x, calls):
    """m x, by `linear`; calls gets the names of the halves that are traced."""

    def forward(residuals, x):
        calls.append("forward")
        return (jnp.einsum("ij,j->i", residuals["m"], x),)

    def transpose(residuals, y):
        calls.append("transpose")
        return (jnp.einsum("ij,i->j", residuals["m"], y),)

    return linear(forward, transpose, {"m": m, "unused": 1}, [x], [jax.ShapeDtypeStruct((2,), x.dtype)])[0]


def ours(m, x):
    return times(jnp.sin(m), x, []) ** 2


def theirs(m, x):
    return jnp.einsum("ij,j->i", jnp.sin(m), x) ** 2


def derivatives(f):
    """What users ask for, of first and second order, by x and by m, in loops and batches."""
    by_x = lambda x: f(M, x)  # noqa: E731
    pulled = lambda m, x: jax.vjp(f, m, x)[1](C)  # noqa: E731
    pushed = lambda m, x: jax.jvp(f, (m, x), (M, D))[1]  # noqa: E731
    many = np.stack([X, D])
    loop = lambda x: jax.lax.scan(lambda x, m: (jnp.sum(f(m, x)) * x, None), x, np.stack([M, M]))[0]  # noqa: E731
    return {
        "jvp": pushed(M, X),
        "vjp": pulled(M, X),
        "jvp of vjp": jax.jvp(pulled, (M, X), (M, D))[1],
        "vjp of jvp": jax.vjp(pushed, M, X)[1](C),
        "vjp of vjp": jax.vjp(pulled, M, X)[1]((M, D)),
        "jvp of jvp": jax.jvp(pushed, (M, X), (M, D))[1],
        "columns": jax.jacfwd(by_x)(X),
        "rows": jax.jacrev(by_x)(X),
        "hessian": jax.hessian(by_x)(X),
        "batch of x": jax.vmap(lambda x: jax.grad(lambda x: jnp.sum(by_x(x)))(x))(many),
        "batch of m": jax.vmap(lambda m: pulled(m, X), in_axes=2)(np.stack([M, -M], axis=2)),
        "linearized": jax.linearize(by_x, X)[1](D),
        "loop forwards": jax.jvp(loop, (X,), (D,))[1],
        "loop": jax.vjp(loop, X)[1](D)[0],
        "worked out again": jax.grad(lambda x: jnp.sum(jax.checkpoint(by_x)(x)))(X),
    }


def test_all_derivatives_are_those_of_the_map():
    found, expected = jax.jit(lambda: (derivatives(ours), derivatives(theirs)))()
    for name, want in expected.items():
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_gradient_runs_the_transpose_and_a_jvp_the_map():
    calls = []
    f = jax.custom_jvp(lambda x: M @ x)
    f.defjvp(lambda x, dots: (M @ x[0], times(M, dots[0], calls)))
    jax.jit(jax.grad(lambda x: jnp.sum(f(x)))).lower(X)
    assert calls == ["transpose"]  # the map is not even traced
    calls.clear()
    jax.jit(lambda x, dot: jax.jvp(f, (x,), (dot,))).lower(X, D)
    assert calls == ["forward"]
