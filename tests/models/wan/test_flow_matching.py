"""Flow matching on a tiny transformer and text encoder: what the loss means, and that all of both learn.

B batch · T latent frames · H W latent grid · C latent channels · S text tokens · D text width
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff import pipeline
from jvdiff.kernels import Dense, VideoSparse
from jvdiff.models import wan
from jvdiff.models.text import tokenizer, umt5
from jvdiff.models.wan import conditions, flow_matching
from jvdiff.training import loop

DIT = wan.DiTConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
)
TEXT = umt5.Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)


def batch(step=0):
    """Latents that repeat, and prompts of unequal lengths: five tokens, two, and the empty one."""
    rng = np.random.default_rng(step)
    mask = np.arange(6)[None] < np.array([5, 2, 1, 3])[:, None]
    ids = np.where(mask, rng.integers(3, 20, (4, 6)), 0).astype(np.int32)
    return flow_matching.Batch(np.random.default_rng(0).standard_normal((4, 2, 4, 6, 4)).astype(np.float16), ids, mask)


def task(**options):
    return flow_matching.text_to_video_task(DIT, TEXT, batch, **options)


@pytest.fixture(scope="module")
def run(random_params):
    """The state after the first step, and the loss of 60 steps on the same four clips."""
    abstract = {"transformer": wan.abstract_params(DIT), "text_encoder": umt5.abstract_params(TEXT, jnp.float32)}
    schedule = loop.Schedule(steps=60, learning_rate=5e-3, warmup=5, clip=1e3)
    step, values = loop.make_step(task(), schedule, jax.random.key(1)), []
    state = loop.start(task(), schedule, jax.random.key(0), random_params(abstract))
    for number in range(schedule.steps):
        state, metrics = step(state, batch())
        values.append(float(metrics["loss"]))
        if number == 0:
            first = jax.tree.map(np.array, state)
    return first, values


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_first_frame_that_is_given_is_clean_at_timestep_0_and_has_no_loss(monkeypatch, share):
    seen = {}

    def velocity(params, cfg, latents, timestep, text, **how):
        seen.update(latents=np.asarray(latents), timestep=np.asarray(timestep))
        return 1.0 + jnp.zeros_like(latents)

    monkeypatch.setattr(flow_matching, "encode_text", lambda *args: None)
    monkeypatch.setattr(wan, "velocity", velocity)
    empty, clips = {"transformer": None, "text_encoder": None}, batch()
    loss, _ = task(pictures=share).loss(empty, clips, jax.random.key(3))
    clean, x, t = clips.latents.astype(np.float32), seen["latents"], seen["timestep"]
    if share == 0:
        assert t.shape == (4,)
    t = np.broadcast_to(t.reshape(4, -1), (4, 2))
    given = t[:, 0] == 0
    assert given.sum() == {0.0: 0, 0.5: 2, 1.0: 4}[share] and (t[:, 1] > 0).all()
    np.testing.assert_array_equal(x[given, 0], clean[given, 0])
    level = t[:, :, None, None, None] / 1000
    aim = np.where(level > 0, (x - clean) / np.maximum(level, 1e-9), 0)  # x = clean + level (noise - clean)
    each = ((1 - aim) ** 2).mean((2, 3, 4))
    np.testing.assert_allclose(loss, np.where(given, each[:, 1], each.mean(1)).mean(), rtol=1e-5)


def test_the_exact_velocity_has_no_loss_and_an_offset_has_its_square(monkeypatch):
    """Given noise - clean at the network's own input, whatever sigma is: interpolation and target belong together."""
    seen = {}

    def exact(params, cfg, latents, timestep, text, **options):
        level = (timestep / 1000.0)[:, None, None, None, None]
        seen.update(timestep=timestep, options=options, text=text)
        return (latents - clean) / level + params["offset"]  # x_t = clean + sigma (noise - clean)

    monkeypatch.setattr(flow_matching.wan, "velocity", exact)
    monkeypatch.setattr(flow_matching.umt5, "encode", lambda params, cfg, ids, mask, **_: jnp.ones((*ids.shape, 16)))
    clean = batch().latents.astype(np.float32)
    for offset in (0.0, 0.5):
        tree = {"transformer": {"offset": jnp.float32(offset)}, "text_encoder": {}}
        value, metrics = task().loss(tree, batch(), jax.random.key(3))
        np.testing.assert_allclose(value, offset**2, atol=1e-6)
    assert set(metrics) == {"loss_noisy"} and 0 < seen["timestep"].min() <= seen["timestep"].max() < 1000
    assert seen["options"]["text_length"] == conditions.TEXT_LENGTH and seen["text"].shape == (4, 7, 16)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_are_logit_normal_and_shifted(monkeypatch, shift):
    monkeypatch.setattr(flow_matching.umt5, "encode", lambda params, cfg, ids, mask, **_: jnp.ones((*ids.shape, 16)))
    seen = []
    monkeypatch.setattr(
        flow_matching.wan, "velocity", lambda p, c, x, t, text, **options: seen.append(t / 1000.0) or jnp.zeros_like(x)
    )
    many = flow_matching.Batch(
        np.zeros((4096, 1, 1, 1, 1), np.float32), np.zeros((4096, 1), np.int32), np.ones((4096, 1), bool)
    )
    _, metrics = task(shift=shift).loss({"transformer": {}, "text_encoder": {}}, many, jax.random.key(0))
    plain = 1.0 / (1.0 + shift * (1.0 / np.asarray(seen[0], np.float64) - 1.0))  # the shift undone
    normal = np.log(plain / (1.0 - plain))
    assert abs(normal.mean()) < 0.06 and abs(normal.std() - 1.0) < 0.05
    np.testing.assert_allclose(metrics["loss_noisy"], 1.0, atol=0.1)  # of noise alone, whose variance is 1


def test_text_rows_are_those_of_the_pipeline(tiny_repository):
    """And so are the velocities, though the pipeline pads to a bucket: the last zero row stands for all the others."""
    pipe = pipeline.load(tiny_repository)
    prompts = ["a red seven moving left", "a blue two", ""]
    ids, mask, _ = tokenizer.tokenize(pipe.models.files["tokenizer"], prompts, 8)
    configs = pipe.models.configs
    rows = flow_matching.encode_text(pipe.weights["text_encoder"], configs["text_encoder"], ids, mask)
    clip = pipe.clip(guidance=3.0, negative_prompt="")
    inputs = pipe.family.inputs(pipe.models, clip, pipeline.make_request(pipe.family, clip, tuple(prompts[:2])))
    theirs, empty = pipeline.encode(pipe.context, clip, inputs, pipe.run)
    theirs = jnp.concatenate([theirs.text, empty.text[:1]])
    np.testing.assert_allclose(rows, theirs[:, :9], atol=1e-5)
    assert rows.shape[1] == 9 and theirs.shape[1] > 9 and not rows[:, -1].any() and not theirs[:, 9:].any()

    @jax.jit
    def velocity(text):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 2, 2, 4)), jnp.float32)
        t = jnp.array([900.0, 500.0, 20.0])
        return wan.velocity(
            pipe.weights["transformer"], configs["transformer"], x, t, text, text_length=conditions.TEXT_LENGTH
        )

    np.testing.assert_allclose(velocity(rows), velocity(theirs), atol=1e-5)


def test_every_parameter_gets_a_gradient_the_text_encoder_too(run):
    """Adam's first moment after one step is a tenth of the gradient."""
    gradient = run[0].optimizer[1][0].mu
    norms = {
        jax.tree_util.keystr(k): float(np.linalg.norm(g)) for k, g in jax.tree_util.tree_leaves_with_path(gradient)
    }
    assert all(0 < norm < np.inf for norm in norms.values()), norms
    assert {name.split("'")[1] for name in norms} == {"transformer", "text_encoder"} and len(norms) > 40


def test_it_learns_the_clips_it_is_shown(run):
    values = run[1]
    assert np.mean(values[-10:]) < 0.75 * np.mean(values[:5]), values


def test_each_pattern_is_a_program_and_is_what_the_network_gets(random_params, monkeypatch):
    """A pattern is no data: it takes part in what is compiled, once for each that occurs, in whatever order."""
    seen = []

    def network(params, cfg, latents, timestep, text, *, pattern, **options):
        seen.append(pattern)
        return latents * params["w"]

    monkeypatch.setattr(flow_matching.wan, "velocity", network)
    monkeypatch.setattr(flow_matching.umt5, "encode", lambda params, cfg, ids, mask, **_: jnp.ones((*ids.shape, 16)))
    step = loop.make_step(task(), loop.Schedule(steps=9, warmup=1), jax.random.key(0))
    tree = {"transformer": {"w": jnp.ones((1, 1, 1, 1, 4))}, "text_encoder": {"kernel": jnp.ones(1)}}
    state = loop.start(task(), loop.Schedule(steps=9, warmup=1), jax.random.key(0), tree)
    half, rest = VideoSparse((1, 2, 2), 0.5), VideoSparse((1, 2, 2), 0.75)
    for pattern in (half, half, rest, half, Dense(), rest):
        state, _ = step(state, dataclasses.replace(batch(), pattern=pattern))
    assert seen == [half, rest, Dense()] and int(state.step) == 6
    assert batch().pattern == Dense()


def test_a_gate_that_starts_at_zero_learns(random_params):
    cfg = dataclasses.replace(DIT, gate_compress=True)
    abstract = {"transformer": wan.abstract_params(cfg), "text_encoder": umt5.abstract_params(TEXT, jnp.float32)}
    tree = random_params(abstract)
    start = jax.tree.map(np.zeros_like, tree["transformer"]["blocks"]["self_attn"]["gate"])
    tree["transformer"]["blocks"]["self_attn"]["gate"] = start
    sparse = flow_matching.text_to_video_task(cfg, TEXT, batch)
    schedule = loop.Schedule(steps=2, warmup=0)
    shown = dataclasses.replace(batch(), pattern=VideoSparse((1, 1, 3), 0.5))
    state, _ = loop.make_step(sparse, schedule, jax.random.key(1))(
        loop.start(sparse, schedule, jax.random.key(0), tree), shown
    )
    gate = state.params["transformer"]["blocks"]["self_attn"]["gate"]
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(gate))
