"""One device or eight, the same clip: bit for bit where only clips or tokens are divided."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("same_clip.py")


def test_one_clip_is_the_same_under_every_mesh():
    """Bit for bit where branches of guidance or tokens are divided. 3 heads do not divide: with ring=1 they are padded,
    and every query sees all keys in one go. tests/test_mesh.py divides sums (heads, columns, rings), to rounding.

    Of eight bits too, restored through a transform: where weights are divided, the same integers and scales come
    together.
    """
    meshes, of_eight_bits = ["data=2", "sequence=8,ring=1", "fsdp=8,ring=1"], ["fsdp=2,ring=1"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *meshes, "--eight_bits", *of_eight_bits],
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [dict.fromkeys(meshes, 0.0), dict.fromkeys(of_eight_bits, 0.0)]
