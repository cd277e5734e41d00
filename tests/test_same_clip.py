"""One device or eight, the same clip: bit for bit where only clips or tokens are divided."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("same_clip.py")


def differences(*words):
    """Mesh -> largest difference of the latents from one device's, relative to the largest of those."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_one_clip_is_the_same_under_every_mesh():
    """Bit for bit where branches of guidance or tokens are divided; to rounding where sums are (heads, columns, rings).

    3 heads do not divide: with ring=1 they are padded, and every query sees all keys in one go.
    """
    exact = ("data=2", "sequence=8,ring=1", "fsdp=8,ring=1")
    rounded = ("tensor=3", "sequence=8")
    found = differences(*exact, *rounded)
    assert {mesh: found.pop(mesh) for mesh in exact} == dict.fromkeys(exact, 0.0)
    assert found.keys() == set(rounded) and all(error < 1e-5 for error in found.values()), found


def test_a_clip_of_eight_bits_is_the_same_divided():
    """Restored through a transform: where weights are divided, the same integers and scales come together."""
    assert differences("--eight_bits", "fsdp=2,ring=1") == {"fsdp=2,ring=1": 0.0}
