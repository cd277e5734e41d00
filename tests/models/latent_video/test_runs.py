"""A folder of labelled clips becomes a model and samples, by the command lines; stopped, damaged and planned too."""

import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jvdiff
from jvdiff.commands import sample, train
from jvdiff.media import video as videos
from jvdiff.models import latent_video
from jvdiff.models.latent_video import runs as latent_video_runs
from tests.forks import Process

ROOT = Path(__file__).parents[3]
SMALLEST = """
from jvdiff.config import load
from ml_collections import ConfigDict
def get_config():
    config = load("latent_video_small")
    config.folder, config.clips, config.output = "{folder}/run", "{folder}/clips", "{folder}/out"
    config.num_frames, config.height, config.width, config.batch, config.workers = 4, 32, 32, 4, 2
    config.vae = ConfigDict(dict(
        model=dict(width=4, groups=2, blocks=1, multipliers=(1, 1, 1, 1)),
        batch=2, loss=dict(kl=1e-3), schedule=dict(steps=3, warmup=1),
    ))
    with config.ignore_type():
        config.transformer = ConfigDict(dict(hidden_size=16, depth=1, num_heads=2, freq_dim=16))
    config.precision, config.steps = "float32", 2
    config.schedule = ConfigDict(dict(steps=4, warmup=1, learning_rate=1e-2))
    config.loop.save_every, config.loop.log_every, config.loop.show_every = 2, 1, 99
    return config
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Ten clips of three classes, of different lengths; one of them is no clip."""
    folder, rng = tmp_path_factory.mktemp("data") / "clips", np.random.default_rng(0)
    for number in range(9):
        path = folder / ("cat", "dog", "bird")[number % 3] / f"{number}.mp4"
        videos.write_mp4(path, rng.integers(255, size=(5 + number % 3, 32, 40, 3), dtype=np.uint8), 8)
    (folder / "dog" / "bad.mp4").write_bytes(b"no video")
    return folder


def command(folder, clips):
    """A command line whose config is in a folder, and all that it makes."""
    (folder / "clips").symlink_to(clips)
    path = folder / "config.py"
    path.write_text(SMALLEST.format(folder=folder))
    return ["x", f"--config={path}", "--config.most_bad=0.2"]


@pytest.fixture
def config(tmp_path, clips):
    return command(tmp_path, clips)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, clips):
    """A whole run: its command line, and the folder that it is in."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*command(folder, clips), "--config.loop.accumulate=2", "--config.loop.show_every=2"]
    assert train.main(flags) == 0
    return flags, folder


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in found]


def parameters(folder, step):
    with ocp.PyTreeCheckpointer() as orbax:
        path = (folder / "state" / str(step) / "default").absolute()
        tree = orbax.metadata(path).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return jax.tree.leaves(orbax.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain)))


def test_from_a_folder_of_clips_to_samples(trained, capsys):
    flags, folder = trained
    run = folder / "run"
    assert [line["step"] for line in lines(run / "vae_run")] == [1, 2, 3] and "psnr" in lines(run / "vae_run")[0]
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4] and "loss_noisy" in lines(run)[0]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        f"00000{n}.{e}" for n in (2, 4) for e in ("mp4", "png")
    ]
    assert videos.read_video(run / "samples" / "000004.mp4").shape == (4, 64, 128, 3)

    pipe = jvdiff.load(run / "repository", "float32")
    configs, index = pipe.models.configs, pipe.models.index
    assert index["classes"] == ["bird", "cat", "dog"] and configs["transformer"].num_classes == 3
    assert all(std > 0 and std != 1 for std in configs["vae"].latents_std)
    for label in ("2", "dog"):
        assert sample.main([*flags[:-1], f"--config.class_label={label}", "--config.seed=5"]) == 0
    made = [folder / "out" / name for name in ("dog_seed5.mp4", "dog_seed5-2.mp4")]
    assert capsys.readouterr().out.split() == list(map(str, made)) and made[0].read_bytes() == made[1].read_bytes()
    record = json.loads(made[0].with_suffix(".json").read_text())
    assert (
        record["class_name"] == "dog"
        and record["guidance"] == 7.5
        and record["checkpoint_digest"] == pipe.repository.digest
    )
    shown, again = videos.read_video(made[0]), jvdiff.generate(pipe, labels="dog", seed=5, steps=2).video[0]
    assert shown.shape == again.shape == (4, 32, 32, 3)
    assert np.abs(shown.astype(int) - again).mean() < 20  # H.264 of noise

    assert train.main(flags) == 0  # all is done
    said = capsys.readouterr()
    assert "resuming at step 4" in said.err and "10 clips of 3 classes" in said.err and "psnr" not in said.err
    assert said.out.strip() == str(run / "repository")


def test_a_trained_model_is_trained_on(trained, config, tmp_path, capsys):
    """With its VAE as it is; at a rate of nothing it stays what it was."""
    repository = trained[1] / "run" / "repository"
    flags = [*config, f"--config.initial={repository}", "--config.schedule.learning_rate=1e-12"]
    assert train.main(flags) == 0
    was, became = (jvdiff.load(path, "float32") for path in (repository, tmp_path / "run" / "repository"))
    jax.tree.map(np.testing.assert_array_equal, became.weights["vae"], was.weights["vae"])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)  # noqa: E731
    jax.tree.map(close, became.weights["transformer"], was.weights["transformer"])
    assert became.models.configs == was.models.configs and not (tmp_path / "run" / "vae_run").exists()

    capsys.readouterr()
    assert train.main([*flags, "--config.prediction=epsilon", f"--config.folder={tmp_path / 'other'}"]) == 2
    assert "transformer: not that of initial, " in (said := capsys.readouterr().err)
    assert "prediction is epsilon, there v_prediction" in said
    assert train.main([*flags, "--config.noise_schedule=linear", f"--config.folder={tmp_path / 'other'}"]) == 2
    assert "noise_schedule is 'linear'; " in (said := capsys.readouterr().err) and "has learnt 'cosine'" in said
    assert train.main([*flags[:-2], "--config.initial=nowhere", f"--config.folder={tmp_path / 'other'}"]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_a_killed_run_goes_on_bit_for_bit(trained, config, tmp_path):
    """In another process; the data is cached latents. Of clips, tests/media/test_clips.py says that they go on."""
    flags = [*config, "--config.cache_latents=True", "--config.schedule.steps=6"]
    content, vae = (tmp_path / "config.py").read_text(), str(trained[1] / "run" / "vae")
    (tmp_path / "config.py").write_text(
        content.replace("config.transformer =", f"config.vae = {vae!r}; config.transformer =")
    )
    assert train.main(flags) == 0
    other = tmp_path / "other"
    code = (
        "import sys, os, signal, pathlib, time; from jvdiff.commands import train; from jvdiff.training import loop\n"
        "write = loop.Metrics.write\n"
        "def dying(self, step, numbers):\n"
        "    write(self, step, numbers)\n"
        "    if step == 5:\n"
        f"        while not pathlib.Path({str(other / 'state' / '4')!r}).exists(): time.sleep(0.01)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "loop.Metrics.write = dying\n"
        "sys.exit(train.main(sys.argv))"
    )
    flags.append(f"--config.folder={other}")
    died = Process("-c", code, *flags[1:])
    assert died.wait() == -signal.SIGKILL, died.err
    assert train.main(flags) == 0
    for one, two in zip(parameters(tmp_path / "run", 6), parameters(other, 6), strict=True):
        np.testing.assert_array_equal(one, two)
    assert lines(tmp_path / "run") == lines(other)
    cached = tmp_path / "run" / "latents.npz"
    before = np.load(cached)["labels"]
    rows = [
        f"{tmp_path}/clips/{kind}/{path.name},{label}"
        for kind, label in (("bird", "bird"), ("cat", "dog"), ("dog", "cat"))
        for path in sorted((tmp_path / "clips" / kind).iterdir())
    ]  # the same files in the same order
    (tmp_path / "clips.csv").write_text("\n".join(["path,label", *rows]))
    relabelled = [*flags[:-1], f"--config.clips={tmp_path / 'clips.csv'}", "--config.allow_changes=True"]
    assert train.main(relabelled) == 0
    np.testing.assert_array_equal(np.load(cached)["labels"], np.array([0, 2, 1])[before])


def test_a_mesh_trains_the_same_model(trained, tmp_path):
    """Clips over two devices, weights over two, heads over two."""
    flags, folder = trained
    (tmp_path / "run").mkdir()
    shutil.copytree(folder / "run" / "vae", tmp_path / "run" / "vae")
    more = [f"--config.folder={tmp_path / 'run'}", "--config.loop.mesh=data=2,fsdp=2,tensor=2"]
    assert train.main([*flags[:-1], *more]) == 0
    for one, two in zip(lines(folder / "run"), lines(tmp_path / "run"), strict=True):
        np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=1e-3, atol=1e-4)


def test_a_plan_needs_no_clips(config, tmp_path, capsys):
    (tmp_path / "clips").unlink()
    assert train.main([*config, "--config.plan=true", "--config.loop.accumulate=2"]) == 0
    said = capsys.readouterr().out
    for part, cfg in (
        ("vae", latent_video.VAEConfig(width=4, groups=2, blocks=1, multipliers=(1, 1, 1, 1))),
        ("transformer", latent_video.DiTConfig(16, 1, 2, num_classes=10, freq_dim=16)),
    ):
        count = sum(leaf.size for leaf in jax.tree.leaves(latent_video.abstract_params(cfg)))
        assert f"{part}: {count:,} parameters" in said
    assert said.count("FLOPs; memory: ") == 2 and "4 steps of 4 clips in 2 parts" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.clips=nowhere"], "nowhere: no such folder or file"),
        (["--config.batch=99"], "10 clips, fewer than a batch of 99"),
        (["--config.height=40"], "height is 40 and width 32; clips are trained as squares"),
        (
            ["--config.num_frames=6"],
            "num_frames is 6; this model needs a multiple of 4 from 4 to",
        ),
        (["--config.prediction=x0"], "prediction is 'x0'; allowed is one of v_prediction"),
        (["--config.noise_schedule=square"], "noise schedule is 'square'; expected one of cosine, linear"),
        (["--config.precision=int8"], "precision is 'int8'; expected one of float32, bfloat16"),
        (["--config.most_bad=2.0"], "most_bad is 2.0; expected 0 to 1"),
        (["--config.vae.batch=0"], "vae.batch is 0; expected a whole number from 1"),
    ],
)
def test_bad_configs_are_a_sentence(config, capsys, flags, message):
    assert train.main([*config, *flags]) in (2, 3)
    assert message in capsys.readouterr().err


def test_a_value_of_the_file_is_checked_as_a_flag_is(config, capsys):
    path = Path(config[1].removeprefix("--config="))
    path.write_text(path.read_text().replace("return config", "config.loss.drop_label = 3.0; return config"))
    assert train.main(config) == 2
    assert "loss.drop_label is 3.0; expected 0 to 1" in capsys.readouterr().err


def with_short_clips(config, fields):
    """The same command line; eight frames a clip, and these `vae.short_clips`."""
    path = Path(config[1].removeprefix("--config="))
    path.write_text(path.read_text().replace("batch=2, loss", f"batch=2, short_clips={fields}, loss"))
    return [*config, "--config.num_frames=8"]


def test_the_first_batches_of_the_vae_are_of_shorter_clips_if_asked_for(config, tmp_path, monkeypatch):
    """More of them, and the same ones in a run that goes on."""
    for number in range(8):
        clip = np.random.default_rng(number).integers(255, size=(8, 32, 32, 3), dtype=np.uint8)
        videos.write_mp4(tmp_path / "long" / "any" / f"{number}.mp4", clip, 8)
    seen = {}

    def fit(task, schedule, folder, **options):
        for start in (0, 1, 2):
            batches = task.batches(start)
            seen[start] = [next(batches) for _ in range(schedule.steps - start)]
            batches.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(latent_video_runs, "fit", fit)
    flags = [*with_short_clips(config, "dict(steps=2, num_frames=4)"), f"--config.clips={tmp_path / 'long'}"]
    assert train.main(flags) == 130
    assert [video.shape for video in seen[0]] == [(4, 4, 32, 32, 3), (4, 4, 32, 32, 3), (2, 8, 32, 32, 3)]
    for start in (1, 2):
        for one, two in zip(seen[0][start:], seen[start], strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("3", "vae.short_clips is 3; expected a dictionary"),
        ("dict(steps=2)", "vae.short_clips.num_frames is None; expected a whole number from 1"),
        ("dict(steps=3, num_frames=4)", "vae.short_clips.steps is 3; expected fewer than the 3 of vae.schedule"),
        ("dict(steps=2, num_frames=6)", "num_frames is 6; expected a multiple of 4 that divides the 8 frames"),
    ],
)
def test_short_clips_that_cannot_be(config, capsys, fields, message):
    assert train.main(with_short_clips(config, fields)) == 2
    assert message in capsys.readouterr().err


def test_too_many_bad_clips_stop_the_run(config, capsys, monkeypatch):
    def fit(task, *args, **options):
        for _ in task.batches(0):
            pass

    monkeypatch.setattr(latent_video_runs, "fit", fit)  # which compiles a step before it takes a batch
    assert train.main([*config, "--config.most_bad=0.0", "--config.vae.schedule.steps=99"]) == 3
    assert "1 of 10 clips cannot be read, more than most_bad=0" in capsys.readouterr().err


def test_samples_that_cannot_be(config, trained, capsys):
    assert sample.main([*config, "--config.class_label=7"]) == 2
    assert "no such folder; train a model first" in capsys.readouterr().err
    assert sample.main([*trained[0][:-1]]) == 2
    assert "give either --class_label=" in capsys.readouterr().err
    assert sample.main([*trained[0][:-1], "--config.class_label=7"]) == 2
    assert "class_label is 7; expected a number from 0 to 2, or a name: 0 bird, 1 cat, 2 dog" in capsys.readouterr().err
