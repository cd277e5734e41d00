"""Rollouts on a tiny random pipeline: what a chunk is, that the cache is all the state there is, that nothing is
compiled twice.

B rollouts · T latent frames of a chunk · H W latent grid · C latent channels · S text tokens.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jvdiff
from jvdiff import diffusion, streaming
from jvdiff.diffusion import schedules
from jvdiff.errors import CheckpointError, IntegrityError, UsageError
from jvdiff.models import wan
from jvdiff.models.text import umt5
from jvdiff.models.wan import places
from jvdiff.models.wan.rollout import ROLLOUT, SELF_FORCING_WAN_2_1_T2V_1_3B
from jvdiff.runtime import run_state
from jvdiff.sharding import Placement, make_mesh, param_shardings, read_mesh
from jvdiff.streaming import derive_config
from jvdiff.streaming.codec import concatenated, stamped
from tests.forks import Process

NETWORK = wan.DiTConfig(
    num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=16,
    num_layers=2, causal=True,
)  # fmt: skip
VAE = wan.VAEConfig(
    base_dim=4, dim_mult=(1, 1), num_res_blocks=1, temperal_downsample=(True,), z_dim=4,
    latents_mean=(0.5, -0.5, 0.1, 0.0), latents_std=(2.0, 1.0, 0.5, 1.5),
)  # fmt: skip
# Chunks of two frames see one frame of the sink and two of the past; of the ring a slot is overwritten from chunk 2 on.
LATENTS = streaming.StreamInferencePipelineConfig(
    "tiny",
    streaming.DiffusionModelConfig(
        streaming.TransformerConfig(
            network=NETWORK, text_encoder=umt5.Config(d_model=8), height=4, width=6, len_t=2, window_size_t=4,
            sink_size_t=1, text_length=6, text_rows=4,
        ),
        streaming.FlowMatchSchedulerConfig(2, 5.0, (1000, 500)),
    ),
)  # fmt: skip
PIXELS = derive_config(LATENTS, decoder=streaming.StreamingVideoDecoder(VAE))
CHUNKS = 4


@functools.cache
def weights(network=NETWORK):
    """Parameters that are all nonzero, so that no layer is idle."""
    random = np.random.default_rng(0)

    def fill(path, leaf):
        values = random.standard_normal(leaf.shape, np.float32) * np.float32(
            max(math.prod(leaf.shape[-2:-1]), 4) ** -0.5
        )
        return jnp.asarray(values + np.float32("scale" in jax.tree_util.keystr(path)))

    return {
        name: jax.tree_util.tree_map_with_path(fill, wan.abstract_params(cfg))
        for name, cfg in (("transformer", network), ("vae", VAE))
    }


def text(seed, batch=1, rows=3):
    return np.random.default_rng(seed).standard_normal((batch, rows, NETWORK.text_dim), np.float32)


def rollout(pipe, cache, chunks=range(CHUNKS), inputs=None):
    """Frames of each chunk, latents of each, the cache at the end; a mapping gives chunks their inputs."""
    frames, latents = [], []
    for i in chunks:
        made, cache, final = pipe.generate(i, cache, (inputs or {}).get(i))
        cache, _ = pipe.finalize(i, cache, final)
        frames.append(np.asarray(made))
        latents.append(np.asarray(final.latents))
    return frames, latents, cache


def same(one, other):
    """Bit for bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def close(found, expected, limit=1e-5):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=limit * np.abs(np.asarray(other)).max())


class Compilations(list):
    """The names of the programs of a rollout that are compiled in a `with` block."""

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self.listen)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self.listen)

    def listen(self, event, _, fun_name="", **__):
        names = ("encode", "diffuse", "decode", "finalize", "reencode")
        if event == "/jax/core/compile/backend_compile_duration":
            self.extend(name for name in names if fun_name == f"jit({name})")


# ------------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize(
    "config",
    [
        PIXELS,
        SELF_FORCING_WAN_2_1_T2V_1_3B,
        derive_config(PIXELS, encoder=streaming.ImageEncoder(VAE)),
        derive_config(LATENTS, encoder=streaming.NullEncoder(), diffusion_model=dict(context_noise=128.0)),
        derive_config(LATENTS, diffusion_model=dict(scheduler=streaming.UniPCSchedulerConfig(7))),
    ],
    ids=lambda config: config.name,
)
def test_a_configuration_is_a_value(config):
    again = streaming.config_from_json(json.loads(json.dumps(streaming.to_json(config))), ROLLOUT)
    assert again == config and hash(again) == hash(config) and again.digest == config.digest
    assert repr(again) == repr(config) and "len_t=" in repr(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "another"
    quiet = derive_config(config, name="another", diffusion_model=dict(seed=9), enable_sync_and_profile=True)
    assert quiet != config and quiet.digest == config.digest
    assert derive_config(config, diffusion_model=dict(transformer=dict(sink_size_t=9))).digest != config.digest


def test_derived_configurations():
    config = derive_config(PIXELS, decoder=None, diffusion_model=dict(scheduler=dict(shift=8.0), seed=3))
    assert config.diffusion_model.scheduler == streaming.FlowMatchSchedulerConfig(2, 8.0, (1000, 500))
    assert (config.diffusion_model.seed, config.decoder, config.name) == (3, None, "tiny")
    assert derive_config(config, decoder=PIXELS.decoder, diffusion_model=PIXELS.diffusion_model) == PIXELS
    with pytest.raises(KeyError, match=r"no field diffusion_model.scheduler.shft \(did you mean shift\?\)"):
        derive_config(PIXELS, diffusion_model=dict(scheduler=dict(shft=8.0)))
    with pytest.raises(
        KeyError, match="no field zzz; StreamInferencePipelineConfig has name, diffusion_model, encoder"
    ):
        derive_config(PIXELS, zzz=1)
    with pytest.raises(
        TypeError, match=r"diffusion_model.seed is 0, which has no fields; give a value instead of {'a': 1}"
    ):
        derive_config(PIXELS, diffusion_model=dict(seed=dict(a=1)))


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (dict(transformer=dict(height=5)), "height of the latents is 5; expected a multiple of 2"),
        (dict(transformer=dict(window_size_t=1)), "a window of at least one chunk"),
        (dict(transformer=dict(window_size_t=None)), "window"),
        (dict(transformer=dict(text_rows=7)), "text_rows is 7; expected 1 to text_length, 6"),
        (dict(transformer=dict(guidance_scale=0.5)), "guidance_scale is 0.5; expected 1 .none. to 100"),
        (dict(transformer=dict(first_guidance_scale=0.5)), "first_guidance_scale is 0.5; expected 1 .none. to 100"),
        (dict(scheduler=dict(num_inference_steps=3)), "num_inference_steps is 3, and there are 2 denoising_timesteps"),
        (dict(context_noise=1001.0), "context_noise is 1001.0; expected a timestep from 0 to 1000"),
        (dict(sink_noise=-1.0), "sink_noise is -1.0; expected a timestep from 0 to 1000"),
        (
            dict(
                scheduler=streaming.FlowMatchSchedulerConfig(1, 5.0, (100,), num_train_timesteps=100), sink_noise=101.0
            ),
            "sink_noise is 101.0; expected a timestep from 0 to 1000, of a sigma from 0 to 1",
        ),
        (
            dict(transformer=dict(network=dataclasses.replace(NETWORK, in_channels=8))),
            "takes 8 channels; with no encoder",
        ),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(patch, message):
    with pytest.raises(UsageError, match=message):
        derive_config(LATENTS, diffusion_model=patch)


@pytest.mark.parametrize("scheduler", [streaming.FlowMatchSchedulerConfig(), streaming.UniPCSchedulerConfig(3)])
def test_the_noise_of_a_timestep_depends_on_no_step(scheduler):
    for timestep in (0, 25, 128, 300, 999, 1000):
        assert scheduler.noise_level(timestep) == timestep / 1000


def test_a_configuration_saved_without_noise_of_the_sink_has_that_of_the_ring():
    value = streaming.to_json(derive_config(LATENTS, diffusion_model=dict(context_noise=128.0)))
    del value["diffusion_model"]["sink_noise"]
    model = streaming.config_from_json(value, ROLLOUT).diffusion_model
    assert (model.context_noise, model.sink_noise) == (128, None)


def test_a_configuration_in_json_that_cannot_be_is_refused():
    for change, message in (
        ({"class": "Path"}, "has the class 'Path'; expected one of StreamInferencePipelineConfig"),
        ({"nme": 1}, "a configuration of StreamInferencePipelineConfig cannot be read.*nme"),
        ({"class": "NullEncoder"}, "a configuration of NullEncoder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            streaming.config_from_json(streaming.to_json(LATENTS) | change, ROLLOUT)
    with pytest.raises(CheckpointError, match="this is a configuration of FlowMatchSchedulerConfig, expected a whole"):
        streaming.config_from_json(streaming.to_json(LATENTS.diffusion_model.scheduler), ROLLOUT)


# ------------------------------------------------------------------------------------------------ a chunk, made by hand


def by_hand(config, seed, texts, payloads=None, chunks=3):
    """Latents of each chunk for B = 1, in the words of the papers: the clean latents are estimated and noised anew, and
    at the end the network sees them once more. `texts`: of the prompt, and of the negative one."""
    model, payloads = config.diffusion_model, payloads or [None] * chunks
    cfg, params = model.transformer, weights(model.transformer.network)["transformer"]
    velocity = jax.jit(lambda *a: wan.chunk_velocity(params, cfg.network, cfg.span, *a))
    extend = jax.jit(lambda *a: wan.extend(params, cfg.network, cfg.span, *a))
    text_keys = jax.jit(lambda text: wan.text_keys(params, cfg.network, text))
    keys = [text_keys(np.pad(t, ((0, 0), (0, cfg.text_length - t.shape[1]), (0, 0)))) for t in texts]
    pasts = [wan.init_kv_cache(cfg.network, cfg.span, 1, (cfg.height, cfg.width)) for _ in texts]
    shift, shape = model.scheduler.shift, (1, cfg.len_t, cfg.height, cfg.width, 4)
    concatenates, out = cfg.network.in_channels > 4, []

    def flow(x, t):
        x = concatenated(payload, x) if concatenates else stamped(payload, x)
        v = [velocity(x, t, key, past) for key, past in zip(keys, pasts, strict=True)]
        scale = cfg.guidance_scale if i or cfg.first_guidance_scale is None else cfg.first_guidance_scale
        return v[0] if len(v) == 1 else v[1] + scale * (v[0] - v[1])

    for i, payload in zip(range(chunks), payloads, strict=True):
        key = jax.random.fold_in(jax.random.key(seed), i)
        x = jax.random.normal(jax.random.fold_in(key, 0), shape)
        if isinstance(model.scheduler, streaming.UniPCSchedulerConfig):
            steps = model.scheduler.num_inference_steps
            solver = diffusion.unipc(schedules.make(steps, shift=shift, grid="training"))
            state = solver.init(x)
            for step, t in enumerate(solver.timesteps):
                state = solver.step(state, step, flow(state.x, jnp.full(1, t)))
            x = state.x
        else:
            sigmas = [shift * s / (1 + (shift - 1) * s) for s in np.array(model.scheduler.denoising_timesteps) / 1000]
            for step, (sigma, after) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True), 1):
                x = x - sigma * flow(x, jnp.full(1, 1000 * sigma, jnp.float32))
                if after:
                    noise = jax.random.normal(jax.random.fold_in(key, step), shape)
                    x = (1 - after) * x + after * noise
        x = x if concatenates else stamped(payload, x)
        out.append(np.asarray(x))
        sink = model.context_noise if model.sink_noise is None else model.sink_noise
        frames = range(i * cfg.len_t, (i + 1) * cfg.len_t)
        t = jnp.array([[sink if frame < cfg.sink_size_t else model.context_noise for frame in frames]], jnp.float32)
        noise = jax.random.normal(jax.random.fold_in(key, model.scheduler.num_inference_steps + 1), shape)
        sigma = t[:, :, None, None, None] / 1000
        x = (1 - sigma) * x + sigma * noise
        given = concatenated(payload, x) if concatenates else x
        pasts = [extend(given, t, key, past) for key, past in zip(keys, pasts, strict=True)]
    return out


@pytest.mark.parametrize(
    "patch",
    [
        dict(
            transformer=dict(guidance_scale=3.0, apply_rope_before_kvcache=False), context_noise=600.0, sink_noise=25.0
        ),
        dict(transformer=dict(window_size_t=2, sink_size_t=0), scheduler=streaming.UniPCSchedulerConfig(3)),
        dict(
            transformer=dict(first_guidance_scale=4.0), scheduler=streaming.UniPCSchedulerConfig(2), context_noise=128.0
        ),
    ],
    ids=["guided, ring and sink noised, relative rotation", "UniPC, no past", "UniPC, guided at first, noised context"],
)
def test_a_rollout_is_what_the_papers_say(patch):
    config = derive_config(LATENTS, diffusion_model=patch)
    texts = [text(1), text(2)][: 2 if "guidance_scale" in str(patch) else 1]
    pipe = config.setup(weights())
    cache = pipe.initialize_cache(jax.random.key(5), text=np.concatenate(texts))
    frames, latents, _ = rollout(pipe, cache, range(3))
    same(frames, latents)  # there is no decoder
    close(latents, by_hand(config, 5, texts))


def given_to(name):
    """(encoder, channels of the network, inputs of the chunks)."""
    random = np.random.default_rng(3)
    pixels = lambda *frames: random.integers(0, 256, (1, *frames, 8, 12, 3)).astype(np.uint8)  # noqa: E731
    return {
        "stamp": (streaming.ImageEncoder(VAE), 4, {0: pixels()}),
        "concat": (streaming.ImageEncoder(VAE, "concat"), 10, {0: pixels()}),
        "video": (streaming.StreamingVideoEncoder(VAE), 8, {0: pixels(3), 1: pixels(4), 2: pixels(4)}),
    }[name]


@pytest.mark.parametrize("name", ["stamp", "concat", "video"])
def test_what_an_encoder_gives_is_seen_by_the_network(name):
    encoder, channels, inputs = given_to(name)
    network = dataclasses.replace(NETWORK, in_channels=channels)
    config = derive_config(LATENTS, encoder=encoder, diffusion_model=dict(transformer=dict(network=network)))
    pipe = config.setup(weights(network))
    cache = pipe.initialize_cache(7, text=text(1))
    with Compilations() as names:
        ahead = [program for program, _ in pipe.compile(cache, inputs[0])]
        _, latents, after = rollout(pipe, cache, range(3), inputs)
    assert ahead == ["encode first", "encode next", "diffuse", "finalize"]
    assert sorted(names) == ["diffuse", "encode", "encode", "finalize"]
    described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert described(after) == described(pipe.abstract_cache(1))

    payloads, held = [], None
    for i in range(3):
        payload, held = pipe.programs.encode(pipe.params["vae"], inputs.get(i), held)
        payloads.append(payload)
    close(latents, by_hand(config, 7, [text(1)], payloads))
    if name == "stamp":
        close([latents[0][:, 0]], [payloads[0]["latent"][:, 0]])
        with pytest.raises(UsageError, match="only chunk 0 takes a picture"):
            pipe.generate(3, after, inputs[0])
        # What is encoded already passes as it is.
        encoded = derive_config(config, encoder=streaming.NullEncoder()).setup(weights(network))
        again = rollout(encoded, encoded.initialize_cache(7, text=text(1)), range(3), dict(enumerate(payloads)))
        close(again[1], latents)
        with pytest.raises(
            UsageError, match=r"the encoder gives no latent; chunks of these rollouts are \[1, 2, 4, 6, 4"
        ):
            encoded.generate(0, encoded.initialize_cache(7, text=text(1)), {"mask": payloads[0]["mask"]})
        with pytest.raises(UsageError, match="so every chunk takes an input, found None"):
            encoded.generate(0, encoded.initialize_cache(7, text=text(1)))
    if name == "video":
        with pytest.raises(UsageError, match="chunk 0 of 2 latent frames takes 3 pixel frames, found 4"):
            pipe.generate(0, pipe.initialize_cache(7, text=text(1)), inputs[1])
    fresh = pipe.initialize_cache(7, text=text(1))
    with pytest.raises(UsageError, match="found None"):
        pipe.generate(0, fresh)
    for small in (inputs[0][..., :7, :, :], inputs[0][..., :8, :], np.concatenate([inputs[0]] * 2)):
        with pytest.raises(
            UsageError, match=r"the input is .*; expected \[1,...,8,12,3\], the height and width of the frames"
        ):
            pipe.generate(0, fresh, small)


# ----------------------------------------------------------------------------------------------------- state is a value


@dataclasses.dataclass
class Story:
    """Two rollouts, each alone: frames of each chunk, and the cache before each and at the end."""

    pipe: streaming.StreamInferencePipeline
    frames: dict
    caches: dict
    compiled: list


BEGINNINGS = {"one": (0, 1), "two": (1, 2)}  # key, text


@pytest.fixture(scope="module")
def story():
    pipe = PIXELS.setup(weights())
    frames, caches = {}, {}
    with Compilations() as names:
        for name, (key, words) in BEGINNINGS.items():
            cache = pipe.initialize_cache(key, text=text(words))
            frames[name], caches[name] = [], [streaming.copy(cache)]
            for i in range(CHUNKS):
                made, _, cache = rollout(pipe, cache, [i])
                frames[name] += made
                caches[name].append(streaming.copy(cache))
    return Story(pipe, frames, caches, list(names))


def test_shapes_of_pixels(story):
    assert [f.shape for f in story.frames["one"]] == [(1, 3, 8, 12, 3), *[(1, 4, 8, 12, 3)] * 3]
    assert all(f.dtype == np.uint8 and f.std() > 1 for f in story.frames["one"])
    assert not np.array_equal(story.frames["one"][1], story.frames["two"][1])
    for count, cache in enumerate(story.caches["one"]):
        assert int(cache.generated) == int(cache.finalized) == count
        described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
        assert described(cache) == described(story.pipe.abstract_cache(1, begun=count > 0))


def test_a_program_is_compiled_once(story):
    """Whatever the number of chunks, rollouts, prompts; and resumed from numpy arrays."""
    assert sorted(story.compiled) == ["decode", "decode", "diffuse", "finalize"]
    with Compilations() as names:
        cache = jax.tree.map(np.asarray, story.caches["one"][1])
        cache = story.pipe.set_prompts(cache, text=text(9))
        _, _, cache = rollout(story.pipe, cache, [1, 2])
        _, _, cache = rollout(story.pipe, jax.tree.map(np.asarray, cache), [3, 4])
        assert names == []
        story.pipe.set_prompts(cache, text=text(9), reencode=True)
        cache = story.pipe.set_prompts(story.pipe.initialize_cache(0, text=text(3)), text=text(9), reencode=True)
        rollout(story.pipe, cache, [0])
    assert names == ["reencode"]


def test_all_programs_can_be_compiled_ahead():
    config = derive_config(PIXELS, diffusion_model=dict(scheduler=dict(shift=7.0)))
    pipe = config.setup(weights())
    cache = pipe.initialize_cache(0, text=text(1))
    with Compilations() as names:
        ahead = [name for name, _ in pipe.compile(cache)]
        assert sorted(names) == sorted(name.split()[0] for name in ahead)
        assert ahead == ["diffuse", "decode first", "decode next", "finalize"]
        rollout(pipe, cache, range(2))
    assert len(names) == 4


def test_generate_reads_the_cache_and_leaves_it(story):
    before = story.caches["one"][2]
    held = jax.tree.map(np.array, before)
    for _ in range(2):
        frames, after, _ = story.pipe.generate(2, before)
        np.testing.assert_array_equal(frames, story.frames["one"][2])
        same(jax.tree.map(np.asarray, before), held)
    assert int(after.generated) == 3 and after.past is before.past and after.history is before.history


def test_interleaved_rollouts_are_the_two_alone(story):
    caches = {name: streaming.copy(story.caches[name][0]) for name in BEGINNINGS}
    for i in range(CHUNKS):
        waiting = {}
        for name in BEGINNINGS:
            frames, caches[name], waiting[name] = story.pipe.generate(i, caches[name])
            np.testing.assert_array_equal(frames, story.frames[name][i])
        for name in reversed(BEGINNINGS):
            caches[name], statistics = story.pipe.finalize(i, caches[name], waiting[name])
            assert statistics == {}
    for name in BEGINNINGS:
        same(caches[name], story.caches[name][-1])


def test_a_fork_shares_its_past_and_goes_its_own_way(story):
    at = 2
    one, other = (streaming.copy(story.caches["one"][at]) for _ in range(2))
    other = story.pipe.set_prompts(other, text=text(2))
    same((one.past, one.history, one.decoder), (other.past, other.history, other.decoder))
    left, _, _ = rollout(story.pipe, one, range(at, CHUNKS))
    right, _, _ = rollout(story.pipe, other, range(at, CHUNKS))
    same(left, story.frames["one"][at:])
    assert all(not np.array_equal(x, y) for x, y in zip(left, right, strict=True))


def test_a_prompt_that_comes_back_changed_nothing(story):
    for at in range(CHUNKS):
        cache = streaming.copy(story.caches["one"][at])
        for words in (2, BEGINNINGS["one"][1]):
            cache = story.pipe.set_prompts(cache, text=text(words))
        same(rollout(story.pipe, cache, [at])[0], story.frames["one"][at : at + 1])


def test_a_past_that_is_reencoded():
    """Under the same prompt it is what it was; under another, as if the same latents had been made under that one."""
    patch = dict(transformer=dict(window_size_t=8), context_noise=600.0, sink_noise=25.0)
    pipe = derive_config(LATENTS, diffusion_model=patch).setup(weights())
    begun = [pipe.initialize_cache(4, text=text(words)) for words in (1, 2)]
    for i in range(2):  # both finalize the latents of the first
        _, begun[0], final = pipe.generate(i, begun[0])
        begun[1] = dataclasses.replace(begun[1], generated=begun[0].generated)
        begun = [pipe.finalize(i, cache, final)[0] for cache in begun]
    filled = lambda past: [np.asarray(x)[:, :, :4] for x in (past.keys, past.values)]  # noqa: E731
    one, two = (filled(cache.past) for cache in begun)
    assert np.abs(one[0] - two[0]).max() > 0.01
    again = pipe.set_prompts(begun[0], text=text(1), reencode=True)
    close(filled(again.past), one)
    changed = pipe.set_prompts(again, text=text(2), reencode=True)
    close(filled(changed.past), two)
    same(changed.text, begun[1].text)
    close(pipe.generate(2, changed)[0], pipe.generate(2, begun[1])[0])
    with pytest.raises(UsageError, match="this cache was given to"):
        pipe.generate(2, again)


def resume(folder):
    """In a process of its own: every state in the folder goes on to the end, and what it makes is written beside it."""
    pipe = PIXELS.setup(weights())
    for path in sorted(Path(folder).glob("*.state")):
        state = run_state.load(path)
        run_state.check_same(state.facts, {"config": PIXELS.digest}, str(path))
        cache = run_state.unflatten(pipe.abstract_cache(1, begun=state.done > 0), state.arrays)
        frames, _, cache = rollout(pipe, cache, range(state.done, CHUNKS))
        np.savez(path.with_suffix(".npz"), *frames)
        run_state.save(path.with_suffix(".end"), run_state.RunState({}, CHUNKS, run_state.flatten(cache)))


def test_a_saved_rollout_goes_on_bit_for_bit_in_a_new_process(story, tmp_path):
    for done in range(CHUNKS):
        arrays = run_state.flatten(story.caches["one"][done])
        state = run_state.RunState({"config": PIXELS.digest}, done, arrays)
        run_state.save(tmp_path / f"{done}.state", state)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_rollout; test_rollout.resume(sys.argv[2])"
    process = Process("-c", code, Path(__file__).parent, tmp_path)
    assert process.wait() == 0, process.err
    for at in range(CHUNKS):
        frames = np.load(tmp_path / f"{at}.npz")
        same([frames[name] for name in frames.files], story.frames["one"][at:])
        end = run_state.load(tmp_path / f"{at}.end")
        same(run_state.unflatten(story.pipe.abstract_cache(1), end.arrays), story.caches["one"][-1])


def test_a_saved_state_that_is_damaged_or_of_another_configuration_is_refused(story, tmp_path):
    arrays = run_state.flatten(story.caches["one"][1])
    folder = run_state.save(tmp_path / "a.state", run_state.RunState({}, 1, arrays))
    content = (folder / "state.bin").read_bytes()
    for damaged in (content[:-1], content[:100] + bytes([content[100] ^ 1]) + content[101:]):
        (folder / "state.bin").write_bytes(damaged)
        with pytest.raises(IntegrityError, match=r"state.bin.*\nThe saved state is damaged"):
            run_state.load(folder)
    longer = derive_config(PIXELS, diffusion_model=dict(transformer=dict(window_size_t=6))).setup(weights())
    with pytest.raises(
        CheckpointError, match=r"the saved state belongs to another configuration:\n.*past.keys: found flo"
    ):
        run_state.unflatten(longer.abstract_cache(1), arrays)
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        run_state.unflatten(story.pipe.abstract_cache(1, begun=False), arrays)


# --------------------------------------------------------------------------------------------------------- bad input


def test_what_is_out_of_turn_is_told_and_nothing_is_lost(story):
    pipe = story.pipe
    fresh, begun = story.caches["one"][0], streaming.copy(story.caches["one"][1])
    for index in (1, 2, -1):
        with pytest.raises(UsageError, match=f"generate was called for chunk {index}; expected 0"):
            pipe.generate(index, fresh)
    with pytest.raises(
        UsageError, match="finalize was called for chunk 0, and all 0 chunks that were generated are fin"
    ):
        pipe.finalize(0, fresh, None)
    _, after, final = pipe.generate(1, begun)
    for index in (1, 2):
        with pytest.raises(UsageError, match="chunk 1 was generated and is not finalized; finalize it before the next"):
            pipe.generate(index, after)
    with pytest.raises(UsageError, match="chunk 1 is not finalized yet; change prompts after that"):
        pipe.set_prompts(after, text=text(2))
    with pytest.raises(UsageError, match="finalize was called for chunk 0; expected 1"):
        pipe.finalize(0, after, final)
    _, _, earlier = pipe.generate(0, fresh)
    with pytest.raises(UsageError, match=r"finalize\(1\) was given what generate\(0\) made"):
        pipe.finalize(1, after, earlier)
    with pytest.raises(UsageError, match=r"finalize\(1\) was given a chunk of latents \[1, 2, 4, 4, 4\]"):
        pipe.finalize(1, after, dataclasses.replace(final, latents=final.latents[:, :, :, :4]))
    with pytest.raises(UsageError, match="this configuration has no encoder; leave it out"):
        pipe.generate(1, begun, np.zeros((1, 8, 12, 3), np.uint8))
    end, _ = pipe.finalize(1, after, final)
    for used in (begun, after):
        with pytest.raises(UsageError, match="this cache was given to finalize, which took its memory"):
            pipe.generate(1, used)
    with pytest.raises(
        UsageError, match="finalize was called for chunk 1, and all 2 chunks that were generated are final"
    ):
        pipe.finalize(1, end, final)
    same(end, story.caches["one"][2])
    other = derive_config(PIXELS, diffusion_model=dict(context_noise=1.0)).setup(weights())
    with pytest.raises(
        UsageError, match=f"of another configuration .{PIXELS.digest}.; expected one of {other.config.digest}"
    ):
        other.generate(2, end)


def test_texts_and_keys_that_cannot_be(story):
    pipe = story.pipe
    with pytest.raises(UsageError, match=r"text is \[1, 3, 7\]; expected \[B,S,8\]"):
        pipe.initialize_cache(0, text=text(1)[..., :7])
    with pytest.raises(UsageError, match="more than 4 tokens, which is text_rows; shorten it"):
        pipe.initialize_cache(0, text=text(1, rows=5))
    with pytest.raises(UsageError, match="give either prompts or text rows"):
        pipe.initialize_cache(0)
    with pytest.raises(UsageError, match="without a tokenizer; give text rows in place of prompts"):
        pipe.initialize_cache(0, ["a red seven"])
    with pytest.raises(UsageError, match="there are 2 prompts; this cache is of 1 rollouts"):
        pipe.set_prompts(story.caches["one"][1], text=text(1, batch=2))
    with pytest.raises(UsageError, match="seed is -1; expected a whole number from 0"):
        pipe.initialize_cache(-1, text=text(1))
    with pytest.raises(UsageError, match=r"key is .*; expected one key of jax.random"):
        pipe.initialize_cache(jax.random.split(jax.random.key(0)), text=text(1))
    zeros = np.concatenate([text(1), np.zeros((1, 9, 8), np.float32)], axis=1)  # what an encoder pads with
    same(pipe.initialize_cache(np.int64(0), text=zeros), pipe.initialize_cache(jax.random.key(0), text=text(1)))
    same(pipe.initialize_cache(text=text(1)), pipe.initialize_cache(0, text=text(1)))  # the configuration's seed


def test_prompts(tiny_repository):
    loaded = jvdiff.load(tiny_repository)
    configs = loaded.models.configs
    patch = dict(network=configs["transformer"], text_encoder=configs["text_encoder"], text_length=512, text_rows=8)
    config = derive_config(LATENTS, diffusion_model=dict(transformer=patch))
    pipe = config.setup(loaded.weights, loaded.models.files["tokenizer"])
    cache = pipe.initialize_cache(0, ["a red seven", "blue two"])
    _, latents, cache = rollout(pipe, cache, range(1))
    assert latents[0].shape == (2, 2, 4, 6, 4) and not np.array_equal(latents[0][0], latents[0][1])
    turned = pipe.set_prompts(cache, ["blue two", "a red seven"])
    np.testing.assert_array_equal(turned.text[0][:, 0], cache.text[0][:, 1])
    for bad, message in (
        ("a red seven", "prompts are 'a red seven'; expected a list of at least one"),
        ([], r"prompts are \[\]; expected a list of at least one"),
        (["a red seven moving left a red seven moving left"], "a prompt has more than 8 tokens, which is text_rows"),
        (["two", 3], "prompt"),
    ):
        with pytest.raises(UsageError, match=message):
            pipe.initialize_cache(0, bad)
    with pytest.raises(UsageError, match="there are 1 prompts; this cache is of 2 rollouts"):
        pipe.set_prompts(cache, ["two"])


# ---------------------------------------------------------------------------------------- many devices, and rounding


@pytest.mark.parametrize(
    ("config", "mesh", "batch"), [(PIXELS, "sequence=8", 1), (LATENTS, "data=2,sequence=2,tensor=2", 2)]
)
def test_one_device_equals_eight(config, mesh, batch):
    shape = read_mesh(mesh)
    placement = Placement(make_mesh(shape), shape.ring)
    params = dict(weights())
    one = config.setup(params)
    expected = rollout(one, one.initialize_cache(0, text=text(1, batch)), range(3))
    where = param_shardings(placement.mesh, params["transformer"], places.DIT)
    params["transformer"] = jax.device_put(params["transformer"], where)
    params["vae"] = jax.device_put(params["vae"], placement.everywhere)
    pipe = config.setup(params, placement=placement)
    with Compilations() as names:
        cache = pipe.initialize_cache(0, text=text(1, batch))
        frames, latents, cache = rollout(pipe, cache, range(2))
        cache = pipe.set_prompts(cache, text=text(1, batch))
        last = rollout(pipe, cache, range(2, 3))
    assert sorted(names) == ["decode"] * 2 * (config is PIXELS) + ["diffuse", "finalize"]
    close(latents + last[1], expected[1])
    if config is PIXELS:
        pixels = zip(frames + last[0], expected[0], strict=True)
        assert all(np.abs(x.astype(int) - y).max() <= 1 for x, y in pixels)


def test_what_bfloat16_costs():
    """Matrices and cache in bfloat16; the sampler, the residual stream and timesteps stay float32."""
    low = wan.abstract_params(NETWORK, jnp.bfloat16)
    params = jax.tree.map(lambda x, like: x.astype(like.dtype), weights()["transformer"], low)
    found = []
    for tree in (weights()["transformer"], params):
        pipe = LATENTS.setup({"transformer": tree})
        _, latents, cache = rollout(pipe, pipe.initialize_cache(0, text=text(1)), range(3))
        found.append(np.stack(latents))
    assert cache.past.keys.dtype == jnp.bfloat16 and found[1].dtype == np.float32
    error = np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0])
    assert 1e-4 < error < 0.02


def test_profiled_rollouts_say_how_long_each_stage_took(story):
    pipe = derive_config(PIXELS, enable_sync_and_profile=True).setup(weights())  # of the same programs
    with Compilations() as names:
        frames, cache, final = pipe.generate(1, streaming.copy(story.caches["one"][1]))
        _, statistics = pipe.finalize(1, cache, final)
    assert names == []
    np.testing.assert_array_equal(frames, story.frames["one"][1])
    assert float(final.nonfinite) == 0
    stages = [statistics[f"{stage}_ms"] for stage in ("encode", "diffuse", "decode", "finalize")]
    assert stages[0] == 0 and min(stages[1:]) > 0
    assert statistics["total_ms"] == pytest.approx(sum(stages))
    assert statistics["total_ms_wo_finalize"] == pytest.approx(sum(stages[:3]))
