"""What a training computes once: used again only where it is what was written."""

import resource

import numpy as np
import pytest

from jvdiff.training.kept import kept


@pytest.mark.parametrize("damage", ["flip", "cut", "no digest", "garbage", "other key"])
def test_what_is_not_what_was_written_is_made_anew(tmp_path, damage, caplog):
    path, made = tmp_path / "latents.npz", []

    def make():
        made.append(1)
        return {"latents": np.full((3, 4), len(made), np.float16)}

    for _ in range(2):
        assert (kept(path, "key", make)["latents"] == 1).all()
    assert made == [1]
    content, mark = bytearray(path.read_bytes()), path.with_suffix(".json")
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[:40] if damage == "cut" else content)
    if damage == "no digest":
        mark.unlink()
    if damage == "garbage":
        mark.write_bytes(b"[" * 100_000)
    assert (kept(path, "other" if damage == "other key" else "key", make)["latents"] == 2).all()
    assert ("made anew" in caplog.text) is (damage != "other key")
    assert (kept(path, "other" if damage == "other key" else "key", make)["latents"] == 2).all() and made == [1, 1]


def test_where_the_disk_refuses_them_the_run_goes_on(tmp_path, caplog):
    path, before = tmp_path / "latents.npz", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        assert (kept(path, "key", lambda: {"latents": np.ones(1000)})["latents"] == 1).all()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "The run goes on" in caplog.text and list(tmp_path.iterdir()) == []
