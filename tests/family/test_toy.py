"""A user's own family, outside jvdiff/: it samples, plans, shards, saves, resumes and converts, in Python and from
the command lines."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from jvdiff.convert.to_diffusers import to_hf
from PIL import Image
from safetensors.numpy import load_file, save_file
from toy import networks
from toy.family import TOY

import jvdiff
from jvdiff import models, pipeline, plan, precision
from jvdiff.commands import convert, jobs, planning, sample
from jvdiff.errors import CheckpointError, NumericsError, UsageError
from jvdiff.media import pictures
from jvdiff.media import video as videos
from jvdiff.models.vision.pictures import squash
from jvdiff.sharding import rules
from jvdiff.weights.naming import disassemble, flatten, unflatten
from jvdiff.weights.orbax import stored_leaves

FAMILY = "--family=toy.family:TOY"
WORDS = {"tokenizer": ["a", "red", "blue", "seven"], "tokenizer_2": ["seven", "two", "moves"]}
KINDS = {
    "transformer": networks.TRANSFORMER,
    "transformer_2": networks.TRANSFORMER,
    "vae": networks.VAE,
    "text_encoder": networks.TEXT,
    "text_encoder_2": networks.TEXT,
    "image_encoder": networks.PICTURE,
}
PICTURE = np.random.default_rng(5).integers(0, 256, (16, 16, 3), np.uint8)


SQUARE = {"height": 16, "width": 16}


def write_repository(root, seed=0):
    """In Hugging Face layout, no number zero; each tensor that nobody uses is there."""
    random = np.random.default_rng(seed)
    for name, kind in KINDS.items():
        cfg, part = networks.Config(kind), TOY.parts[name]
        leaves = {
            path: random.standard_normal(leaf.shape, np.float32) * np.float32(leaf.shape[-2] ** -0.5)
            for path, leaf in flatten(part.abstract(cfg, np.float32)).items()
        }
        tensors = dict(disassemble(part.names(cfg), unflatten(leaves)))
        if kind == networks.TEXT:
            tensors |= {"logit_scale": np.ones(1, np.float32), "text_projection.weight": np.ones((8, 8), np.float32)}
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps(cfg.to_json()))
        save_file(tensors, root / name / f"{part.stem}.safetensors")
    for name, words in WORDS.items():
        (root / name).mkdir()
        (root / name / "tokenizer.json").write_text(json.dumps({"words": words}))
    index = {"_class_name": "ToyPipeline", "boundary_ratio": 0.9}
    index |= {name: [TOY.parts[name].published[0], kind] for name, kind in KINDS.items()}
    index |= {name: ["transformers", "ToyTokenizer"] for name in WORDS}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return write_repository(tmp_path_factory.mktemp("toy") / "repository")


@pytest.fixture(scope="module")
def pipe(repository):
    return jvdiff.load(repository, "float32", family=TOY)


@pytest.fixture(scope="module")
def clip(pipe):
    """The clip that most tests make again in other ways."""
    return jvdiff.generate(pipe, "a red seven", seed=3, image=PICTURE)


@pytest.fixture
def command(repository, tmp_path):
    """argv of a command; keywords are fields."""
    videos.write_png(tmp_path / "picture.png", PICTURE)

    def build(**fields):
        given = {"checkpoint": repository, "image": tmp_path / "picture.png", "seed": 3} | fields
        given |= {"output": tmp_path / "out", "save_arrays": True, "compile_cache": "off"}
        given |= {} if "prompts" in given else {"prompt": "a red seven"}
        return ["jvdiff sample", *(f"--{name}={value}" for name, value in given.items()), FAMILY]

    return build


def arrays(folder):
    """{name: its latents} of the clips in a folder."""
    return {path.stem: np.load(path)["latents"] for path in folder.glob("*.npz")}


# ------------------------------------------------------------------------------------------------------------ sampling


def test_a_clip_does_not_depend_on_its_neighbours(pipe, clip):
    both = jvdiff.generate(pipe, ["a blue two moves", "a red seven"], seed=2, image=PICTURE)
    assert both.video.shape == (2, 3, 16, 16, 3) and both.seeds == (2, 3)
    np.testing.assert_allclose(both.latents[1], clip.latents[0], rtol=0, atol=1e-5)
    assert np.abs(both.latents[0] - clip.latents[0])[1:].max() > 0.1


def test_the_picture_is_put_back(pipe, clip):
    first = networks.encode(pipe.weights["vae"], PICTURE[None])
    np.testing.assert_allclose(clip.latents[:, :1], first, rtol=0, atol=1e-5)
    without = jvdiff.generate(pipe, "a red seven", seed=3)
    assert np.abs(without.latents - clip.latents).max(axis=(0, 2, 3, 4)).min() > 0.01  # in every frame


def test_pictures_of_any_size(pipe, clip, tmp_path):
    """Each clip has its own, squashed to the clip; without a size the clip has the picture's proportions."""
    wide = np.random.default_rng(6).integers(0, 256, (9, 20, 3), np.uint8)
    videos.write_png(tmp_path / "wide.png", wide)
    both = jvdiff.generate(pipe, ["seven", "a red seven"], seed=2, image=[tmp_path / "wide.png", PICTURE], **SQUARE)
    first = networks.encode(pipe.weights["vae"], squash(wide, 16, 16)[None])
    np.testing.assert_allclose(both.latents[:1, :1], first, rtol=0, atol=1e-5)
    np.testing.assert_allclose(both.latents[1], clip.latents[0], rtol=0, atol=1e-5)
    alone = jvdiff.generate(pipe, "seven", image=Image.fromarray(wide), steps=1, solver="euler", num_frames=1)
    assert alone.video.shape == (1, 1, 10, 24, 3)
    for change, sentence in (
        ({"image": [PICTURE] * 3}, "image has 3 pictures for 2 clips"),
        ({"image": [wide, PICTURE]}, r"clips of 2 sizes \(24x10, 16x16\)"),
        ({"image": PICTURE.astype(float)}, r"image is float64\[16, 16, 3\]; expected uint8"),
        ({"last_image": PICTURE}, "last_image is given without image"),
        ({"image": PICTURE, "last_image": PICTURE, "num_frames": 1}, "last_image is given for a clip of one frame"),
    ):
        with pytest.raises(UsageError, match=sentence):
            jvdiff.generate(pipe, ["seven", "two"], **change)
    for change, given, sentence in (
        (
            {"needs": ("image", "last_image")},
            {"image": (wide,)},
            "the toy needs image and last_image; give last_im",
        ),
        ({"takes": ()}, {"image": (wide,)}, "the toy takes no image; leave it out"),
    ):
        with pytest.raises(UsageError, match=sentence):
            pipeline.make_request(dataclasses.replace(TOY, **change), pipe.clip(), ("seven",), **given)


@pytest.mark.parametrize(
    ("given", "size"),
    [({}, (10, 24)), ({"height"}, (16, 36)), ({"width"}, (6, 16)), ({"height", "width"}, (16, 16))],
    ids=lambda x: " ".join(sorted(map(str, x))),
)
def test_the_size_that_is_given_stays(pipe, given, size):
    found = pipeline.size_for(TOY, pipe.models, pipe.settings(), [np.zeros((9, 20, 3), np.uint8)], given)
    assert (found["height"], found["width"]) == size


@pytest.mark.parametrize(
    "change",
    [{"guidance": 5.0}, {"guidance_2": 5.0}, {"embedded_guidance": 9.0}, {"boundary": 0.5}, {"shift": 3.0}],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_has_its_effect(pipe, clip, change):
    assert (
        np.abs(jvdiff.generate(pipe, "a red seven", seed=3, image=PICTURE, **change).latents - clip.latents).max()
        > 1e-3
    )


def test_two_experts_are_two_segments_of_one_run(pipe):
    """Told apart by their steps; the second's guidance is the first's unless it has one."""
    segments = pipe.clip(guidance=2.0).segments
    assert [(s.start, s.stop, s.part, s.guidance) for s in segments] == [
        (0, 2, "transformer", 2.0),
        (2, 4, "transformer_2", 2.0),
    ]
    assert pipe.clip(guidance_2=1.0).segments[1].guidance == 1 and pipe.clip(boundary=0.0).segments[0].stop == 4
    assert pipe.clip(solver="euler", steps=6).segments[-1].stop == 6
    with pytest.raises(UsageError, match="steps is 3, and solver lists 4 timesteps"):
        pipe.clip(steps=3)


def test_the_part_whose_numbers_went_wrong_is_named(pipe):
    for part, message in (
        ("transformer_2", "transformer 2: after step 3 of 4"),
        ("text_encoder", "or text encoder or"),
    ):
        broken = jax.tree.map(lambda x: x * np.nan, pipe.weights[part])
        other = dataclasses.replace(pipe, weights=pipeline.Weights({**pipe.weights, part: broken}))
        with pytest.raises(NumericsError, match=message):
            jvdiff.generate(other, "a red seven", seed=3, image=PICTURE)


def test_nothing_is_compiled_again_for_other_values(pipe, clip, compiled):
    jvdiff.generate(
        pipe,
        "two moves",
        seed=8,
        image=255 - PICTURE,
        guidance=2.0,
        guidance_2=4.0,
        embedded_guidance=1.0,
        boundary=0.5,
    )
    assert compiled == []
    jvdiff.generate(pipe, "two moves", seed=8, image=PICTURE, guidance_2=1.0)
    assert compiled == ["jit(denoise)"]  # without guidance's other branch


def test_a_part_leaves_between_steps_and_comes_back(repository, clip, compiled):
    pipe, seen = jvdiff.load(repository, "float32", family=TOY), []

    def send_away(done, state):
        seen.append(pipe.weights.away())
        for part in ("transformer", "transformer_2", "text_encoder"):
            pipe.weights.leave(part)

    again = jvdiff.generate(pipe, "a red seven", seed=3, image=PICTURE, callback=send_away)
    np.testing.assert_array_equal(again.latents, clip.latents)
    np.testing.assert_array_equal(again.video, clip.video)
    assert seen[1] == ("transformer_2", "text_encoder") and "transformer" in seen[3] and compiled == []
    for part in ("transformer", "transformer_2", "text_encoder"):
        before = flatten(jvdiff.load(repository, "float32", family=TOY).weights[part])
        for name, leaf in flatten(pipe.weights[part]).items():
            np.testing.assert_array_equal(leaf, before[name])


@pytest.mark.parametrize("mesh", ["fsdp=2", "data=2", "fsdp=2,tensor=2"])
def test_a_mesh_makes_the_same_clip(repository, clip, mesh, command, tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "SMALL", 1)
    pipe = jvdiff.load(repository, "float32", mesh, family=TOY)
    place = pipe.weights["transformer_2"]["text"]["kernel"].sharding
    assert place.is_fully_replicated == (mesh == "data=2")
    pipe.weights.leave("transformer_2")
    assert pipe.weights["transformer_2"]["text"]["kernel"].sharding == place
    again = jvdiff.generate(pipe, "a red seven", seed=3, image=PICTURE)
    np.testing.assert_allclose(again.latents, clip.latents, rtol=0, atol=1e-5)
    assert sample.main(command(mesh=mesh, preview_every=2)) == 0
    np.testing.assert_array_equal(arrays(tmp_path / "out")["a-red-seven_seed3"], again.latents[0])


# ------------------------------------------------------------------------------------------------- the command lines


def test_the_command_line_makes_the_same_clip_and_resumes_it_bit_for_bit(command, clip, tmp_path, capsys):
    assert sample.main(command()) == 0
    out, stem = tmp_path / "out", "a-red-seven_seed3"
    np.testing.assert_array_equal(arrays(out)[stem], clip.latents[0])
    record = json.loads((out / f"{stem}.json").read_text())
    assert record["boundary"] == 0.9 and record["guidance_2"] is None and len(record["image"]) == 64
    for stop in (1, 2, 3):  # within the first expert, at the boundary, within the second
        assert sample.main(command(stop_at=stop)) == 0
        kept = Path(capsys.readouterr().out.split()[-1])
        assert sample.main(command(resume=kept)) == 0
        np.testing.assert_array_equal(arrays(out)[kept.stem], clip.latents[0])
    for change, sentence in (
        ({"boundary": 0.5}, "boundary: the state has 0.9, this run 0.5"),
        ({"image": out / f"{stem}.png"}, "image: the state has '"),
    ):
        assert sample.main(command(resume=kept, **change)) == 3
        assert sentence in capsys.readouterr().err


def test_a_file_of_prompts_and_what_is_made_already(command, tmp_path, capsys):
    lines = [{"prompt": "a red seven", "id": "one"}, {"prompt": "two moves", "guidance_2": 1.0, "boundary": 0.3}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert sample.main(command(prompts=tmp_path / "prompts.jsonl", num_frames=2)) == 0
    assert sorted(arrays(tmp_path / "out")) == ["one", "two-moves_seed4"]
    capsys.readouterr()
    with open(tmp_path / "prompts.jsonl", "a") as file:
        file.write("\n" + json.dumps({"prompt": "blue", "embedded_guidance": 2}))
    assert sample.main(command(prompts=tmp_path / "prompts.jsonl", num_frames=2)) == 0
    assert "2 of 3 videos are already in" in capsys.readouterr().err
    assert sorted(arrays(tmp_path / "out")) == ["blue_seed5", "one", "two-moves_seed4"]


@pytest.fixture
def illustrated(tmp_path):
    """A file of prompts beside which pictures stand, two of them of another size; two lines cannot be used."""
    wide, names = np.random.default_rng(6).integers(0, 256, (9, 20, 3), np.uint8), ("wide.png", "picture.png")
    videos.write_png(tmp_path / "wide.png", wide)
    one, other = (str(tmp_path / name) for name in names)
    (tmp_path / "cut.png").write_bytes((tmp_path / "wide.png").read_bytes()[:99])
    lines = [
        {"prompt": "two", "image": one},
        {"prompt": "seven"},
        {"prompt": "red", "image": str(tmp_path / "cut.png")},
        {"prompt": "blue", "image": 5},
        {"prompt": "a red seven", "image": one, "last_image": other, "id": "both"},
        {"prompt": "moves", "image": one, "height": 8},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return wide, tmp_path / "prompts.jsonl"


def test_a_line_of_a_file_has_its_own_pictures(command, repository, illustrated, capsys):
    """One to one; each at its own size, those of one size together; a line whose picture is broken fails alone."""
    wide, path = illustrated
    request = sample.parse(command(prompts=path))
    made, problems = jobs.make_jobs(request.config, pipeline.inspect(repository, family=TOY), request.given)
    made = jobs.by_size(made)
    assert [(job.name, job.seed, job.clip.frames[1:]) for job in made] == [
        *(("two", 3, (10, 24)), ("both", 7, (10, 24)), ("seven", 4, (16, 16)), ("moves", 8, (8, 18)))
    ]
    assert "3 sizes of clips, each compiled once: 2 of 24x10 and 3 frames, 1 of 16x16" in capsys.readouterr().err
    np.testing.assert_array_equal(made[1].inputs["image"], squash(wide, 10, 24)[None])
    np.testing.assert_array_equal(made[1].inputs["last_image"], squash(PICTURE, 10, 24)[None])
    own, common = (pictures.digest(each) for each in (wide, PICTURE))
    assert [each for job in made[:3] for each in job.pictures.values()] == [own, own, common, common]
    assert [problem.split(" ", 1)[1] for problem in problems] == [
        f"line 3: {path.parent / 'cut.png'}: expected a picture (PNG, JPEG, WEBP, GIF or BMP), and it is damaged "
        "(image file is truncated); save it anew as PNG.",
        "line 4: image is 5; expected the path of a picture.",
    ]
    for cache in (jobs._kept, made[0].made.func.__self__._read):
        cache.cache_clear()
    videos.write_png(path.parent / "wide.png", 255 - wide)
    with pytest.raises(CheckpointError, match=r"wide\.png: changed since it was read before; start again"):
        [job.inputs for job in made[::-1]]
    request = sample.parse(command(prompts=path, **SQUARE))
    made, _ = jobs.make_jobs(request.config, pipeline.inspect(repository, family=TOY), request.given)
    assert {job.clip.frames[1:] for job in made} == {(16, 16), (8, 16)}


def test_the_command_that_goes_on_names_the_pictures_of_its_line(command, pipe, illustrated, tmp_path, capsys):
    wide, path = illustrated
    path.write_text(path.read_text().splitlines()[4])
    short = {"num_frames": 2, "steps": 2, "solver": "euler"}
    assert sample.main(command(prompts=path, stop_at=1, **short)) == 0
    words = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert f"--image={tmp_path / 'wide.png'}" in words and f"--last_image={tmp_path / 'picture.png'}" in words
    assert sample.main(["jvdiff sample", *words[2:]]) == 0
    whole = jvdiff.generate(pipe, "a red seven", seed=3, image=wide, last_image=Image.fromarray(PICTURE), **short)
    np.testing.assert_array_equal(arrays(tmp_path / "out")["both"], whole.latents[0])
    last = networks.encode(pipe.weights["vae"], squash(PICTURE, 10, 24)[None])
    np.testing.assert_allclose(whole.latents[:, -1:], last, rtol=0, atol=1e-5)
    record = json.loads((tmp_path / "out" / "both.json").read_text())
    assert (record["image"], record["last_image"]) == (pictures.digest(wide), pictures.digest(PICTURE))
    assert sample.main(command(prompts=path, **short)) == 0
    assert "1 of 1 videos are already in" in capsys.readouterr().err


def test_a_plan_is_of_the_pictures_size(command, illustrated, tmp_path):
    for given, size in ({}, (10, 24)), (SQUARE, (16, 16)):
        request = sample.parse(command(image=tmp_path / "wide.png", **given))
        assert plan.resolved(request.config, request.given)[1].frames[1:] == size


def test_help_has_the_defaults_of_its_files(repository, capsys):
    assert sample.main(["jvdiff sample", "--help", f"--checkpoint={repository}", FAMILY]) == 0
    assert re.search(r"--boundary +number +\[0\.9\]", capsys.readouterr().out)


def test_a_configuration_of_its_own(repository, tmp_path, capsys):
    """The family and its settings may stand in a file; a setting that it lacks is named."""
    lines = (
        "from jvdiff.commands import sample\ndef get_config():\n  config = sample.default_config()\n{}  return config\n"
    )
    fields = {"family": "toy.family:TOY", "checkpoint": str(repository), "boundary": 0.4, "steps": 2, "solver": "euler"}
    body = "".join(f"  config.{name} = {value!r}\n" for name, value in fields.items())
    body = "  with config.unlocked():\n" + "".join(f"  {line}\n" for line in body.splitlines())
    (tmp_path / "own.py").write_text(lines.format(body))
    words = ["jvdiff sample", f"--config={tmp_path / 'own.py'}", "--prompt=seven", f"--output={tmp_path / 'out'}"]
    assert sample.main([*words, "--compile_cache=off", "--guidance_2=1", "--seed=1"]) == 0
    record = json.loads((tmp_path / "out" / "seven_seed1.json").read_text())
    assert record["boundary"] == 0.4 and record["guidance_2"] == 1 and record["steps"] == 2
    assert sample.main([*words, "--guidance_3=1"]) == 2
    assert "did you mean --guidance_2?" in capsys.readouterr().err
    assert sample.main([*words, "--help"]) == 0
    page = capsys.readouterr().out
    assert "--embedded_guidance" in page and "--negative_prompt" not in page


def test_the_plan_has_both_experts(command, repository, capsys):
    assert planning.main(["jvdiff plan", f"--checkpoint={repository}", FAMILY, "--mesh=data=2"]) == 0
    text = capsys.readouterr().out
    for part in (*KINDS, "denoise transformer", "denoise transformer_2", "picture", "decode"):
        assert re.search(rf"^ *{part} ", text, re.MULTILINE), part
    assert planning.main(["jvdiff plan", "--checkpoint=owner/Toy-1", FAMILY, "--num_frames=1"]) == 0
    assert "plan: 16x16, 1 frames" in capsys.readouterr().out
    assert planning.main(["jvdiff plan", "--checkpoint=nowhere", FAMILY]) == 2
    assert "there are plans of Toy-1." in capsys.readouterr().err
    known = pipeline.inspect(repository, family=TOY)
    context = pipeline.Context(TOY, known.models, precision.choose("float32"))
    clip = TOY.clip(known.models, known.settings(solver="euler", steps=7, boundary=0.95))
    every = list(plan.programs(context, clip))
    assert [program.part for program in every] == [
        *("vae", "image_encoder", "text_encoder", "text_encoder_2", "transformer", "transformer_2", "vae")
    ]
    times = {program.name: program.times for program in every}
    border = clip.segments[0].stop
    assert 0 < border < 6 and times == {
        **{"picture": 1, "look": 1, "text_encoder": 1, "text_encoder_2": 1, "decode": 3},
        **{"denoise transformer": border, "denoise transformer_2": 7 - border},
    }


def test_what_a_stopped_clip_still_runs(pipe):
    """One that goes on within the second expert compiles nothing of the first, and the other way round."""
    clip, inputs = pipe.clip(), TOY.longest(pipe.models, pipe.clip(), 1)

    def experts(**steps):
        calls = pipeline.trace(pipe.context, pipe.weights, clip, inputs, **steps)
        return [(call.stage.part, call.times) for call in calls if call.stage.part.startswith("transformer")]

    assert experts() == [("transformer", 2), ("transformer_2", 2)]
    assert experts(first=3) == [("transformer_2", 1)] and experts(last=1) == [("transformer", 1)]


# -------------------------------------------------------------------------------------------------------- repositories


def test_there_and_back(repository, clip, tmp_path, capsys):
    """What nobody uses is counted in a line and not written."""
    words = ["jvdiff convert", f"--source={repository}", f"--target={tmp_path / 'orbax'}", "--verify", FAMILY]
    assert convert.main(words) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "not used" in line]
    assert len(said) == 2 and "2 tensors are not used: 'logit_scale'; 'text_projection.weight'" in said[0]
    again = jvdiff.generate(
        jvdiff.load(tmp_path / "orbax", "float32", family=TOY), "a red seven", seed=3, image=PICTURE
    )
    np.testing.assert_array_equal(again.latents, clip.latents)
    words = ["jvdiff to_hf", f"--source={tmp_path / 'orbax'}", f"--target={tmp_path / 'hf'}", FAMILY]
    assert convert.to_hf(words) == 0
    for name in KINDS:
        file = f"{name}/{TOY.parts[name].stem}.safetensors"
        before, after = load_file(repository / file), load_file(tmp_path / "hf" / file)
        before = {tensor: x for tensor, x in before.items() if "logit" not in tensor and "projection" not in tensor}
        assert before.keys() == after.keys()
        for tensor in before:
            np.testing.assert_array_equal(before[tensor], after[tensor])
    assert json.loads((tmp_path / "hf" / "model_index.json").read_text())["boundary_ratio"] == 0.9


def test_what_a_conversion_leaves_in_its_dtype(repository, tmp_path, capsys):
    """The part that says so, whatever its name and its precision; and a family without a VAE has none to replace."""
    target = tmp_path / "orbax"
    words = ["jvdiff convert", f"--source={repository}", f"--target={target}", "--dtype=bfloat16", FAMILY]
    assert convert.main(words) == 0
    dtypes = {name: {str(leaf.dtype) for leaf in stored_leaves(target / name).values()} for name in KINDS}
    assert dtypes == {name: {"float32" if name == "vae" else "bfloat16"} for name in KINDS}
    parts = {name: part for name, part in TOY.parts.items() if name != "vae"}
    without = dataclasses.replace(TOY, parts=parts, misfits=lambda models: None)
    with pytest.raises(UsageError, match="the toy has no part vae; leave --vae out"):
        to_hf(target, tmp_path / "hf", vae=target / "vae", family=without)


def test_a_repository_is_saved_without_what_is_optional(repository, pipe, tmp_path):
    components = {
        name: (cfg, pipe.weights[name]) for name, cfg in pipe.models.configs.items() if name != "image_encoder"
    }
    files = {name: repository / name for name in WORDS}
    defaults = {"guidance_2": 1.5}
    pipeline.save(tmp_path / "saved", TOY, components, files=files, index={"boundary_ratio": 0.4}, defaults=defaults)
    saved = jvdiff.load(tmp_path / "saved", "float32", family=TOY)
    assert sorted(saved.weights) == sorted(components) and saved.settings().guidance_2 == 1.5
    assert saved.settings().boundary == 0.4 and saved.settings(boundary=0.8).boundary == 0.8
    assert jvdiff.generate(saved, "seven", seed=1, image=PICTURE).latents.shape == (1, 3, 8, 8, 4)
    with pytest.raises(CheckpointError, match="boundary_ratio is None"):
        pipeline.save(tmp_path / "other", TOY, components, files=files)
    del components["transformer_2"]
    with pytest.raises(UsageError, match="expected transformer, transformer_2"):
        pipeline.save(tmp_path / "other", TOY, components, files=files)


def test_one_folder_and_one_word(repository, monkeypatch):
    """In jvdiff/models the same folder needs one word more, and then no --family."""
    with pytest.raises(CheckpointError, match="describes a 'ToyPipeline'"):
        pipeline.inspect(repository)
    monkeypatch.setattr(models, "FAMILIES", (*models.FAMILIES, "toy"))
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(Path(__file__).parent)])
    known = pipeline.inspect(repository)
    assert known.family.name == "the toy" and known.settings().steps == 4
    assert list(models.settings(repository)) == ["toy"]


def test_the_recipe_tells_what_the_toy_needs():
    """docs/adding_a_family.md has the figure."""
    files = sorted((Path(__file__).parent / "toy").glob("*.py"))
    lines = sum(len(path.read_text().splitlines()) for path in files)
    text = (Path(__file__).parents[2] / "docs" / "adding_a_family.md").read_text()
    assert f"{lines} lines in {len(files)} files" in text
    every = [networks.abstract_params(networks.Config(kind)) for kind in KINDS.values()]
    assert sum(leaf.size for leaf in jax.tree.leaves(every)) < 1000
