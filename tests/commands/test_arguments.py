"""argv becomes a request: flags in any order, configurations by name, text that stays text, the nearest name."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from jvdiff import config as configs
from jvdiff.__main__ import main
from jvdiff.commands import sample, stream, train
from jvdiff.digits.__main__ import main as digits
from jvdiff.errors import UsageError

ROOT = Path(__file__).parents[2]


def wanted(*words, program="jvdiff sample"):
    return sample.parse([program, *words])


def refused(words, capsys):
    """The sentence with which `jvdiff` refuses; jvdiff is not asked for more."""
    assert main(["jvdiff", *words]) == 2
    said = capsys.readouterr()
    assert not said.out and "Traceback" not in said.err and len(said.err.splitlines()) <= 6
    return said.err


# ---------------------------------------------------------------------------------------------------------- spellings


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "configs/digits.py", "--config.steps=7", "--config.guidance=2"],
        ["--config.steps=7", "--config.guidance=2", "--config=configs/digits.py"],
        ["--guidance", "2", "--config", "digits", "--steps", "7"],
        ["--guidance=9", "--guidance=2", "--steps=7.0", "--config=digits.py"],
        ["-steps=7", "--config.guidance", "2", "--config", str(ROOT / "configs" / "digits.py")],
    ],
)
def test_flags_stand_anywhere_and_configurations_go_by_name(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no folder configs
    request = wanted(*words)
    assert request.config.steps == 7 and request.config.guidance == 2.0 and request.config.height == 64
    assert request.given == {"steps": 7, "guidance": 2.0}
    assert isinstance(request.config.steps, int) and isinstance(request.config.guidance, float)


def test_the_digits_are_made_only_where_no_checkpoint_is_given(tmp_path):
    assert wanted().config.steps == 20 and wanted().file == "digits"
    assert stream.parse(["jvdiff stream"]).file == "stream_digits"
    other = wanted(f"--checkpoint={tmp_path}")
    assert other.file == "" and other.config.steps is None and other.config.checkpoint == str(tmp_path)


def test_a_training_on_what_ships_finds_it_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = configs.shipped("checkpoints") / "digits"
    config = train.parse(["x", "--config=train_digits_sparse"]).config
    assert (config.vae, config.initial) == (str(shipped / "vae"), str(shipped))
    (tmp_path / "checkpoints" / "digits").mkdir(parents=True)
    config = train.parse(["x", "--config=train_digits_sparse", "--vae=checkpoints/nowhere/vae"]).config
    assert (config.vae, config.initial) == ("checkpoints/nowhere/vae", str(shipped))


def test_switches_need_no_value():
    assert wanted("--plan", "--seed=3").config.plan is True and wanted("--plan", "false").config.plan is False
    assert wanted("--config.save_arrays=True", "--plan=0").config.save_arrays is True


def test_none_takes_a_value_away_but_is_a_word_in_a_prompt():
    assert wanted("--steps=none", "--mesh=none").config.steps is None
    request = wanted("--prompt=none", "--negative_prompt=None")
    assert request.config.prompt == "none" and request.config.negative_prompt == "None"


@pytest.mark.parametrize(
    "text", ["7", "None", "a, b", "it's", 'a "b"', "x=y", "", "-5 degrees", "(a man) walks", "(7)", "red " * 2500]
)
def test_a_prompt_is_text_whatever_it_looks_like(text):
    for words in ([f"--prompt={text}"], [f"--config.prompt={text}"], ["--prompt", text]):
        assert wanted(*words).config.prompt == text
    assert stream.parse(["x", f"--prompt={text}", f"--then.3={text}"]).config.then == {"3": text}


def test_a_tuple_of_prompts_and_a_class_by_name_or_number():
    assert wanted("--prompt=('a', 'b')").config.prompt == ("a", "b") == wanted("--prompt=['a', 'b']").config.prompt
    labels = [wanted(f"--class_label={text}").config.class_label for text in ("7", "seven", "('seven', 7)")]
    assert labels == [7, "seven", ("seven", 7)]


def test_nested_fields_of_a_stream_and_a_training():
    request = stream.parse(["x", "--pipeline.a.b=1", "--config.pipeline.a.c=none", "--pipeline.d=x", "--then.10=7"])
    assert request.config.pipeline == {"a": {"b": 1, "c": None}, "d": "x"} == request.given["pipeline"]
    words = ["--loop.mesh=fsdp=8", "--schedule.steps", "2000", "--loop.accumulate=2", "--loop.log_to=('wandb',)"]
    request = train.parse(["x", "--config", "train_digits_vae", *words, "--vae.base_dim=4", "--vae.z_dim=8"])
    loop, schedule = request.config.loop, request.config.schedule
    assert loop.mesh == "fsdp=8" and loop.accumulate == 2 and loop.log_to == ("wandb",) and loop.save_every == 100
    assert schedule.steps == 2000 and schedule.warmup == 50 and request.config.vae.base_dim == 4
    assert request.given["loop"] == {"mesh": "fsdp=8", "accumulate": 2, "log_to": ("wandb",)}


def test_a_size_by_name_gives_way_to_fields(capsys):
    words = ["--transformer={'depth': 3}", "--transformer.depth=4"]
    request = train.parse(["x", "--config=latent_video_small", *words])
    assert request.config.transformer["depth"] == 4
    said = refused(["train", "--config=latent_video_small", "--transformer.depth=4"], capsys)
    assert "transformer is 'small', which has no fields" in said


# ------------------------------------------------------------------------------------------------------ to go on with


@pytest.mark.parametrize("program", ["sample", "jvdiff sample", "python -m jvdiff sample"])
def test_a_command_that_is_printed_asks_for_the_same(program):
    request = wanted("--prompt=it's ('7')", "--config", "digits", "--steps=7", "--save_arrays", program=program)
    words = shlex.split(request.command(resume="out/a b.state", steps=None))
    start = ["python", "-m", "jvdiff.sample"] if program == "sample" else program.split()
    assert words[: len(start)] == start
    again = sample.parse([program, *words[len(start) :]])
    assert again.given == {"prompt": "it's ('7')", "save_arrays": True, "resume": "out/a b.state"}
    assert again.config.steps == 20 and again.file == "digits"


def test_what_the_file_says_is_unset_by_a_flag_and_a_flag_by_leaving_it_out(tmp_path):
    (tmp_path / "own.py").write_text(
        "import ml_collections\nget_config = lambda: ml_collections.ConfigDict(dict(stop_at=3))"
    )
    file = f"--config={tmp_path / 'own.py'}"
    assert wanted(file).unset("stop_at") == "none" and wanted("--stop_at=3").unset("stop_at") is None
    assert wanted(file, "--stop_at=none").config.stop_at is None


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampel"], "unknown command 'sampel' (did you mean sample?)"),
        (["sample", "--stepz=3"], "unknown flag --stepz (did you mean --steps?)"),
        (["sample", "--num_inference_steps=3"], "(did you mean --steps?)"),
        (["sample", "--guidance-scale", "3"], "(did you mean --guidance?)"),
        (["sample", "--config.negative-prompt=x"], "(did you mean --negative_prompt?)"),
        (["sample", "--generator=3"], "(did you mean --seed?)"),
        (["sample", "--num_videos_per_prompt=3"], "a range of seeds, --seeds=0:4"),
        (["sample", "--xyzzy=3"], "unknown flag --xyzzy; --help lists all"),
        (["sample", "--confg=digits"], "(did you mean --config?)"),
        (["sample", "--config=digitz"], "no configuration 'digitz' (did you mean digits?)"),
        (["sample", "--config"], "--config has no value"),
        (["sample", "--steps", "--seed=3"], "--steps has no value"),
        (["sample", "a red seven"], "cannot use 'a red seven'; fields are set as --name=value"),
        (["sample", "--steps=three"], "steps is 'three'; expected a whole number"),
        (["sample", "--guidance=much"], "guidance is 'much'; expected a number"),
        (["sample", "--plan=perhaps"], "plan is 'perhaps'; expected true or false"),
        (["sample", "--precision=float8"], "precision is 'float8'; expected one of float32, bfloat16"),
        (["sample", "--steps.inner=3"], "steps is 20, which has no fields"),
        (["sample", "--checkpoint=digits-classes", "--shift=3"], "--shift is not a field of what is asked for here"),
        (["sample", "--plan", "--distributed"], "a plan is made by one process"),
        (["sample", "--stop_at=0"], "stop_at is 0; expected 1 or more. The nearest is 1."),
        (["stream", "--num_chunks=3"], "(did you mean --chunks?)"),
        (["train"], "no config. Usage: jvdiff train --config"),
        (["train", "--config=train_digits_vae", "--lr=1"], "(did you mean --schedule.learning_rate?)"),
        (["train", "--config=train_digits_vae", "--save_every=1"], "(did you mean --loop.save_every?)"),
        (["train", "--config=train_digits_vae", "--loop.save_evry=1"], "(did you mean --loop.save_every?)"),
        (["train", "--config=train_digits_vae", "--schedule.steps=many"], "schedule.steps is 'many'; expected a whole"),
        (["train", "--config=train_digits_vae", "--plan"], "--plan is not a field of what is asked for here"),
        (["train", "--config=train_digits_vae", "--loss.l1=much"], "loss.l1 is 'much'; expected a number"),
        (["train", "--config=digits"], "task is None; expected one of"),
        (["convert", "--tarket=x"], "(did you mean --target?)"),
        (["convert", "--source=x"], "--target is missing"),
        (["convert", "--source=x", "--target=y", "--dtype=int8"], "dtype is 'int8'; expected one of float32"),
        (["convert", "--target=y", "--config=digits"], "takes no --config"),
        (["to_hf", "--source=x"], "--target is missing"),
        (["digits", "--output=x"], "--clips is missing"),
        (["sharding", "--leafs"], "(did you mean --leaves?)"),
        (
            ["plan", "--config=train_digits_vae"],
            "the task 'vae' of train_digits_vae has no plan; those that have one: lat",
        ),
        (["plan", "--stepz=3"], "(did you mean --steps?)"),
        (["plan", "--config=stream_digits"], "stream_digits is a configuration of jvdiff stream"),
        (["sample", "--config=train_digits_dit"], "train_digits_dit is a configuration of jvdiff train"),
        (["stream", "--config=digits"], "digits is a configuration of jvdiff sample"),
    ],
)
def test_what_is_unknown_names_the_nearest(words, message, capsys):
    assert message in refused(words, capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("get_config = 3", "has no function get_config"),
        ("x = 1", "has no function get_config"),
        ("def get_config(): return {}", "get_config returns dict; expected a ConfigDict"),
        ("def get_config(: pass", "SyntaxError: invalid syntax (own.py, line 1)"),
        (
            "from jvdiff import sample\ndef get_config():\n c = sample.default_config()\n c.steps = 'x'\n return c",
            "steps",
        ),
        (
            "from jvdiff import sample\ndef get_config():\n c = sample.default_config()\n c.stepz = 1\n return c",
            "unknown fields: stepz (did you mean steps?)",
        ),
        ("from jvdiff.config import load\ndef get_config(): return load('digitz')", "did you mean digits?"),
    ],
)
def test_a_configuration_with_a_mistake(content, message, tmp_path, capsys):
    (tmp_path / "own.py").write_text(content)
    assert message in refused(["sample", f"--config={tmp_path / 'own.py'}"], capsys)


def test_one_end_of_a_range_is_an_end():
    for low, high, value, message in (
        (1, None, 0, "x is 0; expected 1 or more. The nearest is 1."),
        (None, 2.5, 3, "x is 3; expected 2.5 or less. The nearest is 2.5."),
        (None, 2.5, float("-inf"), "x is -inf; expected 2.5 or less."),
        (1, 5, float("nan"), "x is nan; expected 1 to 5. The nearest is 1."),
    ):
        told = configs.option(None, "", low=low, high=high).metadata
        configs.check("x", 2, told)
        with pytest.raises(UsageError, match=re.escape(message) + "$"):
            configs.check("x", value, told)


def test_a_type_is_told_as_what_it_is():
    with pytest.raises(UsageError, match=r"x is 3; expected a Callable or a dict\."):
        configs.typed("x", 3, Callable[[int], int] | dict[str, int])


def test_a_configuration_may_take_an_argument(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from jvdiff import sample\n"
        "def get_config(steps='3'):\n c = sample.default_config()\n c.steps = int(steps)\n return c\n"
    )
    assert wanted(f"--config={path}").config.steps == 3 and wanted(f"--config={path}:9").config.steps == 9
    with pytest.raises(UsageError, match="did you mean digits"):
        configs.load("digit:x")


def test_a_configuration_may_say_little(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("from ml_collections import ConfigDict\nget_config = lambda: ConfigDict({'steps': 3})\n")
    request = wanted("--seed=4", f"--config={path}")
    assert set(request.config) == set(sample.default_config())
    assert (request.config.steps, request.config.seed, request.config.output) == (3, 4, "out")


def test_a_seed_has_32_bits_wherever_it_stands(tmp_path, capsys):
    path = tmp_path / "own.py"
    path.write_text("from ml_collections import ConfigDict\nget_config = lambda: ConfigDict({'seed': 2**32 - 1})\n")
    assert wanted(f"--config={path}").config.seed == wanted(f"--seed={2**32 - 1}").config.seed == 2**32 - 1
    said = refused(["train", "--config=train_digits_vae", f"--seed={2**32}"], capsys)
    assert "seed is 4294967296; expected a whole number from 0 to 4294967295" in said


def test_a_training_that_says_how_to_sample_is_sampled(tmp_path):
    words = ["--config=latent_video_digits", f"--folder={tmp_path}", "--class_label=seven", "--steps=7"]
    request = wanted(*words)
    assert set(request.config) == set(sample.default_config()) and request.config.class_label == "seven"
    assert request.config.checkpoint == str(tmp_path / "repository") and request.config.seed == 0
    assert (request.config.steps, request.config.guidance) == (7, 4.0)
    assert wanted(*words, "--checkpoint=digits-classes").config.checkpoint == "digits-classes"


def test_a_plan_is_of_whatever_the_configuration_is(monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "run", lambda request: asked.append(request.config) or [])
    monkeypatch.setattr(train, "run", lambda request: asked.append(request.config) or [])
    assert main(["jvdiff", "plan", "--steps=3"]) == 0 and asked[0].plan and asked[0].steps == 3
    assert main(["jvdiff", "plan", "--config", "latent_video_small"]) == 0 and asked[1].plan


@pytest.mark.parametrize("command", ["sample", "train", "stream", "plan", "sharding", "convert", "to_hf", "digits"])
@pytest.mark.parametrize("flag", ["--traceback", "--config.traceback"])
def test_where_an_error_arose_is_told_by_every_command(command, flag, capsys):
    assert main(["jvdiff", command, flag, "--xyzzy=1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "error: " in said.splitlines()[-1] + said.splitlines()[-2]


def test_clips_are_written_by_the_command(tmp_path, monkeypatch, capsys):
    from jvdiff.digits import clips

    made = []
    monkeypatch.setattr(clips, "write_clips", lambda *given: made.append(given))
    assert digits(["jvdiff digits", "--output", str(tmp_path / "x"), "--clips=3"]) == 0
    assert made == [(tmp_path / "x", 3, 17, 0)] and capsys.readouterr().out.strip() == str(tmp_path / "x")
