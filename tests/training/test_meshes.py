"""A training step of a small text-to-video model under every kind of mesh: the same numbers as on one device, the state
in shards, one compiled program, and a run that goes on under another mesh.

B batch · T latent frames · H W latent grid · C latent channels · S text tokens
"""

import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jvdiff.errors import UsageError
from jvdiff.models import wan
from jvdiff.models.text import umt5
from jvdiff.models.wan import flow_matching
from jvdiff.sharding import MeshShape, Placement, make_mesh
from jvdiff.training import fields, loop
from jvdiff.weights.naming import flatten

DIT = wan.DiTConfig(
    num_attention_heads=8,
    attention_head_dim=24,
    in_channels=4,
    out_channels=4,
    text_dim=192,
    freq_dim=192,
    ffn_dim=256,
    num_layers=2,
)
TEXT = umt5.Config(vocab_size=256, d_model=192, d_kv=24, d_ff=256, num_layers=2, num_heads=8)
SCHEDULE = loop.Schedule(steps=4, learning_rate=1e-3, warmup=0, clip=1e3)
MESHES = [MeshShape(data=2, fsdp=4), MeshShape(fsdp=2, tensor=2, sequence=2)]  # every axis


def test_a_mesh_of_other_devices_than_there_are_is_told_with_what_would_fit(monkeypatch):
    with pytest.raises(UsageError, match=r"loop.mesh data=16: it has 16 devices, and there are 8; name fewer"):
        fields.mesh(ConfigDict({"mesh": "data=16"}))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UsageError, match=r"expected all 8 of the 2 processes, for instance data=8"):
        fields.mesh(ConfigDict({"mesh": "data=2"}))


def batch(step=0):
    rng = np.random.default_rng(step)
    mask = np.arange(6)[None] < rng.integers(1, 6, 8)[:, None]
    ids = np.where(mask, rng.integers(3, 256, mask.shape), 0).astype(np.int32)
    return flow_matching.Batch(rng.standard_normal((8, 2, 4, 6, 4)).astype(np.float16), ids, mask)


def task(placement=None):
    return flow_matching.text_to_video_task(DIT, TEXT, batch, placement=placement)


@pytest.fixture(scope="module")
def params(random_params):
    return random_params({"transformer": wan.abstract_params(DIT), "text_encoder": umt5.abstract_params(TEXT)})


def two_steps(shape, params):
    """The state after one step, in host memory; the losses of two; one device's share of the state's bytes."""
    mesh = make_mesh(shape)
    placed = task(Placement(mesh, shape.ring))
    shardings = loop.state_shardings(mesh, placed, SCHEDULE)
    state = loop.start(placed, SCHEDULE, jax.random.key(0), params, shardings)
    kept = jax.tree.leaves((state.params, state.average, state.optimizer))
    share = sum(x.addressable_shards[0].data.nbytes for x in kept) / sum(x.nbytes for x in kept)
    step: Any = loop.make_step(placed, SCHEDULE, jax.random.key(1), shardings)
    step = step.lower(state, loop.shared(batch(0), mesh)).compile()  # one program, which takes what it gave
    state, metrics = step(state, loop.shared(batch(0), mesh))
    first = jax.tree.map(np.array, state)
    state, more = step(state, loop.shared(batch(1), mesh))
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    return first, [float(metrics["loss"]), float(more["loss"])], share


@pytest.fixture(scope="module")
def one_device(params):
    return two_steps(MeshShape(), params)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_step_is_the_same_on_any_mesh(one_device, params, shape):
    """The gradient too: Adam's first moment after one step is a tenth of it.

    Its first step is the gradient's sign, which rounding turns where a gradient is next to nothing: there, in less than
    a hundredth of a leaf, the step is not compared.
    """
    state, losses, share = two_steps(shape, params)
    np.testing.assert_allclose(losses[0], one_device[1][0], rtol=1e-5)
    np.testing.assert_allclose(losses[1], one_device[1][1], rtol=1e-4)
    new, old = flatten(state.params), flatten(one_device[0].params)
    moments, expected = flatten(state.optimizer[1][0].mu), flatten(one_device[0].optimizer[1][0].mu)
    for name in old:
        size = np.abs(expected[name])
        signed = (size == 0) | (size > 1e-4 * np.sqrt(np.mean(size**2)))
        assert signed.mean() > 0.99, name
        for a, b in ((moments[name], expected[name]), (new[name][signed], old[name][signed])):
            error = np.linalg.norm(a - b) / np.linalg.norm(b)
            assert error < 1e-5, (name, error)
    assert share < 1.15 / (shape.fsdp * shape.tensor)


def test_a_run_goes_on_under_another_mesh(tmp_path, caplog):
    """What one mesh saved another restores bit for bit, and trains on as it would have. Saving compiles nothing."""

    def init(key):
        one, two = jax.random.split(key)
        return {"up": {"kernel": jax.random.normal(one, (128, 256))}, "down": jax.random.normal(two, (256, 128))}

    def loss(params, batch, key):
        noisy = batch + 0.1 * jax.random.normal(key, batch.shape)
        return jnp.mean((jnp.tanh(noisy @ params["up"]["kernel"]) @ params["down"] - batch) ** 2), {}

    def clips(step):
        return np.random.default_rng(step).standard_normal((8, 128), np.float32)

    rules = ((r"up/kernel", P(None, "tensor")), (r"down", P("tensor")))

    def fit(shape, rules=rules):
        small, mesh = loop.Task(init, loss, loop.each(clips), rules), make_mesh(shape)
        return loop.fit(small, SCHEDULE, tmp_path, save_every=2, mesh=mesh)

    with jax.log_compiles():
        first = fit(MeshShape(data=2, fsdp=4))
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
    assert compiled[-1] == "step"
    assert first.average["down"].sharding.spec == P(None, ("fsdp0", "fsdp1"))
    there = fit(MeshShape(tensor=2, sequence=4))  # nothing left to do
    assert there.average["down"].sharding.mesh.shape["tensor0"] == 2
    jax.tree.map(np.testing.assert_array_equal, there, first)
    shutil.rmtree(tmp_path / "state" / "4")
    again = fit(MeshShape(fsdp=2, tensor=2, sequence=2))
    for new, old in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-6)
    with pytest.raises(LookupError, match="no sharding rule is about the leaf 'params/down'"):
        fit(MeshShape(fsdp=8), rules[:1])
