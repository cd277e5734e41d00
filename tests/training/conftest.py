import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def random_params():
    """abstract tree -> float32 arrays, of which none is zero, so that nothing is idle; compiles nothing."""

    def make(abstract, seed=0):
        rng = np.random.default_rng(seed)

        def leaf(path, x):
            values = rng.standard_normal(x.shape, np.float32)
            wide = path[-1].key in ("kernel", "embedding")
            return values * (x.shape[-2:-1] or (1,))[0] ** -0.5 if wide else 0.1 * values + (path[-1].key == "scale")

        return jax.tree_util.tree_map_with_path(leaf, abstract)

    return make
