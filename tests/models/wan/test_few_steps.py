"""FastWan: its sampler, which none of its files describes; the mistakes that would still give a picture."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import jvdiff
from jvdiff import models
from jvdiff.diffusion import denoise
from jvdiff.errors import CheckpointError
from jvdiff.models.wan.family import FEW_STEPS, TEXT_TO_VIDEO
from jvdiff.models.wan.rollout import ROLLOUT
from jvdiff.models.wan.settings import Settings
from jvdiff.pipeline import inspect, settings

SMALL = {"num_frames": 5, "height": 32, "width": 32}
SPARSE = "video_sparse:1x1x2:0.8"


@pytest.fixture(scope="module")
def pipe(tiny_few_step_repository):
    return jvdiff.load(tiny_few_step_repository)


def test_what_a_repository_is_run_with(tiny_few_step_repository, pipe):
    """Not with the UniPC of its scheduler's file; with video sparse attention where there is a gate."""
    found = pipe.settings()
    assert pipe.family is FEW_STEPS and (found.solver, found.steps) == ("dmd:1000,757,522", 3)
    assert (found.shift, found.guidance, found.pattern) == (8.0, 1.0, "video_sparse:4x4x4:0.8")
    assert (found.num_frames, found.height, found.width, found.fps) == (61, 448, 832, 16)
    shown = models.defaults(Settings, tiny_few_step_repository)  # by a page of help
    assert shown == {name: getattr(found, name) for name in shown} and len(shown) == 10
    assert pipe.settings(solver="dmd:1000,500").steps == 2 and pipe.settings(pattern="dense").pattern == "dense"
    schedule = pipe.clip(**SMALL, pattern=SPARSE).sampler.schedule
    assert schedule.timesteps.tolist() == [1000, 757, 522]
    np.testing.assert_allclose(schedule.sigmas, [1, 28 / 37, 12 / 23, 0], rtol=1e-12)  # not 0.757, and not of shift 3


@pytest.mark.parametrize("name", FEW_STEPS.published)
def test_published_models(name):
    """Wan 2.2's 5B is larger, and has no gate."""
    found = settings.resolve(FEW_STEPS, FEW_STEPS.published[name], {}, {})
    assert (found.solver, found.shift, found.guidance) == ("dmd:1000,757,522", 8.0, 1.0)
    size = (121, 704, 1280, 24, "dense") if "5B" in name else (61, 448, 832, 16, "video_sparse:4x4x4:0.8")
    assert (found.num_frames, found.height, found.width, found.fps, found.pattern) == size
    clip = FEW_STEPS.clip(FEW_STEPS.published[name], found)
    assert len(clip.segments) == 1 and not clip.guided


def test_a_clip_is_three_estimates_noised_anew(pipe):
    """Written out: sigma of the table with shift 8, and noise that is new at each step, not the first."""
    start, *added = noises = np.random.default_rng(0).standard_normal((3, 2, 5), np.float32)
    solver = pipe.clip(**SMALL, pattern="dense").sampler.make()

    def flow(x, t):
        return jnp.sin(2 * x) + (t / 1000)[:, None] * x

    def sampled(noise):
        return np.asarray(denoise(flow, solver, solver.init(jnp.asarray(start), jnp.asarray(noise))).x)

    x = noises[0].astype(np.float64)
    for i, (t, sigma) in enumerate([(1000, 1.0), (757, 28 / 37), (522, 12 / 23)]):
        x = (1 - sigma) * x + sigma * noises[i] if i else x
        x = x - sigma * (np.sin(2 * x) + t / 1000 * x)
    assert np.linalg.norm(sampled(np.stack(added)) - x) <= 1e-6 * np.linalg.norm(x)
    assert np.linalg.norm(sampled(np.stack([start, start])) - x) > 0.1 * np.linalg.norm(x)


def test_the_four_steps_that_most_people_take():
    """A list of timesteps, shifted; two steps of each transformer of the A14B, without guidance."""
    known = TEXT_TO_VIDEO.published["Wan2.2-T2V-A14B-Diffusers"]
    given = {"solver": "euler", "grid": "timesteps:1000,750,500,250", "shift": 5.0, "guidance": 1.0, "boundary_step": 2}
    clip = TEXT_TO_VIDEO.clip(known, settings.resolve(TEXT_TO_VIDEO, known, {}, given))
    assert [(s.start, s.stop, s.part) for s in clip.segments] == [(0, 2, "transformer"), (2, 4, "transformer_2")]
    np.testing.assert_allclose(clip.sampler.schedule.timesteps, [1000, 937.5, 2500 / 3, 625], rtol=1e-12)
    assert clip.settings.steps == 4 and not clip.guided


def test_a_pipeline_of_few_steps_is_not_a_causal_one(tiny_few_step_repository, tiny_causal_repository, tmp_path):
    for source, name in (
        (tiny_few_step_repository, "WanCausalDMDPipeline"),
        (tiny_causal_repository, "WanDMDPipeline"),
    ):
        folder = shutil.copytree(source, tmp_path / name)
        index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": name}
        (folder / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=f"describes a {name}.*expected Wan"):
            inspect(folder)


def test_a_timestep_for_each_token_is_no_news(tiny_few_step_repository):
    """model_index.json of the 5B says that its timesteps are expanded; without a picture they are all the same."""
    known = inspect(tiny_few_step_repository).models
    told = dataclasses.replace(known, index={**known.index, "expand_timesteps": True, "boundary_ratio": None})
    assert FEW_STEPS.misfits(told) is None


def test_a_causal_model_takes_no_other_levels(tiny_causal_repository):
    known = inspect(tiny_causal_repository).models
    plain = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    for asked in ({"use_karras_sigmas": True}, {"solver_order": 3}, {"shift_terminal": 0.1}):
        told = dataclasses.replace(known, files=known.files | {"scheduler": plain | asked})
        with pytest.raises(CheckpointError, match="A causal model takes UniPC of order 2"):
            ROLLOUT.config("tiny", told)
