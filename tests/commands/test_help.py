"""Pages of help: every field with type, default and meaning, on stdout, status 0, without JAX; and what is declared."""

import dataclasses
import inspect
import json
import re
import subprocess
import sys
import typing

import pytest

from jvdiff import config as configs
from jvdiff import models
from jvdiff.__main__ import COMMANDS, main
from jvdiff.commands import options, sample, stream, train
from jvdiff.runtime import peers
from jvdiff.training.options import Loop, Training, function

GROUPS = (
    *options.BEFORE,
    *options.AFTER,
    *options.STREAM,
    options.Convert,
    options.ToHf,
    options.Verify,
    options.Digits,
)


def page(words, capsys):
    assert main(["jvdiff", *words]) == 0
    said = capsys.readouterr()
    assert not said.err
    return said.out


def listed(text):
    """{field: (type, default)} of a page."""
    entries = re.findall(r"^  --([\w.]+)  (.+?)  \[(.*?)\](?=\s|$)", text, re.MULTILINE)
    return {name: (kind, default) for name, kind, default in entries}


def test_the_list_of_commands(capsys):
    text = page(["--help"], capsys)
    assert all(re.search(rf"^  {name} +\w", text, re.MULTILINE) for name in COMMANDS)
    assert page(["-h"], capsys) == text
    assert main(["jvdiff"]) == 2 and capsys.readouterr().out == text
    assert page(["--version"], capsys) == page(["sample", "--version"], capsys)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_page(command, flag, capsys):
    text = page([command, flag], capsys)
    assert text.startswith(f"jvdiff {command}: ") and len(listed(text)) >= (2 if command in ("verify", "doctor") else 4)
    assert max(map(len, text.splitlines())) <= 120


def test_sampling_lists_every_field_with_type_default_and_meaning(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = page(["sample", "--help"], capsys)
    fields = listed(text)
    groups = {family: set(configs.options(group)) for family, group in models.settings().items()}
    elsewhere = set.union(*groups.values()) - groups["wan"]  # the family of the checkpoint that is implied
    assert set(fields) == set(sample.default_config()) - elsewhere
    assert fields["steps"] == ("whole number", "20") and fields["output"] == ("text", "out")
    assert fields["grid"] == ("text", "diffusers") and fields["save_arrays"] == ("true or false", "false")
    titles = ("what to make", "picture and time", "sampler", "weights and devices", "output", "plan", "many processes")
    assert [title for title in titles if re.search(rf"^{title}", text, re.MULTILINE)] == list(titles)
    assert "frames a second; only written into the file (1 to 240)" in text


def test_with_a_checkpoint_its_family_and_its_own_defaults_are_listed_else_all(capsys, tmp_path):
    text = page(["sample", "--help", "--checkpoint=digits-classes"], capsys)
    assert "shift" not in listed(text) and listed(text)["solver"][0] == "ddim|ddpm|unipc|euler"
    assert listed(text)["num_frames"][1] == "16" and listed(text)["guidance"][1] == "4.0"
    for checkpoint in (tmp_path, "nowhere"):
        text = page(["sample", "--help", f"--checkpoint={checkpoint}"], capsys)
        for family, settings in models.settings().items():
            assert re.search(rf"^sampler \({family}\)$", text, re.MULTILINE)
            assert set(configs.options(settings)) <= set(listed(text))


def test_what_a_scheduler_asks_for_is_the_default(capsys, tmp_path):
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.5}
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    (tmp_path / "jvdiff_defaults.json").write_text('{"steps": 9}')
    for change, expected in (({}, ("7.5", "euler", "9")), ({"shift": -1}, ("3.0", "unipc", "9"))):
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler | change))
        fields = listed(page(["sample", "--help", f"--checkpoint={tmp_path}"], capsys))
        assert tuple(fields[name][1] for name in ("shift", "solver", "steps")) == expected


def test_streaming_and_trainings_list_theirs(capsys):
    assert set(listed(page(["stream", "-h"], capsys))) == set(stream.default_config())
    text = page(["train", "-h"], capsys)
    assert all(re.search(rf"^task {name}: \w", text, re.MULTILINE) for name in train.tasks())
    text = page(["train", "-h", "--config", "train_digits_vae"], capsys)
    fields = listed(text)
    assert fields["schedule.steps"] == ("whole number", "1850") and fields["loop.keep"] == ("whole number", "2")
    assert "--loss.latent_noise" in text and "task latent_video" not in text and "--allow_changes" in text


def test_every_option_has_a_meaning():
    tasks = [kind.fields for kind in train.tasks().values()]
    for group in (*GROUPS, *models.settings().values(), Training, *tasks):
        for path, each in configs.options(group).items():
            assert each.told["help"] and "\n" not in each.told["help"], path
            assert each.default is None or configs.typed(path, each.default, each.kind) == each.default


# Keywords that are no option of a training, or one of the command: `profile`.
UNDECLARED = {"seed", "params", "profile", "placement", "noise_schedule", "compute_dtype"}


def test_a_training_declares_what_its_functions_take():
    """The options of `loss` and `loop` are keywords of the task and of `fit`, with the same defaults."""
    from jvdiff.models.latent_video.objective import latent_video_task
    from jvdiff.models.wan.flow_matching import text_to_video_task
    from jvdiff.models.wan.reconstruction import vae_task
    from jvdiff.models.wan.teacher_forcing import teacher_forcing_task
    from jvdiff.training import fit

    functions = {"vae": vae_task, "text_to_video": text_to_video_task, "stream": teacher_forcing_task}
    functions["latent_video"] = latent_video_task
    assert set(functions) == set(train.tasks())
    losses = {name: typing.get_type_hints(kind.fields)["loss"] for name, kind in train.tasks().items()}
    for task, group in [*((functions[name], group) for name, group in losses.items()), (fit, Loop)]:
        keywords = {p.name: p.default for p in inspect.signature(task).parameters.values() if p.kind is p.KEYWORD_ONLY}
        declared = {field.name: field.default for field in dataclasses.fields(group)}
        assert declared == {name: keywords[name] for name in declared}
        assert set(keywords) - set(declared) <= UNDECLARED


def test_programs_are_where_they_are_said_to_be():
    for kind in train.tasks().values():
        assert callable(function(kind.run)) and (kind.programs is None or callable(function(kind.programs)))


def test_a_config_has_the_fields_that_are_declared():
    assert set(peers.fields()) <= set(sample.default_config())
    config = sample.default_config()
    config.steps = 3
    with pytest.raises(TypeError):
        config.steps = "three"


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "jvdiff", "--help"],
        ["-m", "jvdiff.sample", "--help"],
        ["-m", "jvdiff", "sample", "--help", "--checkpoint=digits"],
        ["-m", "jvdiff", "train", "--help"],
        ["-m", "jvdiff", "convert", "-h"],
        ["-m", "convert", "--help"],
        ["-m", "convert.to_hf", "--help"],
        ["-m", "jvdiff", "sharding", "--version"],
        ["-m", "jvdiff", "plan", "--stepz=3"],
        ["-m", "jvdiff.train", "--config", "train_digits_vae", "--stepz=3"],
    ],
)
def test_what_needs_no_jax_does_not_import_it(words):
    done = subprocess.run([sys.executable, "-X", "importtime", *words], capture_output=True, text=True)
    assert done.returncode == (2 if "--stepz=3" in words else 0)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "jvdiff.commands" in imported and not imported & {"jax", "flax", "torch", "orbax"}
