"""A folder of labelled clips becomes a model and samples, by the command lines; stopped, damaged and planned too."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jvdiff import class_conditional, sample, train
from jvdiff.data import video as videos
from jvdiff.models import latent_video

ROOT = Path(__file__).parents[2]
SMALLEST = """
from configs import latent_video_small
from ml_collections import ConfigDict
def get_config():
    config = latent_video_small.get_config()
    config.folder, config.clips, config.output = "{folder}/run", "{folder}/clips", "{folder}/out"
    config.num_frames, config.height, config.width, config.batch, config.workers = 4, 32, 32, 4, 2
    config.vae = ConfigDict(dict(
        model=dict(width=4, groups=2, blocks=1, multipliers=(1, 1, 1, 1)),
        batch=2, loss=dict(kl=1e-3), schedule=dict(steps=3, warmup=1),
    ))
    with config.ignore_type():
        config.transformer = ConfigDict(dict(hidden_size=16, depth=1, num_heads=2, freq_dim=16))
    config.precision, config.steps, config.compile_cache = "float32", 2, "off"
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


@pytest.fixture
def config(tmp_path, clips):
    (tmp_path / "clips").symlink_to(clips)
    path = tmp_path / "config.py"
    path.write_text(SMALLEST.format(folder=tmp_path))
    return ["x", f"--config={path}", "--config.most_bad=0.2"]


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in found]


def parameters(folder, step):
    with ocp.PyTreeCheckpointer() as orbax:
        path = (folder / "state" / str(step) / "default").absolute()
        tree = orbax.metadata(path).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return jax.tree.leaves(orbax.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain)))


def test_from_a_folder_of_clips_to_samples(config, tmp_path, capsys):
    assert train.main([*config, "--config.loop.show_every=2"]) == 0
    said = capsys.readouterr()
    run = tmp_path / "run"
    assert said.out.strip() == str(run / "repository") and "10 clips of 3 classes" in said.err
    assert "another clip takes the place" in said.err and "bad.mp4" in said.err
    assert [line["step"] for line in lines(run / "vae_run")] == [1, 2, 3] and "psnr" in lines(run / "vae_run")[0]
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4] and "loss_noisy" in lines(run)[0]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        f"00000{n}.{e}" for n in (2, 4) for e in ("mp4", "png")
    ]
    assert videos.read_video(run / "samples" / "000004.mp4").shape == (4, 64, 128, 3)

    model = class_conditional.load(run / "repository", "float32")
    assert model.classes == ("bird", "cat", "dog") and model.configs.transformer.num_classes == 3
    assert all(std > 0 and std != 1 for std in model.configs.vae.latents_std)
    assert sample.main([*config, "--config.class_label=2", "--config.seed=5"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "class2_seed5.mp4")
    record = json.loads((tmp_path / "out" / "class2_seed5.json").read_text())
    assert record["class_name"] == "dog" and record["guidance"] == 7.5 and record["checkpoint_digest"] == model.digest
    again = class_conditional.generate(model, ["dog"], seed=5, steps=2)
    shown = videos.read_video(tmp_path / "out" / "class2_seed5.mp4")
    assert shown.shape == again.video[0].shape == (4, 32, 32, 3)
    assert np.abs(shown.astype(int) - again.video[0]).mean() < 20  # H.264 of noise

    assert train.main(config) == 0  # all is done
    said = capsys.readouterr().err
    assert "resuming at step 4" in said and not (run / "vae_run" / "state" / "4").exists()


@pytest.mark.parametrize("cached", [False, True])
def test_a_killed_run_goes_on_bit_for_bit(config, tmp_path, cached):
    """In the transformer's training, in another process; the data is read from the files, or from cached latents."""
    more = [f"--config.cache_latents={cached}", "--config.schedule.steps=6"]
    assert train.main([*config, *more]) == 0
    other = f"--config.folder={tmp_path / 'other'}"

    code = (
        "import sys, os, signal, pathlib; from jvdiff import train; from jvdiff.training import loop\n"
        "write = loop.Metrics.write\n"
        "def dying(self, step, numbers):\n"
        "    write(self, step, numbers)\n"
        f"    if step == 5 and pathlib.Path({str(tmp_path / 'other' / 'state' / '4')!r}).exists():\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "loop.Metrics.write = dying\n"
        "sys.exit(train.main(sys.argv))"
    )
    how = {"cwd": ROOT, "capture_output": True, "text": True}
    died = subprocess.run([sys.executable, "-c", code, *config[1:], *more, other], **how)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert train.main([*config, *more, other]) == 0
    for one, two in zip(parameters(tmp_path / "run", 6), parameters(tmp_path / "other", 6), strict=True):
        np.testing.assert_array_equal(one, two)
    assert lines(tmp_path / "run") == lines(tmp_path / "other")


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
        (["--config.clips=nowhere"], "nowhere: there is no such folder or file"),
        (["--config.batch=99"], "there are 10 clips, fewer than a batch of 99"),
        (["--config.height=40"], "height is 40 and width 32; clips are trained as squares"),
        (["--config.num_frames=6"], "num_frames is 6; this model needs a multiple of 4. The nearest is 8"),
        (["--config.prediction=x0"], "prediction is 'x0'; allowed is one of v_prediction"),
        (["--config.noise_schedule=square"], "noise schedule is 'square'; expected one of cosine, linear"),
        (["--config.precision=int8"], "precision is 'int8'; expected one of float32, bfloat16"),
        (["--config.most_bad=2.0"], "most_bad is 2.0; expected a share"),
        (["--config.vae.batch=0"], "vae.batch is 0; expected a whole number from 1"),
    ],
)
def test_bad_configs_are_a_sentence(config, capsys, flags, message):
    assert train.main([*config, *flags]) in (2, 3)
    assert message in capsys.readouterr().err


def test_too_many_bad_clips_stop_the_run(config, capsys):
    assert train.main([*config, "--config.most_bad=0.0"]) == 3
    assert "1 of 10 clips cannot be read, more than most_bad=0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.class_label=7"], "there is no such folder; train a model first"),
        ([], "no class; give --config.class_label=NUMBER"),
    ],
)
def test_samples_that_cannot_be(config, capsys, flags, message):
    assert sample.main([*config, *flags]) == 2
    assert message in capsys.readouterr().err
