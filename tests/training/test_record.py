"""What a training's folder remembers of the fields that decide its numbers."""

import json

import pytest

from jvdiff.commands import train
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.training import record

FIELDS = {
    "task": "vae",
    "folder": "a",
    "seed": 0,
    "stages": ((4, 2, 1, 16),),
    "vae": {"base_dim": 4},
    "loss": {"l1": 1.0},
    "schedule": {"steps": 4},
    "loop": {"save_every": 2, "mesh": "data=1"},
}


@pytest.fixture
def begin(tmp_path):
    """Records, or compares, the fields with these changes."""

    def begin(allow=False, **changes):
        kind = train.tasks()["vae"]
        record.begin(tmp_path, FIELDS | changes, kind, allow, ("distributed", "num_processes"))
        return json.loads((tmp_path / record.FILE).read_text())

    return begin


def test_before_a_step_is_saved_everything_may_change(begin, tmp_path):
    assert begin()["fields"]["stages"] == [[4, 2, 1, 16]]
    assert begin(seed=1)["fields"]["seed"] == 1
    (tmp_path / "state" / "2").mkdir(parents=True)
    with pytest.raises(UsageError, match="seed: it began with 1, now 0"):
        begin()


@pytest.mark.parametrize(
    "changes",
    [
        {"folder": "b"},
        {"loop": {"save_every": 3, "log_every": 1, "keep": 9, "mesh": "fsdp=8", "log_to": ("wandb",)}},
        {"distributed": True, "num_processes": 2, "compile_cache": "off", "allow_changes": True},
        {"loss": {}, "endless": False, "decoder_of": None},  # what is a default, said or not
        {"schedule": {"steps": 4, "warmup": 100}},
    ],
)
def test_what_decides_no_number_may_change(begin, tmp_path, changes):
    before = begin()
    (tmp_path / "state" / "2").mkdir(parents=True)
    assert begin(**changes) == before


def test_a_difference_is_named_field_by_field_and_may_be_allowed(begin, tmp_path):
    begin()
    (tmp_path / "vae_run" / "state" / "7").mkdir(parents=True)  # of a part of the run
    changes = {"loss": {"l1": 0.0}, "schedule": {"steps": 9}, "loop": {"accumulate": 2}, "endless": True}
    with pytest.raises(UsageError) as refused:
        begin(**changes)
    message = str(refused.value)
    assert "endless: it began with False, now True" in message and "loop.accumulate: it began with 1, now 2" in message
    assert "(and 1 more)" in message and "--allow_changes" in message and len(message.splitlines()) <= 6
    content = begin(allow=True, **changes)
    assert content["changes"][0]["step"] == 7 and content["changes"][0]["schedule.steps"] == {"from": 4, "to": 9}
    assert begin(**changes) == content
    assert len(begin(allow=True)["changes"]) == 2  # back again


def test_a_folder_of_before_is_recorded_and_a_damaged_record_refused(begin, tmp_path):
    (tmp_path / "state" / "2").mkdir(parents=True)
    assert begin()["changes"] == []
    (tmp_path / record.FILE).write_text("{")
    with pytest.raises(CheckpointError, match="not the record"):
        begin()
