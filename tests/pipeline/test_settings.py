"""Settings: a repository's own defaults, and what takes the place of its scheduler (values: tests/test_pipeline.py)."""

import pytest

from jvdiff.errors import CheckpointError
from jvdiff.pipeline import repository, settings


@pytest.fixture
def configs(tiny_repository):
    found = repository.inspect(tiny_repository)
    return settings.Configs(found.transformer, found.vae, found.text_encoder)


def test_a_repositorys_defaults_are_checked(tmp_path):
    file = tmp_path / settings.DEFAULTS_FILE
    assert settings.read_defaults(tmp_path) == {}
    for content, message in (
        ("{", "Expecting"),
        ("[]", "object"),
        ('{"stepz": 3}', "stepz"),
        ('{"steps": "3"}', "steps"),
    ):
        file.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            settings.read_defaults(tmp_path)
    file.write_text('{"steps": 3, "stream": {"len_t": 3}}')  # what streaming needs is read elsewhere
    assert settings.read_defaults(tmp_path) == {"steps": 3}


def test_a_scheduler_that_is_not_ours_can_be_overridden(configs, tiny_repository):
    foreign, defaults = {"_class_name": "DDIMScheduler"}, settings.read_defaults(tiny_repository)
    with pytest.raises(CheckpointError, match="DDIMScheduler"):
        settings.resolve(configs, foreign, defaults)
    known = settings.resolve(configs, foreign, defaults, solver="euler", shift=2.0, grid="wan")
    assert (known.solver, known.shift, known.grid, known.steps) == ("euler", 2.0, "wan", 4)
