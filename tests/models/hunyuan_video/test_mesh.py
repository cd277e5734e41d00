"""HunyuanVideo's transformer on a mesh, with texts of two lengths: the numbers of one device, and little communication.

Eight fake CPU devices; what is counted is counted in the compiled program.
"""

import json
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jvdiff.kernels import Dense, patterns
from jvdiff.models.hunyuan_video import dit, names
from jvdiff.models.hunyuan_video.config import DiTConfig
from jvdiff.models.hunyuan_video.places import DIT
from jvdiff.sharding import Placement, collectives, make_mesh, param_shardings, read_mesh
from jvdiff.weights import naming
from tests.goldens import make_hunyuan_dit as golden

CFG = DiTConfig.from_json(golden.CONFIG)
slower = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="more of the same, for make kernels")


@pytest.fixture(scope="module")
def params():
    abstract = dit.abstract_params(CFG)
    shapes = {name: entry.shape for name, entry in naming.expected(names.transformer(CFG), abstract).items()}
    tensors = {name: golden.tensor(name, shape) for name, shape in shapes.items()}
    source = SimpleNamespace(tensors=tensors, read=tensors.__getitem__)
    return naming.assemble(names.transformer(CFG), abstract, source)


def compiled(params, mesh=None, **how):
    """A program, and its weights."""
    placement = None
    if mesh is not None:
        shape = read_mesh(mesh)
        placement = Placement(make_mesh(shape), shape.ring)
        params = jax.device_put(params, param_shardings(placement.mesh, params, DIT))
    run = jax.jit(lambda params, *args: dit.velocity(params, CFG, *args, placement=placement, **how))
    return run.lower(params, *golden.inputs()).compile(), params


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_weights_heads_and_tokens_divided(params):
    """One program with all three: each device has the numbers of diffusers."""
    many, divided = compiled(params, "fsdp=2,sequence=2,tensor=2")
    found = many(divided, *golden.inputs())
    assert found.sharding.is_fully_replicated
    close(found, golden.expected())
    held = many.memory_analysis().argument_size_in_bytes
    assert held < 0.8 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@slower
def test_a_ring(params):
    """Eighteen tokens do not divide among eight devices. A block exchanges the video's heads, passes keys round, and
    gathers of all activations only the text's heads."""
    many, divided = compiled(params, "sequence=8,ring=4")
    close(many(divided, *golden.inputs()), golden.expected())
    found = [c for c in collectives.read(many.as_text()) if "single" in c.source and c.runs == CFG.num_single_layers]
    kinds = [c.kind for c in found]
    assert set(kinds) == {"all-to-all", "collective-permute", "all-gather"}
    assert kinds.count("all-to-all") == 4
    assert [c.result for c in found if c.kind == "all-gather"] == ["f32[2,5,4,8]"]


@slower
def test_a_table_of_windows_goes_with_the_heads(params, tmp_path):
    """Windows of two timesteps, three layers (a double block, then single ones) and four heads, which do not divide
    among three devices."""
    rows = [[[0, 1, 1, 0], [2, 2, 0, 1], [1, 0, 2, 2]], [[1, 1, 1, 2], [0, 0, 2, 2], [2, 1, 0, 0]]]
    values = {"tile": (1, 2, 3), "canvas": [3, 2, 3], "choices": [(1, 1, 1), (3, 1, 1), (2, 1, 1)], "table": rows}
    file = tmp_path / "windows.json"
    file.write_text(json.dumps({"version": 1, "recorded": {}, "timesteps": [900, 100], **values}))
    pattern = patterns.read(f"windows:{file}", CFG.num_attention_heads, CFG.layers)
    one, many = compiled(params, pattern=pattern)[0], compiled(params, "sequence=3", pattern=pattern)
    expected = np.asarray(one(params, *golden.inputs()))
    close(many[0](many[1], *golden.inputs()), expected)
    assert np.abs(expected - golden.expected()).max() > 0.01 * np.abs(expected).max()


@slower
def test_a_derivative_of_blocks_that_are_computed_again(params):
    """On a mesh that gathers weights; along a change of all weights, and of the latents."""
    random = np.random.default_rng(3)
    dot = jax.tree.map(lambda x: np.asarray(random.standard_normal(x.shape), np.float32) * np.float32(1e-2), params)
    latents, *rest = golden.inputs()

    def loss(params, latents, remat):
        return (dit.velocity(params, CFG, latents, *rest, pattern=Dense(), remat=remat) ** 2).mean()

    grads = jax.jit(jax.grad(partial(loss, remat=True), (0, 1)))(params, latents)
    value = jax.jit(partial(loss, remat=False))
    step = np.float32(1e-2)
    moved = lambda s: value(jax.tree.map(lambda x, d: x + s * d, params, dot), latents + s)  # noqa: E731
    along = sum(float(np.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (grads[0], dot)), strict=True))
    np.testing.assert_allclose(along + float(grads[1].sum()), (moved(step) - moved(-step)) / (2 * step), rtol=2e-3)
