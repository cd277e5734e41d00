"""One device or eight, the same clip: bit for bit where only clips or tokens are divided."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("same_clip.py")


def differences(clips, *meshes):
    """Mesh -> largest difference of the latents from one device's, relative to the largest of those."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, SCRIPT, str(clips), *meshes], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_tokens_and_guidance_branches_divided_give_the_same_bits():
    """3 heads do not divide: with ring=1 they are padded, and every query sees all keys in one go."""
    meshes = ("data=2", "sequence=2,ring=1", "sequence=4,ring=1", "sequence=8,ring=1", "data=2,sequence=4,ring=1")
    assert differences(1, *meshes) == dict.fromkeys(meshes, 0.0)


def test_clips_divided_give_the_same_bits():
    meshes = ("data=4", "data=8")
    assert differences(4, *meshes) == dict.fromkeys(meshes, 0.0)


@pytest.mark.parametrize("meshes", [("tensor=3", "fsdp=8", "fsdp=2,tensor=3", "sequence=8", "sequence=2")])
def test_where_sums_are_divided_the_clip_is_the_same_to_rounding(meshes):
    """Heads and columns, or keys in a ring (3 heads on 8 devices: one of 8)."""
    found = differences(1, *meshes)
    assert found.keys() == set(meshes)
    assert all(error < 1e-5 for error in found.values()), found
