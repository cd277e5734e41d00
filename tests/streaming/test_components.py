"""Components of one's own: in a pipeline, in JSON by a registered name, refused where they lack something.

B rollouts · T latent frames of a chunk · H W latent grid · C latent channels · S text tokens · F pixel frames.
"""

import dataclasses
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jvdiff
from jvdiff import diffusion, streaming
from jvdiff.diffusion import schedules
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models import wan
from jvdiff.models.text import umt5
from jvdiff.models.wan.rollout import ROLLOUT, SELF_FORCING_WAN_2_1_T2V_1_3B
from jvdiff.runtime import run_state
from jvdiff.streaming import contracts, derive_config, values

DOCS = Path(__file__).parents[2] / "docs" / "streaming.md"


@dataclass(frozen=True)
class Tape:
    """Two networks with a past each: above half the noise the first draws everything to the sum of its past, below it
    the second does. What is remembered of a chunk is its mean. Text and image embeddings are added up."""

    guided: bool = False
    text_encoder: object = None
    part = "tape"
    latent_shape = (2, 2, 3, 4)
    text_shape = (3, 5)
    image_shape = (2,)
    input_channels = None

    def text_keys(self, params, text, image, *, placement):
        return text.sum((1, 2)) + image.sum(1)

    def initialize_cache(self, params, batch, *, placement):
        return {"high": jnp.zeros(batch), "low": jnp.zeros(batch)}

    def predict_flow(
        self, params, noisy_latent, timestep, cache, input, *, text, autoregressive_index, placement
    ):  # fmt: skip
        high = params["high"] * cache["high"] + text
        goal = jnp.where(timestep > 500, high, params["low"] * cache["low"] + input["push"])
        return noisy_latent - goal[:, None, None, None, None]

    def postprocess_clean_latent(self, clean_latent, cache, input):
        return 0.5 * clean_latent

    def finalize_kv_cache(
        self, params, noisy_latent, timestep, cache, input, *, text, autoregressive_index, placement
    ):  # fmt: skip
        mean = noisy_latent.mean((1, 2, 3, 4))
        return {"high": cache["high"] + mean, "low": cache["low"] - mean}


@dataclass(frozen=True)
class Words:
    """Rows of ones, as many as a text has words."""

    part = None

    def encode_texts(self, params, tokenizer, texts, *, placement):
        counts = np.array([len(text.split()) for text in texts])
        return jnp.ones((len(texts), 3, 5), jnp.float32) * (np.arange(3) < counts[:, None])[..., None].astype(
            np.float32
        )


@dataclass(frozen=True)
class Push:
    """A number for every chunk, added up with all before it."""

    scale: float = 1.0
    part = None
    channels = None

    def initialize_cache(self):
        return jnp.zeros(())

    def abstract_input(self, batch, latent_shape, autoregressive_index):
        return jax.ShapeDtypeStruct((batch,), jnp.float32)

    def encode(self, params, input, cache, *, latent_frames, placement):
        cache = cache + self.scale * input.sum()
        return {"push": jnp.full(input.shape, cache)}, cache


@dataclass(frozen=True)
class Cells:
    """A pixel for each latent cell, counted up."""

    spatial_compression_ratio = 1
    part = None

    def initialize_cache(self):
        return jnp.zeros((), jnp.int32)

    def decode(self, params, latents, cache, *, placement):
        return latents[..., :3] / 9, cache + latents.shape[1]


@dataclass(frozen=True)
class Steps:
    """Euler, evenly."""

    count: int = 2

    def setup(self):
        return diffusion.euler(schedules.make(self.count, shift=1.0, solver="euler"))

    def noise_level(self, timestep):
        return timestep / 1000


OWN = streaming.StreamInferencePipelineConfig(
    "own", streaming.DiffusionModelConfig(Tape(text_encoder=Words()), Steps()), encoder=Push(), decoder=Cells()
)
WEIGHTS = {"tape": {"high": jnp.float32(0.5), "low": jnp.float32(0.25)}}
IMAGE = np.float32([[1, 2]])
REGISTERED = {"Tape_": Tape, "Words": Words, "Push": Push, "Cells": Cells, "Steps": Steps}


@pytest.fixture
def registry(monkeypatch):
    """The names that are known are forgotten afterwards."""
    monkeypatch.setattr(values, "CLASSES", dict(values.CLASSES))
    monkeypatch.setattr("jvdiff.streaming.loading.CLASSES", values.CLASSES)


# ------------------------------------------------------------------------------------------------------ in a pipeline


def made(pipe, cache, pushes):
    """Latents of each chunk, the last frames, and the cache at the end."""
    latents, frames = [], None
    for i, push in enumerate(pushes, int(cache.generated)):
        frames, cache, final = pipe.generate(i, cache, np.float32([push]))
        cache, _ = pipe.finalize(i, cache, final)
        latents.append(np.asarray(final.latents))
    return latents, frames, cache


def test_a_pipeline_of_nothing_but_ones_own():
    """Every number is that of the same rollout in NumPy; saved half way, it goes on; fresh image embeddings count."""
    pipe = OWN.setup(WEIGHTS)
    begun = pipe.initialize_cache(7, ["two words"], image=IMAGE)
    assert [name for name, _ in pipe.traced(begun, np.float32([1]))] == [
        "encode first", "diffuse", "decode first", "finalize",
    ]  # fmt: skip
    latents, frames, after = made(pipe, begun, [3.0, 4.0])

    sigmas, high, low, sent = schedules.make(2, shift=1.0, solver="euler").sigmas, 0.0, 0.0, 0.0
    for i, (found, push) in enumerate(zip(latents, [3.0, 4.0], strict=True)):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), i), 0)
        x, sent = np.asarray(jax.random.normal(key, (1, 2, 2, 3, 4))), sent + push
        for step in range(2):
            goal = 0.5 * high + (2 * 5 + 3) if 1000 * sigmas[step] > 500 else 0.25 * low + sent
            x = x + (sigmas[step + 1] - sigmas[step]) * (x - goal)
        x = 0.5 * x
        np.testing.assert_allclose(found, x, atol=1e-5)
        high, low = high + x.mean(), low - x.mean()
    np.testing.assert_allclose([after.past["high"], after.past["low"]], [[high], [low]], rtol=1e-5)
    assert frames.shape == (1, 2, 2, 3, 3) and frames.dtype == np.uint8 and int(after.decoder) == 4
    assert after.history is None and float(after.encoder) == 7

    again = pipe.restore_cache(jax.tree.map(np.asarray, run_state.flatten(after)))
    other = pipe.set_prompts(streaming.copy(after), ["two words"], image=2 * IMAGE)
    kept = pipe.set_prompts(streaming.copy(after), ["two words"])
    first, second, third = (made(pipe, cache, [1.0])[0][0] for cache in (again, other, kept))
    np.testing.assert_array_equal(first, third)
    assert not np.array_equal(first, second)
    with pytest.raises(
        UsageError, match="Tape does not re-encode its past: it lacks initialize_history, remember, reen"
    ):
        pipe.set_prompts(pipe.initialize_cache(7, ["word"], image=IMAGE), ["word"], reencode=True)


def test_components_alone():
    """Bound to weights by setup, with the numbers that they have in a pipeline."""
    vae = wan.VAEConfig(base_dim=4, dim_mult=(1, 1), num_res_blocks=1, temperal_downsample=(True,), z_dim=4,
                        latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)  # fmt: skip
    decoder = streaming.StreamingVideoDecoder(vae)
    abstract = wan.abstract_params(vae)
    z = jax.ShapeDtypeStruct((1, 2, 2, 3, 4), jnp.float32)
    frames, _ = jax.eval_shape(lambda p, z: decoder.setup(p).decode(z, None), abstract, z)
    assert frames.shape == (1, 3, 4, 6, 3) and decoder.setup(abstract).spatial_compression_ratio == 2
    assert streaming.NullEncoder().setup().encode(z, None) == (z, None)
    bound = streaming.bind(Tape(), WEIGHTS["tape"])
    cache = bound.initialize_cache(1)
    flow = bound.predict_flow(
        jnp.ones((1, 2, 2, 3, 4)), jnp.float32([900]), cache, {"push": 0}, text=jnp.float32([3]), autoregressive_index=0
    )
    np.testing.assert_array_equal(flow, np.full((1, 2, 2, 3, 4), -2.0))
    assert isinstance(streaming.FlowMatchSchedulerConfig().setup(), diffusion.Solver)
    published = SELF_FORCING_WAN_2_1_T2V_1_3B.diffusion_model.transformer
    assert published.text_encoder == streaming.FamilyTextEncoder(umt5.UMT5_XXL)
    for component in (published, published.text_encoder, decoder, streaming.ImageEncoder(vae)):
        assert component.setup("weights").params == "weights"
    latents = OWN.diffusion_model.setup(WEIGHTS)
    assert latents.config.decoder is None and latents.config.diffusion_model == OWN.diffusion_model


def test_arrays_pass_a_null_encoder():
    """To a transformer of one's own as they are; to a family's as latents, if it takes them."""
    seen = []

    @dataclass(frozen=True)
    class Reads(Tape):
        def predict_flow(self, params, noisy_latent, timestep, cache, input, **how):
            seen.append(input.shape)
            return noisy_latent

    config = derive_config(
        OWN, encoder=streaming.NullEncoder(), decoder=None, diffusion_model=dict(transformer=Reads())
    )
    pipe = config.setup(WEIGHTS)
    pipe.generate(
        0, pipe.initialize_cache(0, text=np.ones((1, 3, 5), np.float32), image=IMAGE), np.ones((4, 7), np.float32)
    )
    assert seen == [(4, 7)]


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (dict(predict_flow=lambda self, params, x, *_, **__: x[:, :1]), r"predict_flow gives float32\[1, 1, 2, 3, 4\]"),
        (
            dict(postprocess_clean_latent=lambda self, x, *_: x[..., :3]),
            r"postprocess_clean_latent gives .*expected fl",
        ),
        (
            dict(finalize_kv_cache=lambda self, p, x, t, cache, i, **_: {"high": cache["high"]}),
            "finalize_kv_cache gives",
        ),
        (dict(latent_shape=(2, 3, 4)), r"latent_shape of Odd is \(2, 3, 4\); expected \(T,H,W,C\)"),
        (dict(part="tap"), "transformer: Odd takes the weights 'tap', and there are tape; give them"),
    ],
)
def test_what_a_component_gives_is_checked(patch, message):
    odd = dataclass(frozen=True)(type("Odd", (Tape,), patch))
    with pytest.raises(UsageError, match=message):
        pipe = derive_config(OWN, diffusion_model=dict(transformer=odd())).setup(WEIGHTS)
        cache = pipe.initialize_cache(0, text=np.ones((1, 2, 5), np.float32), image=IMAGE)
        _, cache, final = pipe.generate(0, cache, np.ones(1, np.float32))
        pipe.finalize(0, cache, final)


# ----------------------------------------------------------------------------------------------------- the registry


def test_json_names_what_was_registered_and_nothing_else(registry):
    written = json.loads(json.dumps(streaming.to_json(OWN)))
    with pytest.raises(
        CheckpointError, match=r"class 'Words'; expected one of Stream.*\n.*known once it is registered"
    ):
        streaming.config_from_json(written | {"encoder": None}, ROLLOUT)
    for name, cls in REGISTERED.items():
        streaming.register(name, cls)
    written = json.loads(json.dumps(streaming.to_json(OWN)))
    assert written["diffusion_model"]["transformer"]["class"] == "Tape_"
    again = streaming.config_from_json(written, ROLLOUT)
    assert again == OWN and again.digest == OWN.digest and "Push\n    scale: 1.0" in str(again)
    assert streaming.override(OWN, {"encoder": {"class": "Push", "scale": 2.0}}).encoder == Push(2.0)
    assert derive_config(OWN, encoder=dict(scale=2)).encoder == Push(2.0)
    with pytest.raises(CheckpointError, match=r"'os\.system'; expected one of .*Tape_"):
        streaming.config_from_json(written | {"encoder": {"class": "os.system"}}, ROLLOUT)
    Impostor = dataclass(frozen=True)(type("NullEncoder", (Push,), {}))
    assert streaming.to_json(Impostor())["class"].endswith("test_components.NullEncoder")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "diffusion_model.transformer.network",
            {"class": "NullEncoder"},
            "NullEncoder is not a configuration of a model",
        ),
        ("diffusion_model.transformer.network.patch_size", [1, 0, 0], "patch_size"),
        ("diffusion_model.transformer.text_encoder.network", None, "not a configuration of a model"),
        ("diffusion_model.transformer.len_t", "3", "len_t is '3'; expected int"),
        ("decoder", {"class": "UniPCSchedulerConfig"}, "is no Decoder: it lacks part, spatial"),
        ("decoder.vae", 5, "int is not a configuration of a model"),
    ],
)
def test_json_whose_parts_are_in_the_wrong_places_is_refused(path, value, message):
    written = json.loads(json.dumps(streaming.to_json(SELF_FORCING_WAN_2_1_T2V_1_3B)))
    *parents, name = path.split(".")
    functools.reduce(lambda value, key: value[key], parents, written)[name] = value
    with pytest.raises(CheckpointError, match=message):
        streaming.config_from_json(written, ROLLOUT)


def without(cls, name):
    fields = {key: value for key, value in vars(cls).items() if key not in (name, "__dict__", "__weakref__")}
    return type("Lacks", (), fields)


@pytest.mark.parametrize(
    ("name", "cls", "message"),
    [
        ("Push", Push, "Push is registered already, for .*Push; take another name"),
        ("Again", Push, "test_components.Push has the name Push already"),
        ("NullEncoder", Cells, "NullEncoder is a class of jvdiff's own"),
        ("DiTConfig", Cells, "DiTConfig is a class of jvdiff's own"),
        ("a b", Cells, "the name is 'a b'; expected a word"),
        (5, Cells, "the name is 5; expected a word"),
        ("Cells", Cells(), r"Cells is Cells\(\); expected a class"),
        ("Lacks", without(Cells, "decode"), r"is no component of a stream .*\n  as Decoder it lacks decode$"),
        ("Lacks", without(Tape, "finalize_kv_cache"), "as Transformer it lacks finalize_kv_cache$"),
        ("Odd", type("Odd", (Cells,), {"decode": lambda self, x: x}), r"lacks decode\(params, latents, cache, \*, pl"),
        ("Loose", dataclass(without(Steps, "count")), r"is no value; expected a class with @dataclass\(frozen=True"),
    ],
)  # fmt: skip
def test_a_class_that_cannot_be_registered(registry, name, cls, message):
    streaming.register("Push", Push)
    with pytest.raises(UsageError, match=message):
        streaming.register(name, cls)
    assert name == "Push" or name not in values.CLASSES or name in ("NullEncoder",)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (
            dict(encoder=Cells()),
            r"encoder is Cells\(\), which is no Encoder: it lacks channels, abstract_input, encode",
        ),
        (dict(decoder=5), "decoder is 5, which is no Decoder: it lacks part, spatial"),
        (dict(diffusion_model=dict(scheduler=Push())), "scheduler is Push.*lacks setup, noise_level"),
        (
            dict(diffusion_model=dict(transformer=Steps())),
            "transformer is Steps.*lacks part, text_encoder, latent_shape",
        ),
        (dict(encoder=Push(np.ones(2))), "own: a configuration is a frozen value that can go to JSON .*ndarray"),
        (dict(diffusion_model=5), "diffusion_model is 5; expected DiffusionModelConfig"),
    ],
)
def test_a_component_that_cannot_be(patch, message):
    with pytest.raises(UsageError, match=message):
        derive_config(OWN, **patch)


# ------------------------------------------------------------------------------------------------ values, sentences


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: streaming.FlowMatchSchedulerConfig(shift=-1.0), "shift must be a positive finite number, found -1"),
        (lambda: streaming.FlowMatchSchedulerConfig(shift=float("nan")), "shift is nan"),
        (lambda: streaming.FlowMatchSchedulerConfig(denoising_timesteps=[1000, 750, 500, 250]), "expected tuple"),
        (lambda: streaming.FlowMatchSchedulerConfig(2, 5.0, (500, 1000)), "falling whole numbers"),
        (
            lambda: streaming.FlowMatchSchedulerConfig(warp_denoising_step="no"),
            "warp_denoising_step is 'no'; expected bool",
        ),
        (lambda: streaming.FlowMatchSchedulerConfig(sigma_max=2.0), "sigma_max"),
        (lambda: streaming.UniPCSchedulerConfig(0), "steps must be a whole number of at least 1, found 0"),
        (lambda: streaming.UniPCSchedulerConfig(shift=1e18), "cannot be told apart"),
        (lambda: streaming.UniPCSchedulerConfig(num_train_timesteps=0), "train_steps"),
        (lambda: streaming.DiffusionModelConfig(Tape(), seed=-1), "seed is -1"),
        (lambda: derive_config(None, name="x"), "config is None; expected a configuration"),
        (lambda: OWN.setup(5), "params are 5; expected trees of weights by name"),
        (lambda: OWN.setup({}), "there are none; give them to setup"),
        (lambda: streaming.copy(5), "cache is 5; expected what initialize_cache"),
        (lambda: jvdiff.generate(5), "pipe is 5; expected what jvdiff.load returns"),
        (lambda: jvdiff.generate(None, "a red seven"), "pipe is None"),
    ],
)
def test_values_that_cannot_be_are_sentences(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_calls_that_cannot_be_are_sentences():
    pipe, text = OWN.setup(WEIGHTS), np.ones((1, 2, 5), np.float32)
    cache = pipe.initialize_cache(0, text=text, image=IMAGE)
    for call, message in (
        (lambda: pipe.generate(None, cache), "the chunk is None; expected its number"),
        (lambda: pipe.generate("0", cache), "the chunk is '0'"),
        (lambda: pipe.generate(0.0, cache), "the chunk is 0.0"),
        (lambda: pipe.generate(0, 5), "cache is 5; expected what initialize_cache"),
        (lambda: pipe.generate(0, None), "cache is None"),
        (lambda: pipe.finalize(None, cache, None), "the chunk is None"),
        (lambda: pipe.finalize(0, None, None), "cache is None"),
        (
            lambda: pipe.finalize(0, dataclasses.replace(cache, generated=1), None),
            r"finalize\(0\) was given None; expected",
        ),
        (lambda: pipe.set_prompts(None, ["a"]), "cache is None"),
        (lambda: pipe.set_prompts(cache, 5), "prompts are 5; expected a list of at least one"),
        (lambda: pipe.set_prompts(cache, {"a": 1}), "prompts are {'a': 1}"),
        (lambda: pipe.set_prompts(cache, [5]), "prompt is 5; expected text"),
        (lambda: pipe.set_prompts(cache), "give either prompts or text rows"),
        (lambda: pipe.initialize_cache("a", text=text, image=IMAGE), "key is 'a'; expected one key of jax.random.key"),
        (lambda: pipe.initialize_cache(True, text=text, image=IMAGE), "seed is True"),
        (lambda: pipe.initialize_cache(0, text=5, image=IMAGE), r"text is 5; expected rows of numbers \[B,S,5\]"),
        (lambda: pipe.initialize_cache(0, text=[[1.0]], image=IMAGE), "text is .*; expected rows"),
        (lambda: pipe.initialize_cache(0, text=text.astype(int), image=IMAGE), "text is int64"),
        (
            lambda: pipe.initialize_cache(0, ["a"], negative_prompt=5, image=IMAGE),
            "negative_prompt is 5; expected text",
        ),
        (lambda: pipe.initialize_cache(0, text=text), r"image is None; Tape takes image embeddings \[1, 2\] beside"),
        (lambda: pipe.initialize_cache(0, text=text, image=5), "image is 5; Tape takes"),
        (lambda: pipe.initialize_cache(0, text=text, image=np.ones((2, 2), np.float32)), r"image is float32\[2, 2\]"),
        (lambda: pipe.restore_cache(None), "arrays are None"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_a_seed_is_drawn_once():
    drawn = [streaming.DiffusionModelConfig(Tape(), seed=None).seed for _ in range(2)]
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in drawn) and drawn[0] != drawn[1]
    config = derive_config(OWN, diffusion_model=dict(seed=None))
    assert type(config.diffusion_model.seed) is int and config.digest == OWN.digest


def test_a_whole_number_is_the_float_that_a_field_holds():
    scheduler = dict(scheduler=streaming.UniPCSchedulerConfig(3, 5))
    assert derive_config(OWN, diffusion_model=scheduler).digest == derive_config(
        OWN, diffusion_model=dict(scheduler=streaming.UniPCSchedulerConfig(3, 5.0))
    ).digest  # fmt: skip


def test_karras_noise_levels_and_levels_of_training():
    """Those of the authors' programs, whose n = 4 steps are 5 (float64, from their formula), and their own end."""
    scheduler = streaming.UniPCSchedulerConfig(5, use_karras_sigmas=True)
    made = scheduler.schedule()
    levels = [200.0, 48.23, 8.64, 0.89, 0.01]
    ramp = [(200 ** (1 / 7) + i / 4 * (0.01 ** (1 / 7) - 200 ** (1 / 7))) ** 7 for i in range(5)]
    np.testing.assert_allclose(made.sigmas[:-1], [s / (1 + s) for s in ramp], rtol=1e-12)
    assert abs(made.sigmas[0] - levels[0] / 201) < 1e-12 and made.sigmas[-1] == 0
    np.testing.assert_array_equal(made.timesteps, np.trunc(1000 * made.sigmas[:-1]))
    half = streaming.UniPCSchedulerConfig(4, num_train_timesteps=500).schedule()
    assert half.timesteps[0] == 499 and half.timesteps.max() < 500


def test_a_configuration_prints_as_a_tree():
    lines = str(OWN).splitlines()
    assert lines[:4] == [
        "StreamInferencePipelineConfig", "  name: 'own'", "  diffusion_model: DiffusionModelConfig",
        "    transformer: Tape",
    ]  # fmt: skip
    assert "      text_encoder: Words" in lines and "    scheduler: Steps" in lines and "      count: 2" in lines
    assert str(streaming.FlowMatchSchedulerConfig()).splitlines()[2] == "  shift: 8.0"


def test_memory_that_the_allocator_has_taken_is_told(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_in_use": 2**30, "pool_bytes": 3 * 2**30, "num_allocs": 5}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert streaming.device_memory() == {"mem_alloc_gib": 1.0, "mem_reserved_gib": 3.0}


# --------------------------------------------------------------------------------------------------------- the docs


def test_the_example_in_the_docs_runs(registry, tiny_causal_repository):
    code = next(block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "register" in block)
    assert len(code.splitlines()) <= 40
    space = {"__name__": "example"}
    exec(code.replace("checkpoints/digits-stream", str(tiny_causal_repository)), space)
    frames, final, pipe = (space[name] for name in ("frames", "final", "pipe"))
    assert frames.shape == (1, 1, 16, 16, 3) and np.abs(final.latents).max() <= 1
    assert type(pipe.config.diffusion_model.transformer).__name__ == "Clipped"
    again = streaming.config_from_json(json.loads(json.dumps(streaming.to_json(pipe.config))), ROLLOUT)
    assert again == pipe.config


def test_the_docs_have_every_member_of_every_contract():
    text = DOCS.read_text()
    for protocol in (*contracts.COMPONENTS, contracts.Reencoding):
        assert not [name for name in contracts.members(protocol) if name not in text], protocol
