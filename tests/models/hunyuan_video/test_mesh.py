"""HunyuanVideo's transformer on a mesh, with texts of two lengths: the numbers of one device, and little communication.

Eight fake CPU devices; what is counted is counted in the compiled program.
"""

import json
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.kernels import Dense, SlidingTile, patterns
from jvdiff.models.hunyuan_video import dit, names
from jvdiff.models.hunyuan_video.config import DiTConfig
from jvdiff.models.hunyuan_video.places import DIT
from jvdiff.sharding import Placement, Sizes, collectives, make_mesh, param_shardings, read_mesh, sequence
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


@pytest.fixture(scope="module")
def divided(params):
    return compiled(params, "fsdp=2,sequence=2,tensor=2")


def test_weights_heads_and_tokens_divided(params, divided):
    """One program with all three: each device has the numbers of diffusers."""
    program, weights = divided
    found = program(weights, *golden.inputs())
    assert found.sharding.is_fully_replicated
    close(found, golden.expected())
    held = program.memory_analysis().argument_size_in_bytes
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


class _Marked(Dense):
    """Dense attention whose result counts as often as its layer's number says."""

    def of_layers(self, timestep, layers, heads):
        return jnp.arange(layers, dtype=jnp.int32).reshape(-1, 1, 1) * jnp.ones((1, *timestep.shape), jnp.int32)

    def attend(self, *operands, chosen, **how):
        return super().attend(*operands, **how) * chosen[..., None, None].astype(jnp.float32)


@slower
def test_layers_are_numbered_from_the_double_blocks_on(params, divided):
    """What a pattern gives each of the double block and the two single ones is what their weights could do as well."""
    program, _ = compiled(params, pattern=_Marked())
    same = jax.tree.map(np.copy, params)
    for name in ("video_out", "text_out"):
        same["double"]["blocks"][name]["kernel"][0] = 0
    same["single"]["blocks"]["out"]["kernel"][1, : CFG.width] *= 2
    expected = divided[0](jax.device_put(same, jax.tree.map(lambda leaf: leaf.sharding, divided[1])), *golden.inputs())
    close(program(params, *golden.inputs()), expected)


@slower
def test_windows_go_with_the_heads(tmp_path):
    """Five heads on three devices; each clip has windows of its own, and a text of another length."""
    choices, numbers = ((1, 1, 1), (1, 1, 3), (2, 1, 1)), np.int32([[0, 1, 2, 1, 0], [2, 0, 0, 1, 2]])
    values = {"tile": (1, 2, 2), "canvas": (2, 2, 7), "choices": choices, "table": [[[0] * 5]], "timesteps": [900]}
    (tmp_path / "windows.json").write_text(json.dumps({"version": 1, "recorded": {}, **values}))
    pattern = patterns.read(f"windows:{tmp_path / 'windows.json'}", 5, 1)
    mesh = make_mesh(read_mesh("sequence=3"))
    split = Placement(mesh).split(Sizes(2, 28, 5, 8, dense=False))
    draw = np.random.default_rng(0).standard_normal
    video, text, lengths = draw((3, 2, 28, 5, 8), np.float32), draw((3, 2, 4, 5, 8), np.float32), np.int32([3, 1])

    def local(q, k, v, lengths, first, chosen):
        return pattern.attend(q, k, v, None, grid=(2, 2, 7), text_length=lengths, first_head=first, chosen=chosen)

    def shared(video, text):
        padded = jnp.pad(video, ((0, 0), (0, 0), (0, split.padding), (0, 0), (0, 0)))
        return sequence.joint_attention(local, split, (*padded,), (*text,), lengths, numbers=jnp.asarray(numbers))

    found = jnp.concatenate([x[:, :n] for x, n in zip(jax.jit(shared)(video, text), (28, 4), strict=True)], axis=1)
    for i, length in enumerate(lengths):
        one = SlidingTile((1, 2, 2), tuple(choices[n] for n in numbers[i]))
        q, k, v = np.concatenate([video, text[:, :, :length]], axis=2)[:, i : i + 1]
        expected = jax.jit(partial(one.attend, gate=None, grid=(2, 2, 7)))(q, k, v, text_length=np.full(1, length))
        close(found[i, : 28 + length], expected[0])
