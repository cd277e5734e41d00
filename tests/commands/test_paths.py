"""What a user types as a path means the same in every command and in Python (B)."""

import dataclasses
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import jvdiff
from convert.from_diffusers import find
from jvdiff import config as configs
from jvdiff.commands import convert, options, sample, stream, train
from jvdiff.errors import UsageError
from jvdiff.media import clips, pictures, video
from jvdiff.pipeline import inspect
from jvdiff.training.options import Going, Training
from jvdiff.weights import save

SHIPPED = Path(__file__).parents[2] / "checkpoints"
GROUPS = [group for group in vars(options).values() if dataclasses.is_dataclass(group)]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and an empty working directory beside it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize("given", ["~/x", "~", "~root/x", "x/~", "a/../b", "./~x", "$HOME/x", "a=~/x", "12:30", "a b"])
def test_what_a_path_means(home, given):
    meant = {"~/x": f"{home}/x", "~": str(home), "~root/x": f"{os.path.expanduser('~root')}/x"}
    meant["./~x"] = f"{os.getcwd()}/~x"  # of that name, and a Path of it too
    found = configs.expanded("output", given)
    assert found == meant.get(given, given)
    assert configs.expanded("output", Path(found)) == str(Path(found))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "output is ''; expected a path"),
        ("a\0b", "expected a path"),
        ("~nobody-of-that-name/x", "a home folder of 'nobody-of-that-name' is not known; ./~nobody"),
        ("file:///data/x", "an address; expected a path on this machine, or a name, for instance /data/x."),
        ("FILE:/data/x", "for instance /data/x."),
        ("s3://bucket/x", "an address"),
        (Path("https://example.com/x"), "an address"),
        ("https://huggingface.co/Wan-AI/Wan2.1/tree/main", "for instance Wan-AI/Wan2.1."),
    ],
)
def test_what_is_no_path(home, given, words):
    with pytest.raises(UsageError) as error:
        configs.expanded("output", given)
    assert words in str(error.value)


def test_what_is_no_path_is_refused_as_it_was_typed(capsys):
    """A Path would make the working directory of nothing, and one slash of two."""
    for given in ("", "https://example.com/x"):
        assert convert.main(["jvdiff convert", "--source=x", f"--target={given}"]) == 2
        assert f"target is {given!r}" in capsys.readouterr().err


def declared():
    """Every option of every command that has text or a path, by name."""
    trainings = [kind.fields for kind in train.tasks().values()]
    for group in (*GROUPS, Training, Going, *trainings):
        for path, each in configs.options(group).items():
            if {str, Path} & {*each.kinds}:
                yield f"{group.__name__}.{path}", each


def test_every_option_whose_help_speaks_of_files_is_a_path():
    """So that no command forgets it."""
    every = dict(declared())
    paths = {name for name, each in every.items() if each.told.get("path") or Path in each.kinds}
    spoken = re.compile(r"\b(folder|file|directory|where the run lives|repository|jvdiff sample alone; none)\b")
    words = {name for name, each in every.items() if spoken.search(each.told["help"])}
    free = {"Convert.revision", "StreamOutput.name", "Content.prompt", "StreamModel.pipeline"}  # words, not paths
    assert {name for name in words - paths if not name.endswith(".family")} - free == set()
    assert {"Weights.checkpoint", "Output.output", "Content.prompts", "Content.image", "Output.resume"} <= paths
    assert {"Stream.vae", "Stream.initial", "Autoencoder.decoder_of", "Fields.clips", "Training.folder"} <= paths


def test_a_flag_and_a_configuration_are_expanded(home):
    Path("mine.py").write_text(
        "from jvdiff import sample\n"
        "def get_config():\n"
        "    config = sample.default_config()\n"
        "    config.output, config.prompts, config.resume = '~/out', '~/p.txt', '~/a.state'\n"
        "    return config\n"
    )
    request = sample.parse(["sample", "--config=mine.py", "--checkpoint=~/m", "--image", "~/i.png", "--resume=~root/x"])
    config = request.config
    assert (config.output, config.prompts) == (f"{home}/out", f"{home}/p.txt")
    assert (config.checkpoint, config.image, request.given["image"]) == (f"{home}/m", *[f"{home}/i.png"] * 2)
    assert config.resume == f"{os.path.expanduser('~root')}/x" and config.compile_cache is None
    shutil.move("mine.py", home / "mine.py")
    request = stream.parse(["stream", "--output=~/s", "--compile_cache=off", "--prompt=~/is/text"])
    assert (request.config.output, request.config.compile_cache) == (f"{home}/s", "off")
    assert request.config.prompt == "~/is/text" and "output=~/s'" in request.command()
    assert sample.parse(["sample", "--config=~/mine.py"]).config.output == f"{home}/out"
    training = train.parse(["train", "--config=train_digits_dit", "--folder=~/run", "--vae=~/vae"]).config
    assert (training.folder, training.vae) == (f"{home}/run", f"{home}/vae")
    Path("its.py").write_text(
        "from jvdiff import config\n"
        "def get_config():\n"
        "    training = config.load('latent_video_small')\n"
        "    training.folder = '~/run'\n"
        "    return training\n"
    )
    assert sample.parse(["sample", "--config=its.py"]).config.checkpoint == f"{home}/run/repository"


def test_paths_of_a_shipped_configuration_do_not_depend_on_the_working_directory(home):
    """Even where the folder that one stands in has a `checkpoints` of its own."""
    names = {"digits": sample, "stream_digits": stream, "train_digits_sparse": train, "train_digits_stream_vae": train}
    for occupied in (False, True):
        if occupied:
            for name in ("digits/vae", "digits-stream"):
                Path("checkpoints", name).mkdir(parents=True)
        for name, command in names.items():
            config = command.parse([command.__name__, f"--config={name}"]).config
            for field in ("checkpoint", "vae", "initial", "decoder_of"):
                if isinstance(config.get(field), str):
                    assert Path(config[field]).is_relative_to(SHIPPED), (name, field)
    os.symlink(configs.shipped("configs"), "configs")  # by its path, too
    config = sample.parse(["sample", "--config=configs/digits.py"]).config
    assert Path(config.checkpoint).is_relative_to(SHIPPED)
    given = train.parse(["train", "--config=train_digits_dit", "--vae=checkpoints/digits/vae"]).config
    assert given.vae == "checkpoints/digits/vae"  # a command line's is against the working directory
    shutil.rmtree("checkpoints")
    given = train.parse(["train", "--config=train_digits_dit", "--vae=checkpoints/digits/vae"]).config
    assert given.vae == str(SHIPPED / "digits" / "vae")


def test_conversion_from_home_to_home(home, tiny_repository, capsys):
    shutil.copytree(tiny_repository, home / "m")
    assert convert.main(["convert", "--source=~/m", "--target=~/c"]) == 0
    assert convert.to_hf(["to_hf", "--source=~/c", "--target=~/b", "--vae=~/c/vae"]) == 0
    assert (home / "b" / "model_index.json").is_file() and not os.listdir()
    assert convert.main(["convert", "--source=file:///m", "--target=~/d"]) == 2
    assert "source is 'file:///m', an address" in capsys.readouterr().err
    assert find("~/m")[0] == home / "m"


def test_python_takes_the_same_paths(home, tiny_repository):
    shutil.copytree(tiny_repository, home / "m")
    assert jvdiff.load("~/m").weights and inspect(Path("~/m")).path == home / "m"
    save("~/tree", {"a": np.zeros(3, np.float32)})
    assert (home / "tree" / "jvdiff.json").is_file()
    picture = np.zeros((16, 16, 3), np.uint8)
    assert video.write_png("~/p.png", picture) == home / "p.png"
    assert (pictures.picture("~/p.png") == picture).all()
    assert video.write_apng("~/p.apng", picture[None], 8) == home / "p.apng"
    assert video.write_mp4("~/v.mp4", picture[None], 8) == home / "v.mp4"
    assert video.read_video("~/v.mp4").shape == (1, 16, 16, 3) and video.read_metadata("~/v.mp4") is not None
    shutil.copytree(home, home / "c" / "red", ignore=shutil.ignore_patterns("c", "m", "tree", "*png"))
    assert len(clips.find("~/c").paths) == 1
    (home / "c.csv").write_text("path,label\n~/v.mp4,red\nc/red/v.mp4,red\n")
    assert clips.find("~/c.csv").paths == (home / "v.mp4", home / "c" / "red" / "v.mp4")
    assert not os.listdir()
