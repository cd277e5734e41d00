"""Folders whose files are run as code; the compile cache is whole, or off."""

import os
import warnings

import jax
import jax.numpy as jnp
import pytest

from jvdiff.commands import command_line
from jvdiff.errors import SetupError
from jvdiff.runtime import cache


@pytest.fixture(autouse=True)
def as_before():
    with command_line._compiling_as_before():
        yield


def test_a_folder_that_others_can_replace_is_refused(tmp_path):
    mine = tmp_path / "open" / "inner" / "mine"
    mine.mkdir(parents=True)
    mine.chmod(0o700)
    cache.check_private(mine, "the cache")
    for mode in (0o777, 0o770):
        (tmp_path / "open").chmod(mode)
        with pytest.raises(SetupError, match="others can put another folder in its place"):
            cache.check_private(mine, "the cache")
        (tmp_path / "link").symlink_to(mine)
        with pytest.raises(SetupError, match="another folder in its place"):
            cache.check_private(tmp_path / "link", "the cache")
        (tmp_path / "link").unlink()
    (tmp_path / "open").chmod(0o1777)  # as /tmp is
    cache.check_private(mine, "the cache")
    mine.chmod(0o770)
    with pytest.raises(SetupError, match="chmod 700"):
        cache.check_private(mine, "the cache")


def test_named_it_is_refused_and_by_default_it_is_done_without(tmp_path, monkeypatch, capsys):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(SetupError, match="open, where others"):
        command_line.compile_cache(str(tmp_path / "open" / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "open"))
    jax.config.update("jax_compilation_cache_dir", None)
    command_line.compile_cache(None)
    assert "notice: no compilation cache" in capsys.readouterr().err
    assert not jax.config.jax_enable_compilation_cache


def compiled(number):
    jax.clear_caches()
    return jax.jit(lambda x: jnp.sin(x) * number)(jnp.arange(5, dtype=jnp.float32))


def test_off_is_off_for_the_cache_of_jax_too(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    command_line.compile_cache("off")
    compiled(3)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_entry_is_replaced_once_and_silently(tmp_path, monkeypatch):
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    tmp_path.chmod(0o700)
    command_line.compile_cache(str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        right = compiled(5)
        entries = {path: path.read_bytes() for path in tmp_path.glob("*-cache")}
        assert entries
        for path, content in entries.items():
            flipped = bytearray(content)
            flipped[len(content) // 2] ^= 1
            path.write_bytes(flipped if path.name < "jit_m" else content[:100])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert (compiled(5) == right).all()
            assert all(path.stat().st_size > 100 for path in entries)
            times = {path: path.stat().st_mtime_ns for path in entries}
            compiled(5)
        assert times == {path: path.stat().st_mtime_ns for path in entries}
        assert os.listdir(tmp_path)
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
