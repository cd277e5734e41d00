"""SIGKILL at random moments: the same command again makes what an undisturbed run makes, and nothing else.

Trainings are killed in training/test_loop and models/latent_video/test_runs, a converter in convert/test_convert too;
`python -m tests.kills` kills all of them as often as it is asked to.
"""

import random
from functools import partial

import pytest

from tests import kills

KILLS = {kills.sample: 1, kills.batch: 2, kills.stream: 2, kills.convert: 2}


@pytest.mark.parametrize("kind", KILLS)
def test_a_killed_run_is_made_by_the_same_command(kind, tmp_path, tiny_repository, tiny_causal_repository):
    checkpoint, chance = tiny_causal_repository if kind is kills.stream else tiny_repository, random.Random(0)
    run = partial(kind, checkpoint=checkpoint)
    expected, seconds = kills.whole(run, tmp_path / "out", times=1)
    for number in range(KILLS[kind]):  # one in each part of the run; when everything is compiled it takes less
        moment = 0.7 * seconds * (number + chance.random()) / KILLS[kind]
        assert (wrong := kills.killed(run, tmp_path / "out", expected, moment)) is None, (moment, seconds, wrong)
