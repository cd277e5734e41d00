import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jvdiff.diffusion import classifier_free
from jvdiff.errors import UsageError

B, C = 2, 3
X = jax.random.normal(jax.random.key(0), (B, 4, C))
T = jnp.array([900.0, 30.0])
COND = {"text": jax.random.normal(jax.random.key(1), (B, C)), "mask": jnp.ones((B, 1, 1), bool), "image": None}
UNCOND = {"text": jax.random.normal(jax.random.key(2), (B, C)), "mask": jnp.zeros((B, 1, 1), bool), "image": None}
WEIGHT = jax.random.normal(jax.random.key(3), (C, C))


def network(weight, x, t, condition):
    v = jnp.tanh(x @ weight + condition["text"][:, None]) * (t / 1000)[:, None, None]
    return jnp.where(condition["mask"], v, v**2)


@pytest.mark.parametrize("mode", ("batched", "sequential"))
@pytest.mark.parametrize("scale", (0.0, 0.5, 4.0))
def test_formula(mode, scale):
    cond, uncond = network(WEIGHT, X, T, COND), network(WEIGHT, X, T, UNCOND)
    velocity = classifier_free(Partial(network, WEIGHT), COND, UNCOND, scale, mode)
    np.testing.assert_allclose(velocity(X, T), uncond + scale * (cond - uncond), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode,scale,batches", [("batched", 4.0, [4]), ("sequential", 4.0, [2, 2])])
def test_network_calls(mode, scale, batches):
    seen = []

    def counting(x, t, condition):
        seen.append(len(x))
        return network(WEIGHT, x, t, condition)

    classifier_free(counting, COND, UNCOND, scale, mode)(X, T)
    assert seen == batches
    for one in (1, 1.0):
        seen.clear()
        v = classifier_free(counting, COND, None, one, mode)(X, T)
        assert seen == [B]
        np.testing.assert_array_equal(v, network(WEIGHT, X, T, COND))


def test_parameters_and_scale_are_leaves():
    """What is a leaf is an argument of the compiled step: no constant in the program, no recompilation."""
    velocity = classifier_free(Partial(network, WEIGHT), COND, UNCOND, 4.0)
    leaves = jax.tree.leaves(velocity)
    assert any(leaf is WEIGHT for leaf in leaves) and 4.0 in [leaf for leaf in leaves if isinstance(leaf, float)]


@pytest.mark.parametrize("mode", ("batched", "sequential"))
def test_gradient_of_the_scale(mode):
    def total(scale):
        return classifier_free(Partial(network, WEIGHT), COND, UNCOND, scale, mode)(X, T).sum()

    want = (network(WEIGHT, X, T, COND) - network(WEIGHT, X, T, UNCOND)).sum()
    np.testing.assert_allclose(jax.grad(total)(3.0), want, rtol=1e-5)


def test_output_dtype_is_the_networks():
    velocity = classifier_free(lambda x, t, c: x.astype(jnp.bfloat16) * c, *jnp.ones((2, B, 1, 1), jnp.bfloat16), 3.0)
    assert velocity(X, T).dtype == jnp.bfloat16


def test_unequal_conditions_need_sequential():
    cond, uncond = jnp.ones((B, 5, C)), jnp.ones((B, 2, C))

    def pooled(x, t, text):
        return x + text.mean(1, keepdims=True)

    with pytest.raises(UsageError, match="sequential"):
        classifier_free(pooled, cond, uncond, 2.0)
    with pytest.raises(UsageError, match="sequential"):
        classifier_free(pooled, cond, None, 2.0)
    np.testing.assert_allclose(classifier_free(pooled, cond, uncond, 2.0, "sequential")(X, T), X + 1)


def test_unknown_mode():
    with pytest.raises(UsageError, match="parallel"):
        classifier_free(network, COND, UNCOND, 2.0, "parallel")
