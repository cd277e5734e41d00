"""A family of one's own, outside jvdiff/, makes videos chunk by chunk and trains: it is found by --family alone."""

import json

import numpy as np
import pytest
from causal.family import OWN
from causal.network import DiTConfig

from jvdiff import models, streaming
from jvdiff.commands import stream, train
from jvdiff.errors import UsageError
from jvdiff.media import video as videos

FAMILY = "--family=causal.family:OWN"
TRAINING = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict(dict(task="own", folder="", seed=0, loss={}, loop={}, schedule=dict(steps=1, warmup=0)))
"""


@pytest.fixture(scope="module")
def command(tiny_causal_repository):
    def build(output, *more):
        given = {"checkpoint": tiny_causal_repository, "output": output, "compile_cache": "off", "save_every": 2}
        return ["jvdiff stream", *(f"--{name}={value}" for name, value in given.items()), *more]

    return build


def test_it_streams_and_goes_on_with_its_own_types(command, tmp_path, capsys):
    """The same video as the family whose functions it has; a state is read with the types of the family that reads."""
    new = ["--prompt=a red seven", "--seed=3", "--name=one", "--chunks=2"]
    assert stream.main(command(tmp_path / "known", *new)) == 0
    assert stream.main(command(tmp_path / "own", *new, FAMILY)) == 0
    for folder, family in (("known", ()), ("own", (FAMILY,))):
        state = tmp_path / folder / "one.state"
        assert stream.main(command(tmp_path / folder, f"--resume={state}", "--chunks=3", *family)) == 0
    one, other = (videos.read_video(tmp_path / name / "one.mp4") for name in ("known", "own"))
    np.testing.assert_array_equal(one, other)
    assert stream.main(command(tmp_path / "own", *new, "--family=causal.family:NONE")) == 2
    assert "which cannot be imported" in capsys.readouterr().err


def test_configurations_are_of_the_family_that_reads_them(tiny_causal_repository):
    pipe = streaming.load(tiny_causal_repository, family=OWN)
    assert type(pipe.config.diffusion_model.transformer.network) is DiTConfig
    value = json.loads(json.dumps(streaming.to_json(pipe.config)))
    assert value["diffusion_model"]["transformer"]["network"]["class"] == "DiTConfig"
    for family in (OWN, None):
        known = streaming.load(tiny_causal_repository, family=family).config
        network = known.diffusion_model.transformer.network
        assert (
            streaming.config_from_json(value, models.rollout(network)) == known and known.digest == pipe.config.digest
        )
    with pytest.raises(UsageError, match="not a configuration of a model that makes a video chunk by chunk"):
        models.rollout(Exception())


def test_it_trains(tmp_path, capsys):
    (tmp_path / "own.py").write_text(TRAINING)
    words = ["jvdiff train", f"--config={tmp_path / 'own.py'}", f"--folder={tmp_path}", "--compile_cache=off"]
    assert train.main([*words, FAMILY, "--width=5"]) == 0
    assert (tmp_path / "width").read_text() == "5"
    assert train.main(words) == 2 and "task is 'own'; expected one of" in capsys.readouterr().err
    assert train.main(["jvdiff train", "--help", FAMILY]) == 0 and "task own: nothing" in capsys.readouterr().out
