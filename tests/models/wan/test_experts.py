"""Two transformers of one clip (Wan 2.2 A14B): which steps are whose, with which guidance, and one solver for both."""

import dataclasses
import gc
import json
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jvdiff
from convert.from_diffusers import convert
from convert.to_diffusers import to_hf
from jvdiff import pipeline, plan
from jvdiff.commands import sample, windows
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models.family import Request
from jvdiff.models.wan.family import TEXT_TO_VIDEO
from jvdiff.pipeline import repository

PROMPT = "a red seven moving left"
FILE = "diffusion_pytorch_model.safetensors"
# As published (Wan-AI/Wan2.2-T2V-A14B-Diffusers), but for its boundary of 0.875: at shift 3 the timesteps of four steps
# are 999, 900, 750 and 500, and 0.9 is that of the A14B for pictures.
INDEX = {"_class_name": "WanPipeline", "_diffusers_version": "0.35.0.dev0", "boundary_ratio": 0.9}


@pytest.fixture(scope="module")
def folder(tiny_repository, tmp_path_factory):
    """A repository with two transformers of other weights."""
    root = shutil.copytree(tiny_repository, tmp_path_factory.mktemp("experts") / "repository")
    shutil.copytree(root / "transformer", root / "transformer_2")
    weights = load_file(root / "transformer" / FILE)
    save_file({name: np.ascontiguousarray(x[::-1]) for name, x in weights.items()}, root / "transformer_2" / FILE)
    index = json.loads((root / "model_index.json").read_text())
    (root / "model_index.json").write_text(json.dumps(index | INDEX | {"transformer_2": index["transformer"]}))
    return root


@pytest.fixture(scope="module")
def pipe(folder):
    return jvdiff.load(folder, "float32")


def without(pipe, *names, **index):
    """The pipeline without these parts, and with these values of model_index.json."""
    models = dataclasses.replace(
        pipe.models,
        configs={name: cfg for name, cfg in pipe.models.configs.items() if name not in names},
        index={**pipe.models.index, **{name: [None, None] for name in names}, **index},
    )
    return dataclasses.replace(pipe, repository=dataclasses.replace(pipe.repository, models=models))


def told(pipe, **settings):
    return [(s.start, s.stop, s.part, s.guidance) for s in pipe.clip(**settings).segments]


def test_the_step_at_the_boundary_is_the_first_transformers(pipe):
    assert told(pipe) == [(0, 2, "transformer", 3.0), (2, 4, "transformer_2", 3.0)]
    assert told(pipe, boundary=0.9001)[0][1] == 1 and told(pipe, boundary=0.75)[0][1] == 3
    assert told(pipe, boundary=0.0) == [(0, 4, "transformer", 3.0)]
    assert told(pipe, boundary=1.0) == [(0, 4, "transformer_2", 3.0)]
    assert told(pipe, boundary=0.9000000000000001)[0][1] == 2  # 900.0000000000001, and torch compares as float32


@pytest.mark.parametrize(
    ("shift", "boundary", "steps"), [(12.0, 0.875, 26), (3.0, 0.875, 13), (5.0, 0.9, 15), (3.0, 0.9, 11)]
)
def test_how_many_of_forty_steps_are_the_first_transformers(pipe, shift, boundary, steps):
    assert told(pipe, steps=40, shift=shift, boundary=boundary)[0][:3] == (0, steps, "transformer")


def test_a_boundary_by_step(pipe):
    """In place of the repository's; it holds for any list of steps."""
    assert told(pipe, boundary_step=3) == [(0, 3, "transformer", 3.0), (3, 4, "transformer_2", 3.0)]
    assert told(pipe, boundary_step=0) == [(0, 4, "transformer_2", 3.0)]
    assert told(pipe, boundary_step=4) == told(pipe, boundary_step=9) == [(0, 4, "transformer", 3.0)]
    assert pipe.settings(boundary_step=1).boundary is None and pipe.settings().boundary == 0.9
    assert told(pipe, solver="euler", steps=6, boundary_step=2)[0][1] == 2
    with pytest.raises(UsageError, match=r"boundary is 0\.5 and boundary_step is 2; leave one of them out"):
        pipe.clip(boundary=0.5, boundary_step=2)


def test_guidance_of_each(pipe):
    """The first's decides whether there is any."""
    assert [s[3] for s in told(pipe, guidance=4.0, guidance_2=2.0)] == [4.0, 2.0]
    assert [s[3] for s in told(pipe, guidance=4.0)] == [4.0, 4.0]
    assert [s[3] for s in told(pipe, guidance=1.0, guidance_2=2.0)] == [1.0, 1.0]
    assert not pipe.clip(guidance=1.0, guidance_2=2.0).guided and pipe.clip(guidance=4.0, guidance_2=1.0).guided


def test_first_steps_that_are_dense(pipe):
    """Cut twice: behind them, and at the boundary."""
    sparse = {"pattern": "sliding_tile:1x1x1:1x1x1", "num_frames": 9}
    parts = [(s.start, s.stop, s.part, str(s.pattern)) for s in pipe.clip(dense_steps=1, **sparse).segments]
    assert [p[:3] for p in parts] == [(0, 1, "transformer"), (1, 2, "transformer"), (2, 4, "transformer_2")]
    assert parts[0][3] != parts[1][3] == parts[2][3]
    assert [s[:3] for s in told(pipe, dense_steps=3, **sparse)][1:] == [
        (2, 3, "transformer_2"),
        (3, 4, "transformer_2"),
    ]


def test_one_solver_goes_through_both(pipe):
    """Where both are one and the same transformer, the boundary is nowhere to be seen: nothing is begun anew at it."""
    same = pipeline.Weights({**pipe.weights, "transformer_2": pipe.weights["transformer"]})
    clips = [
        jvdiff.generate(dataclasses.replace(pipe, weights=same), PROMPT, seed=1, boundary_step=step).latents
        for step in (4, 2, 3)
    ]
    for clip in clips[1:]:
        np.testing.assert_array_equal(clip, clips[0])
    assert np.abs(jvdiff.generate(pipe, PROMPT, seed=1).latents - clips[0]).max() > 0.01


def test_one_transformer_is_what_it_was(pipe, tiny_repository):
    """The first alone makes the clip of a repository with one; what such a one has no use for is refused."""
    single = jvdiff.load(tiny_repository, "float32")
    clip = jvdiff.generate(single, PROMPT, seed=1)
    np.testing.assert_array_equal(jvdiff.generate(pipe, PROMPT, seed=1, boundary_step=4).latents, clip.latents)
    with pytest.raises(UsageError, match=r"guidance_2 is 2\.0, and these weights have no second transformer"):
        single.clip(guidance_2=2.0)
    assert told(single, boundary=0.0) == told(single) == [(0, 4, "transformer", 3.0)]
    with pytest.raises(UsageError, match=r"with boundary 0\.9, steps 3 to 4 of 4 are those of transformer_2"):
        single.clip(boundary=0.9)


def test_one_of_them_is_null(pipe):
    first, second = without(pipe, "transformer_2"), without(pipe, "transformer")
    assert told(first, boundary_step=4) == [(0, 4, "transformer", 3.0)]
    assert told(second, boundary=1.0, guidance_2=2.0) == [(0, 4, "transformer_2", 2.0)]
    message = r"steps 3 to 4 of 4 .* transformer_2, which these weights lack; .* transformer with --boundary_step=4"
    with pytest.raises(UsageError, match=message):
        first.clip()
    message = r"steps 1 to 2 of 4 .* transformer, which these weights lack; .* transformer_2 with --boundary_step=0"
    with pytest.raises(UsageError, match=message):
        second.clip()
    with pytest.raises(UsageError, match="with no boundary, steps 1 to 4 of 4"):
        without(pipe, "transformer", boundary_ratio=None).clip()
    both = jvdiff.generate(pipe, PROMPT, seed=1, boundary=1.0).latents
    np.testing.assert_array_equal(jvdiff.generate(second, PROMPT, seed=1, boundary=1.0).latents, both)


def test_a_repository_with_null(folder, tmp_path):
    """Its folder may be missing, or be there and not be meant; without either there is nothing to run."""
    copy = shutil.copytree(folder, tmp_path / "repository")
    index = json.loads((copy / "model_index.json").read_text())

    def inspected(**values):
        (copy / "model_index.json").write_text(json.dumps({**index, **values}))
        return repository.inspect(copy)

    assert "transformer" not in inspected(transformer=[None, None]).models.configs
    convert(copy, tmp_path / "orbax")
    assert not (tmp_path / "orbax" / "transformer").exists() and (tmp_path / "orbax" / "transformer_2").exists()
    to_hf(tmp_path / "orbax", tmp_path / "back")
    back = repository.inspect(tmp_path / "back")
    assert list(back.models.configs) == ["transformer_2", "vae", "text_encoder"]
    assert back.models.index["transformer"] == [None, None] and back.settings().boundary == 0.9
    with pytest.raises(CheckpointError, match="there is no transformer"):
        inspected(transformer=[None, None], transformer_2=[None, None])
    with pytest.raises(CheckpointError, match=r"boundary_ratio is 875; expected a number from 0 to 1"):
        inspected(boundary_ratio=875)
    with pytest.raises(CheckpointError, match="holds two causal transformers"):
        inspected(_class_name="WanCausalDMDPipeline")
    shutil.rmtree(copy / "transformer_2")
    with pytest.raises(CheckpointError, match="names transformer_2, and there is no such folder"):
        inspected()
    assert list(inspected(transformer_2=None).models.configs) == ["transformer", "vae", "text_encoder"]


def test_transformers_that_do_not_fit(pipe):
    configs = {**pipe.models.configs}
    configs["transformer_2"] = dataclasses.replace(configs["transformer_2"], out_channels=8)
    models = dataclasses.replace(pipe.models, configs=configs)
    assert re.search("transformer and transformer_2 differ", TEXT_TO_VIDEO.misfits(models) or "")


def test_the_plan_of_the_published_models():
    """Two transformers of 14.3 B parameters; 13 of 40 steps at shift 3 are the first's."""
    config = sample.default_config()
    config.update({"checkpoint": "Wan2.2-T2V-A14B-Diffusers", "precision": "float32"})
    context, clip = plan.resolved(config)
    assert [(s.part, s.stop, s.guidance) for s in clip.segments] == [
        ("transformer", 13, 4.0),
        ("transformer_2", 40, 3.0),
    ]
    assert (clip.frames, clip.settings.fps, clip.tokens) == ((81, 720, 1280), 16, 75_600)
    config.guidance = 2.0  # that of both, unless there is guidance_2 too
    assert [segment.guidance for segment in plan.resolved(config)[1].segments] == [2.0, 2.0]
    sizes = {name: count for name, (count, _) in plan.resident(context, None).items()}
    assert sizes["transformer"] == sizes["transformer_2"] == 14_288_491_584
    one, two = (context.family.network(context.models, s, context.forward(clip, s)) for s in clip.segments)
    assert one is two  # compiled once


def live(kind):
    """Bytes of all arrays in memory of a kind."""
    return sum(x.nbytes for x in jax.live_arrays() if x.sharding.memory_kind == kind)


def bytes_of(weights):
    return {part: sum(x.nbytes for x in jax.tree.leaves(tree)) for part, tree in weights.items()}


def test_what_a_device_holds_between_stages(pipe, folder):
    """One part at a time, the others in the host's memory; and the clip is the same, bit for bit."""
    clip, sizes, expected = pipe.clip(), bytes_of(pipe.weights), jvdiff.generate(pipe, PROMPT, seed=1)
    gc.collect()
    before, seen = live("device"), []
    turns = jvdiff.load(folder, "float32", in_turn="all")
    assert live("device") == before and turns.weights.away() == ("transformer", "transformer_2", "vae", "text_encoder")

    def run(stage, *arguments):
        result = turns.run(stage, *arguments)
        seen.append((stage.part, live("device") - before))
        return result

    context = turns.context
    inputs = turns.family.inputs(turns.models, clip, Request(prompts=(PROMPT,)))
    solver = clip.sampler.make()
    state = pipeline.begin(clip, solver, pipeline.initial_noise([1], clip.latents), [1])
    state = pipeline.denoise(context, clip, pipeline.encode(context, clip, inputs, run), state, solver, run)
    video = pipeline.decode(context, clip, state.x, run)
    parts = ["text_encoder", "transformer", "transformer", "transformer_2", "transformer_2", "vae", "vae"]
    assert [part for part, _ in seen] == parts
    for part, size in seen:
        rest = sizes["transformer" if part == "vae" else "text_encoder"]  # conditions, latents, what a decoder keeps
        assert sizes[part] < size < sizes[part] + rest
    np.testing.assert_array_equal(state.x, expected.latents)
    np.testing.assert_array_equal(video, expected.video)


def test_what_lies_on_a_mesh_waits_in_pinned_memory(pipe, folder):
    """And stays there as a copy, which is what comes back the next time."""
    gc.collect()
    before, sizes = live("device"), bytes_of(pipe.weights)
    weights = jvdiff.load(folder, "float32", "data=1", in_turn="all").weights
    for part in ("text_encoder", "vae", "text_encoder"):
        with weights.use(part) as params:
            assert live("device") - before == sizes[part] and live("pinned_host") == sum(sizes.values())
            jax.tree.map(np.testing.assert_array_equal, params, pipe.weights[part])
    weights.take_turns(["vae"])
    assert live("pinned_host") == sum(sizes.values()) - sizes["text_encoder"]  # it has come, and needs no copy


def test_what_is_encoded_ahead_has_a_limit(pipe, monkeypatch):
    """Of the first encoder, which comes to the device again for what is left; equal requests are computed once."""
    clip = pipe.clip()
    texts = ("a", "a red seven", "a")
    every = [pipe.family.inputs(pipe.models, clip, Request(prompts=(text,))) for text in texts]
    requests = [SimpleNamespace(clip=clip, inputs=inputs) for inputs in every]
    kept = pipeline.Kept(pipe.run, ("text_encoder",))
    assert pipeline.encode_ahead(pipe.context, requests, kept) == 3
    monkeypatch.setattr(pipeline.Kept, "LIMIT", 1)
    assert kept.full and pipeline.encode_ahead(pipe.context, requests, kept) == 1
    direct, again = (pipeline.encode(pipe.context, clip, every[1], run) for run in (pipe.run, kept))
    jax.tree.map(np.testing.assert_array_equal, again, direct)


def test_a_picture_that_changed_fails_when_its_turn_comes_and_not_ahead(pipe):
    class Changed:
        clip = pipe.clip()

        @property
        def inputs(self):
            raise CheckpointError("changed since it was read before")

    good = SimpleNamespace(
        clip=pipe.clip(), inputs=pipe.family.inputs(pipe.models, pipe.clip(), Request(prompts=("a",)))
    )
    kept = pipeline.Kept(pipe.run, ("text_encoder",))
    assert pipeline.encode_ahead(pipe.context, [Changed(), good], kept) == 2


def test_windows_are_those_of_one_transformer(folder, tmp_path, capsys):
    words = [f"--checkpoint={folder}", f"--table={tmp_path / 'w.json'}", "--prompt=a"]
    words += ["--tile=1x1x1", "--candidates=1x1x1"]
    assert windows.main(["windows", *words]) == 2
    assert "two transformers share the steps, and a table is of one" in capsys.readouterr().err
