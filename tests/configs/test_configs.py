"""Every config of configs/ is checked without weights: its fields, and the shapes of the programs that it asks for."""

import importlib.util
from functools import partial
from pathlib import Path

import jax
import pytest

from jvdiff import models, pipeline, plan, precision, streaming
from jvdiff.commands import sample, stream, train
from jvdiff.models.family import Models
from jvdiff.models.hunyuan_video import settings as hunyuan
from jvdiff.models.latent_video import runs as latent_video_runs
from jvdiff.models.wan import settings
from jvdiff.models.wan.family import CAUSAL
from jvdiff.models.wan.rollout import SELF_FORCING_WAN_2_1_T2V_1_3B
from jvdiff.training import loop

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.py") if not p.stem.startswith("train_"))
STREAMING = [p for p in CONFIGS if "import stream\n" in p.read_text()]
LATENT_VIDEO = [p for p in CONFIGS if p.stem.startswith("latent_video_")]
SAMPLING = [p for p in CONFIGS if p not in STREAMING + LATENT_VIDEO]
TEXT = dict.fromkeys(("hunyuan_video", "fast_hunyuan"), (256, 4096))  # rows, and their width; 512 of the others


def read(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SAMPLING, ids=lambda p: p.stem)
def test_a_sampling_config_fits_its_model(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = read(path)
    config = module.get_config()
    assert set(config) == set(sample.default_config())
    assert f" --config {path.stem} " in module.__doc__  # the command that it is for
    if not Path(config.checkpoint).exists() and path.stem == "digits":
        pytest.skip("the digits checkpoint is not there")
    context, clip = plan.resolved(config)
    settings, inputs = clip.settings, context.family.longest(context.models, clip, 1)
    abstract = pipeline.abstract_params(context.family, context.models, context.precision)
    calls = pipeline.trace(context, abstract, clip, inputs)
    results = {call.stage.name: jax.tree.leaves(call.traced.out_info) for call in calls}
    for latents in [found[0] for stage, found in results.items() if stage.startswith("denoise")]:
        assert latents.shape == (1, *clip.latents) and latents.dtype == "float32"
    frames = [(call.times, out) for call in calls for out in jax.tree.leaves(call.traced.out_info) if out.ndim == 5]
    pixels = [(times, out) for times, out in frames if out.dtype == "uint8"]
    assert {(out.shape[0], *out.shape[2:]) for _, out in pixels} == {(1, settings.height, settings.width, 3)}
    assert sum(times * out.shape[1] for times, out in pixels) == settings.num_frames
    states = [x.shape for x in results["text"] if x.ndim == 3]
    assert states == [(1, *TEXT.get(path.stem, (512, states[0][2])))] * (1 + clip.guided)


@pytest.mark.parametrize("path", LATENT_VIDEO, ids=lambda p: p.stem)
def test_a_latent_video_config_fits_its_models(path, monkeypatch):
    """Its steps trace, and both programs take it."""
    monkeypatch.chdir(ROOT)
    module = read(path)
    config = module.get_config()
    for program in ("train", "sample"):
        assert f"jvdiff {program} --config {path.stem} " in module.__doc__
    assert train.parse(["x", f"--config={path}"]).config.task == "latent_video"
    sampling = sample.parse(["x", f"--config={path}", "--class_label=seven"]).config
    assert set(sampling) == set(sample.default_config()) and sampling.class_label == "seven"
    assert sampling.guidance == config.guidance and sampling.checkpoint == f"{config.folder}/repository"
    with jax.numpy_dtype_promotion("strict"):
        for _, task, schedule, batch, _ in latent_video_runs.programs(config):
            state = jax.eval_shape(partial(loop.start, task, schedule, jax.random.key(0)))
            _, metrics = jax.eval_shape(loop.make_step(task, schedule, jax.random.key(0)), state, batch)
            assert metrics["loss"].shape == () and metrics["loss"].dtype == "float32"


@pytest.mark.parametrize("path", STREAMING, ids=lambda p: p.stem)
def test_a_streaming_config_fits_its_model(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = read(path)
    config = module.get_config()
    assert set(config) == set(stream.default_config())
    assert f" --config {path.stem} " in module.__doc__
    if Path(config.checkpoint).exists():
        found = streaming.config_of(config.checkpoint)
    elif path.stem == "self_forcing_wan2_1_t2v_1_3b":
        found = SELF_FORCING_WAN_2_1_T2V_1_3B
    else:
        pytest.skip(f"{config.checkpoint} is not there")
    found = streaming.override(found, config.pipeline or {})
    model = found.diffusion_model.transformer
    parts = {"transformer": model.network, "vae": found.decoder.vae, "text_encoder": model.text_encoder.network}
    abstract = pipeline.abstract_params(CAUSAL, Models(parts, {}, {}), precision.choose("bfloat16"))
    cache = found.setup(abstract).abstract_cache(1)
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.past)) < 4.9 * 2**30
    assert cache.history.shape[1] == model.window_size_t - model.len_t + model.sink_size_t


def test_there_are_streaming_and_sampling_configs():
    assert {"stream_digits", "self_forcing_wan2_1_t2v_1_3b"} <= {p.stem for p in STREAMING}
    assert {"digits", "wan2_1_t2v_1_3b", "wan2_1_t2v_14b", "wan2_2_t2v_a14b"} <= {p.stem for p in SAMPLING}


def test_a_published_repository_has_the_configuration_of_its_name():
    known = {**settings.CONFIGURATIONS, **hunyuan.CONFIGURATIONS}
    for name, stem in known.items():
        assert Path(read(ROOT / "configs" / f"{stem}.py").get_config().checkpoint).name == name
        assert models.configuration(f"somebody/{name}") == models.configuration(name.lower()) == stem
    assert set(known.values()) == {p.stem for p in SAMPLING} - {"digits"}
    assert models.configuration("checkpoints/mine") is None
