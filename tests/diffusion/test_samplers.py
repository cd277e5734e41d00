"""Samplers as values: their text form."""

import pytest

from jvdiff.diffusion import samplers
from jvdiff.errors import UsageError


def test_a_text_names_a_sampler():
    assert samplers.read("euler", 7, 3.0, "diffusers") == samplers.FlowSampler("euler", 7, 3.0, "diffusers")
    assert samplers.read("renoise:1000,500", 2, 5.0, "training") == samplers.RenoiseSampler((1000, 500), 5.0)
    assert samplers.own_steps("renoise:1000,500") == 2 and samplers.own_steps("unipc") is None


def test_steps_that_contradict_the_list_are_refused():
    with pytest.raises(UsageError, match=r"steps is 3, and solver lists 2 timesteps .*leave steps out"):
        samplers.read("renoise:1000,500", 3, 5.0, "training")


@pytest.mark.parametrize("text", ["unipcc", "renoise", "renoise:", "renoise:1,x", ""])
def test_another_text_is_refused_with_those_there_are(text):
    with pytest.raises(UsageError, match="expected unipc, euler, or renoise:1000,750,500,250"):
        samplers.read(text, 4, 3.0, "diffusers")
