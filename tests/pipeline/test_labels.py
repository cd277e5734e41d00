"""Labels become clips as prompts do, on a tiny random model: saving, loading, solvers, guidance, meshes, resuming."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jvdiff
from jvdiff import pipeline
from jvdiff.commands import sample
from jvdiff.diffusion import variance_preserving as vp
from jvdiff.digits import clips as digits
from jvdiff.errors import CheckpointError, IntegrityError, NumericsError, UsageError
from jvdiff.models import latent_video
from jvdiff.models.family import Request
from jvdiff.models.latent_video.family import CLASS_CONDITIONAL, encode_program
from jvdiff.models.latent_video.settings import SOLVERS, Settings
from jvdiff.runtime import peers
from jvdiff.weights.manifest import read_manifest, write_manifest

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "digits-classes"
DIT = latent_video.DiTConfig(hidden_size=16, depth=1, num_heads=2, num_classes=3, freq_dim=16)
VAE = latent_video.VAEConfig(
    width=4, multipliers=(1, 1, 1, 1), blocks=1, groups=2, latents_mean=(0.1, 0.0, 0.0, -0.2), latents_std=(2.0,)
)
SETTINGS = Settings(num_frames=8, height=16, width=32, fps=5, steps=3, guidance=2.0)
CLASSES = ("ant", "bee", "cow")


def save(folder, dit=DIT, classes=CLASSES):
    """A repository in which no leaf is zero, so that nothing is idle."""
    rng = np.random.default_rng(0)

    def random(leaf):
        return rng.standard_normal(leaf.shape, np.float32) * max(leaf.shape[-2:-1] or (9,)) ** -0.5

    parts = {
        part: (cfg, jax.tree.map(random, latent_video.abstract_params(cfg)))
        for part, cfg in (("transformer", dit), ("vae", VAE))
    }
    index = {"classes": list(classes), "noise_schedule": "cosine", "defaults": dataclasses.asdict(SETTINGS)}
    pipeline.save(folder, CLASS_CONDITIONAL, parts, files={}, index=index)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "repository")


@pytest.fixture(scope="module")
def pipe(folder):
    return jvdiff.load(folder, "float32")


def test_what_was_saved_is_loaded(pipe, folder):
    assert pipe.models.configs == {"transformer": DIT, "vae": VAE}
    assert (tuple(pipe.models.index["classes"]), pipe.settings()) == (CLASSES, SETTINGS)
    assert jvdiff.load(folder, "bfloat16").weights["transformer"]["head"]["kernel"].dtype == jnp.bfloat16
    assert len(pipe.repository.digest) == 64


def test_two_classes_are_not_the_class_of_a_folder(tmp_path):
    """As a component is a pair of library and class in model_index.json, they are a pair of texts."""
    two = save(tmp_path / "two", dataclasses.replace(DIT, num_classes=2), ("cat", "dog"))
    assert pipeline.inspect(two).models.index["classes"] == ["cat", "dog"]


def test_the_model_that_ships_draws_on_black():
    pipe = jvdiff.load(SHIPPED, "float32")
    assert tuple(pipe.models.index["classes"]) == digits.DIGITS
    assert [CLASS_CONDITIONAL.check_subject(pipe.models, each) for each in (7, "7", "seven")] == ["seven"] * 3
    video = jvdiff.generate(pipe, labels=7, seed=0, steps=5).video[0]
    light = video.max(axis=-1).astype(int)  # [F,Y,X]
    assert video.shape == (16, 64, 64, 3) and np.median(light) < 20
    drawn = (light > 100).sum(axis=(1, 2))
    assert (drawn > 20).all() and (drawn < 800).all()  # of 4,096 pixels, in every frame


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_makes_the_same_clip_again(pipe, solver):
    one, two = (jvdiff.generate(pipe, labels=["cow", 0], seed=4, solver=solver) for _ in range(2))
    assert one.video.shape == (2, 8, 16, 32, 3) and one.video.dtype == np.uint8
    assert one.latents.shape == (2, 2, 2, 4, 4) and one.subjects == ("cow", "ant") and one.seeds == (4, 5)
    np.testing.assert_array_equal(one.video, two.video)
    assert np.any(one.latents != jvdiff.generate(pipe, labels=["cow", 0], seed=5, solver=solver).latents)
    assert np.any(one.latents[0] != jvdiff.generate(pipe, labels=["bee", 0], seed=4, solver=solver).latents[0])


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_a_clip_does_not_depend_on_what_else_is_in_the_batch(pipe, solver):
    together = jvdiff.generate(pipe, labels=[0, 1, 2], seed=4, solver=solver)
    alone = jvdiff.generate(pipe, labels=1, seed=5, solver=solver)
    np.testing.assert_allclose(together.latents[1], alone.latents[0], rtol=0, atol=2e-5)


def test_encoded_clips_are_the_normalised_means(pipe):
    """What `decode` takes: the clips' own latents, with the statistics of the configuration taken off."""
    video, vae = np.random.default_rng(0).integers(256, size=(2, 8, 16, 32, 3), dtype=np.uint8), pipe.weights["vae"]
    latents = np.asarray(encode_program(VAE)(vae, video))
    encode = jax.jit(latent_video.encode, static_argnums=1)
    mean, _ = encode(vae, VAE, jnp.asarray(video, jnp.float32) / 127.5 - 1.0)
    np.testing.assert_allclose(2.0 * latents + np.array([0.1, 0.0, 0.0, -0.2]), mean, rtol=0, atol=1e-5)
    decoded = pipeline.decode(pipe.context, pipe.clip(), latents, pipe.run)
    assert latents.dtype == np.float32 and decoded.shape == video.shape
    with pytest.raises(UsageError, match="nearest size that fits is 8 frames of 16x24"):
        encode_program(VAE)(vae, video[:, :, :, :21])


def test_labels_of_numpy(pipe):
    """Numbers and arrays of them are labels; truth values and fractions are none."""
    for labels in (np.array([2, 0]), jnp.array([2, 0]), [np.int32(2), np.uint8(0)], np.array(["cow", "ant"])):
        assert pipeline.check_subjects(pipe.repository, labels=labels) == ("cow", "ant")
    assert pipeline.check_subjects(pipe.repository, labels=np.int64(1)) == ("bee",)
    for labels in (np.array([True]), [np.bool_(True)], np.array([1.0]), np.array([[1]])):
        with pytest.raises(UsageError, match="class_label is"):
            pipeline.check_subjects(pipe.repository, labels=labels)


def test_ddim_is_the_euler_step_and_the_others_are_not(pipe):
    latents = {solver: jvdiff.generate(pipe, labels=1, seed=0, solver=solver).latents for solver in SOLVERS}
    np.testing.assert_array_equal(latents["ddim"], latents["euler"])
    for other in ("ddpm", "unipc"):
        assert np.abs(latents[other] - latents["ddim"]).max() > 1e-2


def test_guidance_one_is_the_conditional_model(pipe):
    """One DDIM step of it, by hand in DDPM's own coordinates; and guidance moves away from no class."""
    abar = vp.alphas_cumprod()[999]
    noise = pipeline.initial_noise([3], pipe.clip().latents)

    @jax.jit
    def clean(labels):
        v = latent_video.denoise(pipe.weights["transformer"], DIT, noise, jnp.full(1, 999.0), labels)
        return np.sqrt(abar) * noise - np.sqrt(1 - abar) * v

    given, none = clean(jnp.array([1])), clean(jnp.array([3]))
    for guidance in (1.0, 2.5):
        latents = jvdiff.generate(pipe, labels=1, seed=3, steps=1, guidance=guidance).latents
        np.testing.assert_allclose(latents, none + guidance * (given - none), rtol=0, atol=1e-4)
    assert np.abs(given - none).max() > 0.05


@pytest.mark.parametrize(
    ("labels", "given", "message"),
    [
        ([], {}, "no labels; give at least one"),
        (["dog"], {}, "class_label is 'dog'; expected a number from 0 to 2, or a name: 0 ant, 1 bee, 2 cow"),
        (["kow"], {}, r"class_label is 'kow' \(did you mean cow\?\); expected"),
        ([3], {}, "class_label is 3; expected a number from 0 to 2"),
        ([True], {}, "class_label is True"),
        (None, {"prompts": "cow"}, "takes labels, not prompts"),
        ([0], {"image": np.zeros((16, 32, 3), np.uint8)}, "takes no image; leave it out"),
        ([0], {"height": 20}, "height is 20; this model needs a multiple of 16 .* The nearest is 16"),
        ([0], {"num_frames": 3}, "num_frames is 3; this model needs a multiple of 4 .* The nearest is 4"),
        ([0], {"steps": 0}, "steps is 0; expected 1 to 1000"),
        ([0], {"guidance": float("nan")}, r"guidance is nan; expected 1.0 to 100.0"),
        ([0], {"solver": "heun"}, "solver is 'heun'; expected one of ddim, ddpm, unipc, euler"),
        ([0], {"shift": 3.0}, "unknown setting shift; expected some of num_frames, height"),
        ([0], {"seed": -1}, "seed is -1"),
    ],
)
def test_what_cannot_be_is_a_sentence(pipe, labels, given, message):
    with pytest.raises(UsageError, match=message):
        jvdiff.generate(pipe, labels=labels, **given)


def test_nan_is_told_with_its_step(pipe):
    broken = jax.tree.map(lambda x: x * jnp.nan, pipe.weights["transformer"])
    weights = pipeline.Weights({**pipe.weights, "transformer": broken})
    with pytest.raises(NumericsError, match=r"after step 1 of 3, 100.0% of the latents are NaN or infinite"):
        jvdiff.generate(dataclasses.replace(pipe, weights=weights), labels=0, seed=0)
    clip = pipe.clip()
    with pytest.raises(NumericsError, match="of the pixels of latent frames 1 to 2 of 2 are NaN or infinite") as told:
        pipeline.decode(pipe.context, clip, pipeline.initial_noise([0], clip.latents) * jnp.nan, pipe.run)
    assert told.value.step == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "Other"}, "describes a 'Other'; expected 'WanPipeline', .* or 'LatentVideoPipeline'"),
        ({"_class_name": "WanPipeline"}, "describes 'LatentVideoTransformer', expected"),
        ({"classes": ["one"]}, "takes 3 classes and 4 latent channels,\nthere are 1 and 4"),
        ({"classes": None}, "classes is None; expected the names of the labels"),
        ({"noise_schedule": "square"}, "noise_schedule is 'square'; expected one of cosine, linear"),
        ({"defaults": {"steps": "many"}}, "steps is 'many'; expected a whole number"),
        ({"defaults": {"speed": 3}}, "unknown setting speed"),
        ({"defaults": 3}, "defaults is 3; expected an object"),
    ],
)
def test_damaged_repositories(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    (tmp_path / "copy" / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(IntegrityError, match=r"model_index.json has"):
        jvdiff.load(tmp_path / "copy", "float32")
    write_manifest(tmp_path / "copy", read_manifest(tmp_path / "copy")["tensors"], {})  # as if it had been written so
    with pytest.raises(CheckpointError, match=message):
        jvdiff.load(tmp_path / "copy", "float32")
    with pytest.raises(UsageError, match="no such folder"):
        jvdiff.load(tmp_path / "nowhere")


@pytest.mark.parametrize("mesh", ["data=2", "fsdp=2", "tensor=2"])
def test_a_clip_is_the_same_on_a_mesh_and_nothing_is_compiled_twice(pipe, folder, mesh, caplog, monkeypatch):
    alone, spread = jvdiff.generate(pipe, labels=["cow"], seed=3), jvdiff.load(folder, "float32", mesh)
    clip = spread.clip()
    for call in pipeline.trace(spread.context, spread.weights, clip, np.array([2], np.int32)):
        call.traced.lower().compile()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        out = jvdiff.generate(spread, labels=["cow"], seed=3)
    told = " ".join(r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage())
    assert "jit(denoise)" not in told and "jit(decode)" not in told
    np.testing.assert_allclose(out.latents, alone.latents, atol=1e-5 * np.abs(alone.latents).max())
    assert np.abs(out.video.astype(int) - alone.video).max() <= 1
    preview = spread.family.preview(spread.models, spread.context.forward(clip))
    assert spread.run(preview, out.latents[:, :1]).sharding.is_fully_replicated
    monkeypatch.setattr(peers, "gather", lambda drawn: [3, drawn])
    assert jvdiff.generate(spread, labels=["cow"]).seeds == (3,)  # the one that process 0 has drawn


def test_the_stages_of_a_clip(pipe):
    """Nothing encodes a label; three steps, and the clip is decoded at once."""
    clip = pipe.clip()
    inputs = pipe.family.inputs(pipe.models, clip, Request(labels=("cow",)))
    abstract = pipeline.abstract_params(pipe.family, pipe.models, pipe.precision)
    calls = pipeline.trace(pipe.context, abstract, clip, inputs)
    assert [(call.stage.name, call.times) for call in calls] == [("denoise", 3), ("decode", 1)]


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def command(folder, tmp_path):
    """argv of a run into tmp_path/out."""

    def build(*flags, output="out"):
        rest = [f"--checkpoint={folder}", f"--output={tmp_path / output}", "--seed=3"]
        return ["sample", *rest, *flags]

    return build


@pytest.mark.parametrize("label", ["cow", "2"])
def test_the_name_that_was_taken_is_printed_and_recorded(command, tmp_path, pipe, label, capsys):
    assert sample.main(command(f"--class_label={label}", "--save_arrays=true")) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(tmp_path / "out" / "cow_seed3.mp4")
    assert "class name: cow   class label: 2   seed: 3" in told.err
    record = json.loads((tmp_path / "out" / "cow_seed3.json").read_text())
    assert (record["class_name"], record["class_label"], record["seed"], record["solver"]) == ("cow", 2, 3, "ddim")
    assert record["checkpoint_digest"] == pipe.repository.digest
    with np.load(tmp_path / "out" / "cow_seed3.npz") as arrays:
        np.testing.assert_array_equal(arrays["latents"], jvdiff.generate(pipe, labels=2, seed=3).latents[0])


def test_a_tuple_of_labels_and_one_that_is_not_there(command, tmp_path, capsys):
    assert sample.main(command("--class_label=('cow', 0)", "--steps=1")) == 0
    assert {path.stem for path in (tmp_path / "out").glob("*.mp4")} == {"cow_seed3", "ant_seed4"}
    capsys.readouterr()
    assert sample.main(command("--class_label=7")) == 2
    assert "class_label is 7; expected a number from 0 to 2, or a name: 0 ant, 1 bee, 2 cow" in capsys.readouterr().err
    assert sample.main(command("--prompt=cow")) == 2
    assert "prompt is given; this model takes class_label" in capsys.readouterr().err
    assert sample.main(command()) == 2
    assert "class_label" in capsys.readouterr().err


@pytest.mark.parametrize("solver", ["ddpm", "unipc"])
def test_stopped_and_finished_is_uninterrupted(command, tmp_path, solver, capsys, printed, same_files):
    flags = ["--class_label=cow", f"--solver={solver}", "--save_arrays=true", "--preview_every=1"]
    assert sample.main(command(*flags, output="whole")) == 0
    assert sample.main(command(*flags, "--stop_at=2")) == 0
    again = printed()
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"cow_seed3.state", "cow_seed3.preview.png"}
    resumed = [flag for flag in command("--save_arrays=true") if not flag.startswith("--seed")]
    for flag, status, message in (
        ("--class_label=0", 3, "class_label: the state has 'cow', this run 'ant'"),
        ("--class_label=('cow', 'ant')", 3, "class_label: the state has 'cow', this run ('cow', 'ant')"),
        ("--prompt=cow", 2, "prompt is given; this model takes class_label"),
        ("--prompts=labels.txt", 2, "is the state of one video; leave it out"),
    ):
        assert sample.main([*resumed, f"--resume={out / 'cow_seed3.state'}", flag]) == status
        assert message in capsys.readouterr().err
    assert sample.main([*again, "--class_label=2"]) == 0  # the same, said again
    same_files(tmp_path / "whole", out)
    assert json.loads((out / "cow_seed3.json").read_text())["resumed_at_step"] == 2


def test_a_file_of_labels(command, tmp_path, capsys):
    """Names and numbers, one a line or as JSON with a seed, a file name and settings; what is done is passed by."""
    lines = ['{"class_label": "cow", "id": "first", "seed": 9}', '{"class_label": 0, "steps": 1}', '{"class_label": 8}']
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    (tmp_path / "labels.txt").write_text("bee\n2\n")
    assert sample.main(command(f"--prompts={tmp_path / 'labels.jsonl'}")) == 3
    out = tmp_path / "out"
    assert {path.stem for path in out.glob("*.mp4")} == {"first", "ant_seed4"}
    assert "labels.jsonl line 3: class_label is 8; expected a number from 0 to 2" in capsys.readouterr().err
    record = json.loads((out / "first.json").read_text())
    assert (record["class_name"], record["seed"], record["steps"]) == ("cow", 9, 3)
    assert sample.main(command(f"--prompts={tmp_path / 'labels.txt'}")) == 0
    assert {path.stem for path in out.glob("*.mp4")} == {"first", "ant_seed4", "bee_seed3", "cow_seed4"}
    assert sample.main(command(f"--prompts={tmp_path / 'labels.txt'}")) == 0
    assert "2 of 2 videos are already in" in capsys.readouterr().err


def test_a_plan_and_a_mesh(command, tmp_path, capsys):
    assert sample.main(command("--class_label=cow", "--plan=true", "--mesh=fsdp=2")) == 0
    told = capsys.readouterr().out
    for words in ("transformer", "vae", "denoise", "decode", "mesh: fsdp=2, 2 devices", "one clip: "):
        assert words in told
    assert not (tmp_path / "out").exists()
    assert sample.main(command("--class_label=cow", "--mesh=tensor=2")) == 0
    assert json.loads((tmp_path / "out" / "cow_seed3.json").read_text())["device"]["mesh"] == "tensor=2"
    capsys.readouterr()
    assert sample.main(command("--class_label=cow", "--mesh=tensor=3")) == 2
    assert "tensor=3 does not divide the 2 attention heads" in capsys.readouterr().err
