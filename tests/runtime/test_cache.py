"""Folders whose files are run as code; the compile cache is whole, or off."""

import os
import shutil
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest

from jvdiff.commands import command_line, planning, sharding
from jvdiff.digits import __main__ as digits
from jvdiff.errors import SetupError, UsageError
from jvdiff.runtime import cache


@pytest.fixture(autouse=True)
def as_before():
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache
    yield
    cache._set(*before)


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


@pytest.fixture
def fast():
    """Programs that are compiled at once are kept too."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def compiled(number):
    jax.clear_caches()
    return jax.jit(lambda x: jnp.sin(x) * number)(jnp.arange(5, dtype=jnp.float32))


def test_off_is_off_for_the_cache_of_jax_too(tmp_path, fast):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    command_line.compile_cache("off")
    compiled(3)
    assert list(tmp_path.iterdir()) == []


def test_switched_off_in_the_environment_is_off_unless_a_folder_is_named(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    with cache.no_programs():
        command_line.compile_cache(None)
        assert not jax.config.jax_enable_compilation_cache
        command_line.compile_cache(str(tmp_path))
        assert jax.config.jax_enable_compilation_cache
    assert not jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir == str(tmp_path)
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/compiled")
    with pytest.raises(UsageError, match="the compilation cache is 'gs://bucket/compiled', an address"):
        command_line.compile_cache(None)


def test_without_a_home_folder_there_is_no_cache(monkeypatch, capsys):
    """Of a user that the machine does not know, as containers have them; a folder called ~ is never made."""
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(cache.folder("compiled")) == "/home/me/cache/jvdiff/compiled"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert str(cache.folder("compiled")) == "/home/me/.cache/jvdiff/compiled"
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    jax.config.update("jax_compilation_cache_dir", None)
    command_line.compile_cache(None)
    assert "notice: no compilation cache, no home folder is known" in capsys.readouterr().err
    assert not jax.config.jax_enable_compilation_cache


def test_commands_that_check_no_folder_use_none(tmp_path, monkeypatch, fast):
    """Whatever the environment names, for a JAX that is there and for one that is imported later."""
    (tmp_path / "open").mkdir(mode=0o777)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "open"))
    compiled(7)
    assert len(list((tmp_path / "open").iterdir())) > 0
    shutil.rmtree(tmp_path / "open")
    for place, main, words in (
        ("jvdiff.plan.sampling", planning.main, []),
        ("jvdiff.commands.sharding.lines", sharding.main, []),
        ("jvdiff.digits.clips.write_clips", digits.main, ["--output=clips", "--clips=1"]),
    ):
        monkeypatch.setattr(place, lambda *_: map(str, compiled(7)))
        assert main(["jvdiff", *words]) == 0
    assert not (tmp_path / "open").exists()
    assert jax.config.jax_enable_compilation_cache
    for said in (None, "1", "off", "nonsense"):
        monkeypatch.delitem(sys.modules, "jax")
        monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE", raising=False)
        if said:
            monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", said)
        with cache.no_programs():
            assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == ("nonsense" if said == "nonsense" else "false")
        assert os.environ.get("JAX_ENABLE_COMPILATION_CACHE") == said
        sys.modules["jax"] = jax


def test_a_damaged_entry_is_replaced_once_and_silently(tmp_path, fast):
    tmp_path.chmod(0o700)
    command_line.compile_cache(str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
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
