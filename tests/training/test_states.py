"""A state of a training that its disk has refused: written elsewhere, and brought back."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import CheckpointError, IntegrityError, UsageError
from jvdiff.training import states

STATE = jnp.int32(7), {"kernel": jnp.arange(3.0)}
LINE = '{"step": 7}\n'


@pytest.fixture
def kept(tmp_path):
    """The state of the part `vae_run` of a run, in a folder of its own."""
    part = tmp_path / "run" / "vae_run"
    (part / "state").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"fields": {"seed": 0}, "changes": []}))
    (part / "metrics.jsonl").write_text('{"step": 6}\n{"st')
    states.write_elsewhere(tmp_path / "kept", part, 7, STATE, [LINE])
    return tmp_path / "kept"


@pytest.mark.parametrize("name", ["run", "new"])
def test_a_state_comes_back_where_it_belongs_or_into_a_new_folder(kept, tmp_path, name):
    folder = tmp_path / name
    for _ in range(2):
        states.take(kept, folder)
    with states.manager(folder / "vae_run" / "state", 2) as manager:
        step, params = states.restore(manager, 7, STATE)
    assert step == 7
    np.testing.assert_array_equal(params["kernel"], STATE[1]["kernel"])
    lines = (folder / "vae_run" / "metrics.jsonl").read_text()
    assert lines == ('{"step": 6}\n' if name == "run" else "") + LINE
    assert json.loads((folder / "config.json").read_text())["fields"] == {"seed": 0}


def test_what_cannot_be_brought_back_is_refused_and_what_is_there_is_left(kept, tmp_path):
    with pytest.raises(UsageError, match="kept: exists already"):
        states.write_elsewhere(kept, tmp_path / "run", 8, STATE, [])
    with pytest.raises(UsageError, match="holds no state of a training"):
        states.take(tmp_path / "nowhere", tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"fields": {"seed": 1}, "changes": []}))
    with pytest.raises(CheckpointError, match="a training with other fields"):
        states.take(kept, tmp_path / "run")
    file = next(path for path in (kept / "vae_run" / "state" / "7" / "default").rglob("d/*"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="differs from what was written"):
        states.take(kept, tmp_path / "new")
    assert states.saved_steps(tmp_path / "run" / "vae_run" / "state") == []
