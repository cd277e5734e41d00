"""One rule for what a repository's files say and jvdiff does not know, and for files that contradict each other (C)."""

import json
import logging
import shutil

import pytest

from jvdiff import config
from jvdiff.commands import convert, sample, stream, train
from jvdiff.diffusion import schedules
from jvdiff.digits import tokenizer as digits_tokenizer
from jvdiff.errors import CheckpointError
from jvdiff.models import latent_video, wan
from jvdiff.models.text import spiece, tokenizer, umt5
from jvdiff.pipeline import repository

FILES = (
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "jvdiff_defaults.json",
)
UNIPC = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


@pytest.fixture
def copy(tiny_repository, tmp_path):
    return shutil.copytree(tiny_repository, tmp_path / "copy")


@pytest.fixture
def told(caplog):
    """The lines that were told once."""
    config.tell_once.cache_clear()
    caplog.set_level(logging.WARNING, "jvdiff")
    return lambda: [record.getMessage() for record in caplog.records]


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("file", FILES)
def test_an_unknown_field_that_asks_for_nothing_passes_with_a_line_and_others_are_refused(copy, told, file):
    before = repository.inspect(copy)
    assert not told()
    change(copy / file, sampling_eps_v2=None, use_rope_v3=False, _own=[1], _diffusers_version="9")
    for _ in range(2):
        after = repository.inspect(copy)
        assert after.models.configs == before.models.configs and after.settings() == before.settings()
    assert len(told()) == 1 and told()[0].endswith("they ask for nothing: sampling_eps_v2, use_rope_v3, _own")
    for value in (True, 0, 1.5, "x", [], {}):
        change(copy / file, use_rope_v3=value)
        with pytest.raises(CheckpointError) as error:
            repository.inspect(copy).settings()
        assert f"unknown field 'use_rope_v3' = {value!r}" in str(error.value) and len(str(error.value).splitlines()) < 6


def test_options_of_the_pipeline_in_model_index_follow_the_rule(copy, told):
    """Wan 2.2's: an expert boundary, a timestep for each token."""
    change(copy / "model_index.json", boundary_ratio=None, expand_timesteps=False)
    assert repository.inspect(copy) and not told()
    change(copy / "model_index.json", boundary_ratio=0.875, expand_timesteps=True)
    assert repository.inspect(copy).family.takes == ("image",) and not told()
    wrong = {"boundary_ratio": (1.5, "a number from 0 to 1"), "expand_timesteps": ("yes", "true or false")}
    for name, (value, message) in (wrong | {"sampling": ({"a": 1}, "unknown field 'sampling'")}).items():
        known = {"boundary_ratio": None, "expand_timesteps": None, "sampling": None}
        change(copy / "model_index.json", **(known | {name: value}))
        with pytest.raises(CheckpointError, match=f"model_index.json: .*{message}"):
            repository.inspect(copy)


@pytest.mark.parametrize("kind", [latent_video.DiTConfig, latent_video.VAEConfig])
def test_the_rule_holds_for_the_other_family(kind, told):
    plain = kind().to_json()
    assert kind.from_json(plain | {"new": None, "_old": 3}) == kind() and len(told()) == 1
    with pytest.raises(CheckpointError, match="unknown field 'new' = 1"):
        kind.from_json(plain | {"new": 1})


def test_the_rule_holds_for_a_published_few_step_scheduler(told):
    published = {"_class_name": "SelfForcingFlowMatchScheduler", "num_inference_steps": 1000, "new": None}
    assert schedules.from_self_forcing_config(published)["shift"] == 3.0 and len(told()) == 1


def test_what_files_of_the_past_say_is_known():
    """Without a line: what diffusers and transformers have written into published files."""
    text = {
        "dropout_rate": 0.1,
        "is_gated_act": True,
        "output_past": True,
        "torch_dtype": "bfloat16",
        "n_positions": 512,
    }
    assert umt5.Config.from_json(umt5.UMT5_XXL.to_json() | text | {"pruned_heads": {}}) == umt5.UMT5_XXL
    with pytest.raises(CheckpointError, match="quantization_config"):
        umt5.Config.from_json(umt5.UMT5_XXL.to_json() | {"quantization_config": {"bits": 8}})
    with pytest.raises(CheckpointError, match="pruned_heads"):
        umt5.Config.from_json(umt5.UMT5_XXL.to_json() | {"pruned_heads": {"0": [1]}})
    vae = wan.WAN_2_1_VAE.to_json() | {"decoder_base_dim": None, "is_residual": False, "patch_size": None}
    assert wan.VAEConfig.from_json(vae) == wan.WAN_2_1_VAE
    for name, value in {"scale_factor_temporal": 8, "scale_factor_spatial": 16}.items():
        with pytest.raises(CheckpointError, match=f"{name} is {value}, but the other fields make it"):
            wan.VAEConfig.from_json(vae | {name: value})


# ----------------------------------------------------------------------------------------------------------- schedulers


def swap(folder, scheduler, name=None):
    """The scheduler's own file, and its class in model_index.json."""
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    change(folder / "model_index.json", scheduler=["diffusers", name or scheduler["_class_name"]])


def test_a_scheduler_whose_two_files_name_two_classes_is_refused(copy, tiny_causal_repository, tmp_path, capsys):
    swap(copy, EULER, "UniPCMultistepScheduler")
    causal = shutil.copytree(tiny_causal_repository, tmp_path / "causal")
    swap(causal, UNIPC | {"flow_shift": 5.0}, "SelfForcingFlowMatchScheduler")
    out = [f"--output={tmp_path}/out", "--prompt=a", "--compile_cache=off"]
    vae = "--vae=checkpoints/digits/vae"
    for main, words in (
        (sample.main, [f"--checkpoint={copy}", *out]),
        (stream.main, [f"--checkpoint={causal}", *out]),
        (convert.main, [f"--source={copy}", f"--target={tmp_path}/converted"]),
        (convert.to_hf, [f"--source={copy}", f"--target={tmp_path}/exported"]),
        (train.main, ["--config=train_digits_dit", vae, f"--initial={copy}", f"--folder={tmp_path}/run"]),
    ):
        assert main(["jvdiff", *words]) == 3
        said = capsys.readouterr().err
        assert "model_index.json says that scheduler is a '" in said and "scheduler_config.json that it is a '" in said
    change(copy / "model_index.json", scheduler=["diffusers", EULER["_class_name"]])
    assert repository.inspect(copy).settings().solver == "euler"
    change(copy / "model_index.json", vae=["diffusers", "AutoencoderKL"])  # the same for any part
    with pytest.raises(CheckpointError, match="says that vae is a 'AutoencoderKL'"):
        repository.inspect(copy)


def test_what_diffusers_leaves_of_the_scheduler_before_does_nothing(copy, told):
    """As `CLASS.from_config(pipe.scheduler.config)` saves it; the sigmas are compared in parity/test_schedulers.py."""
    swap(copy, EULER | {"flow_shift": 5.0, "use_flow_sigmas": True, "algorithm_type": "dpmsolver++"})
    chosen = repository.inspect(copy).settings()
    assert (chosen.solver, chosen.shift) == ("euler", 3.0)
    (line,) = told()
    assert "does not read flow_shift, use_flow_sigmas, algorithm_type" in line and line.endswith("its shift is 3.0")
    swap(copy, UNIPC | {"flow_shift": 3.0, "shift": 5.0, "base_shift": 0.5})
    assert repository.inspect(copy).settings().shift == 3.0
    for mixed in ({"_class_name": EULER["_class_name"], "flow_shift": 3.0}, UNIPC | {"shift": 3.0}):
        swap(copy, mixed)  # no program has written that: the shift meant is 3, the one that is read would be 1
        with pytest.raises(CheckpointError, match=r"shift is 3.0, and a .* alone, which is not there"):
            repository.inspect(copy).settings()


# ----------------------------------------------------------------------------------------------------------- tokenizers


def message(*fields):
    """A message of Protocol Buffers: (number, bytes) each."""
    return b"".join(bytes([8 * number + 2, len(value)]) + value for number, value in fields)


def test_two_tokenizers_that_differ_are_told(tmp_path, told):
    """transformers' fast tokenizers read tokenizer.json."""
    digits_tokenizer.save(digits_tokenizer.build(["red", "seven"]), tmp_path)
    tokens = tokenizer.load(tmp_path)
    words = sorted(tokens.get_vocab(), key=tokens.get_vocab().__getitem__)
    for pieces, lines in ((words, 0), ([*words[:3], "other", *words[4:]], 1), ([*words, "one more"], 1)):
        file = tmp_path / "spiece.model"
        file.write_bytes(message(*((1, message((1, word.encode()))) for word in pieces), (2, b"")))
        assert list(spiece.pieces(file)) == pieces
        assert tokenizer.load(tmp_path).get_vocab() == tokens.get_vocab() and len(told()) == lines
    assert told()[0].endswith("tokenizer.json and spiece.model differ; tokenizer.json is used, as transformers does")
