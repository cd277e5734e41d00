"""Settings: a repository's own defaults, and what takes the place of its scheduler (values: test_generate.py)."""

import dataclasses

import pytest

from jvdiff.errors import CheckpointError
from jvdiff.kernels import SlidingTile
from jvdiff.models.wan.family import TEXT_TO_VIDEO
from jvdiff.pipeline import repository, settings


def test_a_repositorys_defaults_are_checked(tmp_path):
    file = tmp_path / settings.DEFAULTS_FILE
    assert settings.read_defaults(tmp_path, TEXT_TO_VIDEO) == {}
    for content, message in (
        ("{", "Expecting"),
        ("[]", "object"),
        ('{"stepz": 3}', "stepz"),
        ('{"steps": "3"}', "steps"),
    ):
        file.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            settings.read_defaults(tmp_path, TEXT_TO_VIDEO)
    file.write_text('{"steps": 3, "stream": {"len_t": 3}}')  # what streaming needs is read elsewhere
    assert settings.read_defaults(tmp_path, TEXT_TO_VIDEO) == {"steps": 3}


def test_a_scheduler_that_is_not_ours_can_be_overridden(tiny_repository):
    whole = repository.inspect(tiny_repository)
    foreign = dataclasses.replace(whole.models, files={"scheduler": {"_class_name": "DDIMScheduler"}})
    with pytest.raises(CheckpointError, match="DDIMScheduler"):
        settings.resolve(whole.family, foreign, whole.defaults, {})
    given = {"solver": "euler", "shift": 2.0, "grid": "wan"}
    known = settings.resolve(whole.family, foreign, whole.defaults, given)
    assert (known.solver, known.shift, known.grid, known.steps) == ("euler", 2.0, "wan", 4)


def test_a_pattern_may_be_a_value(tiny_repository):
    """Settings have its text, as a record does."""
    whole, pattern = repository.inspect(tiny_repository), SlidingTile((1, 2, 2), (1, 3, 3))
    assert whole.settings(pattern=pattern) == whole.settings(pattern="sliding_tile:1x2x2:1x3x3")
    assert whole.family.clip(whole.models, whole.settings(pattern=pattern, num_frames=1)).segments[0].pattern == pattern


def test_a_list_of_timesteps_takes_the_place_of_a_schedulers_levels(tiny_repository):
    """Of all of them: what the file does to its own levels does nothing to these."""
    whole = repository.inspect(tiny_repository)
    scheduler = whole.models.files["scheduler"] | {"shift_terminal": 0.1, "solver_order": 3}
    known = dataclasses.replace(whole.models, files=whole.models.files | {"scheduler": scheduler})
    found = settings.resolve(whole.family, known, {}, {})
    assert (found.solver, found.shift_terminal) == ("unipc:3", 0.1)
    assert whole.family.clip(known, found).sampler.schedule.sigmas[-2] == pytest.approx(0.1)
    found = settings.resolve(whole.family, known, {}, {"solver": "renoise:1000,500"})
    assert (found.shift_terminal, found.steps, found.shift) == (None, 2, 3.0)
    found = settings.resolve(whole.family, known, {}, {"grid": "sigmas:1,0.5,0.2"})
    assert (found.solver, found.steps, found.shift_terminal) == ("unipc:3", 3, 0.1)
