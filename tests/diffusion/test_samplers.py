"""Samplers as values: their text form."""

import pytest

from jvdiff.diffusion import samplers
from jvdiff.errors import UsageError


@pytest.mark.parametrize(
    ("solver", "grid", "expected"),
    [
        ("euler", "diffusers", samplers.FlowSampler("euler", 2, 5.0)),
        ("renoise", "training", samplers.FlowSampler("renoise", 2, 5.0, "training")),
        ("unipc:3", "karras:80,0.002", samplers.FlowSampler("unipc", 2, 5.0, "karras", (80.0, 0.002), order=3)),
        ("unipc", "timesteps:1000,500", samplers.FlowSampler("unipc", 2, 5.0, "timesteps", (1000.0, 500.0))),
        ("renoise:1000,500", "training", samplers.RenoiseSampler((1000, 500), 5.0)),
        ("dmd:1000,757", "diffusers", samplers.RenoiseSampler((1000, 757), 5.0, warp=False)),
    ],
)
def test_texts_name_a_sampler(solver, grid, expected):
    assert samplers.read(solver, 2, 5.0, grid) == expected


def test_a_solver_or_a_grid_may_say_how_many_steps_there_are():
    assert samplers.own_steps("renoise:1000,500") == samplers.own_steps("unipc", "sigmas:1,0.5") == 2
    assert samplers.own_steps("unipc") is samplers.own_steps("renoise", "karras:0.9,0.1") is None


def test_steps_that_contradict_the_list_are_refused():
    with pytest.raises(UsageError, match=r"steps is 3, and solver lists 2 timesteps .*leave steps out"):
        samplers.read("renoise:1000,500", 3, 5.0, "training")


def test_a_grid_that_contradicts_steps_or_a_solver_is_refused():
    with pytest.raises(UsageError, match=r"steps is 3, and grid lists 2 timesteps .*leave steps out"):
        samplers.read("euler", 3, 5.0, "sigmas:1,0.5")
    with pytest.raises(UsageError, match=r"lists its own timesteps \(dmd:1000,757\), and grid is 'sigmas:1,0.5'"):
        samplers.read("dmd:1000,757", 2, 5.0, "sigmas:1,0.5")
    with pytest.raises(UsageError, match=r"and shift_terminal is 0\.1; leave one of them out"):
        samplers.read("dmd:1000,757", 2, 5.0, "diffusers", 0.1)


@pytest.mark.parametrize("grid", ["karass", "karras:", "sigmas:1,x", "timesteps", "sigmas:1,2", "diffusers:1"])
def test_another_grid_is_refused(grid):
    with pytest.raises(UsageError, match="grid"):
        samplers.read("euler", 2, 5.0, grid)


@pytest.mark.parametrize("text", ["unipcc", "renoise:", "renoise:1,x", "", "unipc:4", "euler:2", "dmd"])
def test_another_text_is_refused_with_those_there_are(text):
    with pytest.raises(UsageError, match="expected unipc, euler, or renoise:1000,750,500,250"):
        samplers.read(text, 4, 3.0, "diffusers")
