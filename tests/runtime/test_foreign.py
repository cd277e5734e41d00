"""What others raise becomes a sentence with a status; what is ours alone stays a bug."""

import errno
import io
import json
import os
import sys

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from jvdiff.errors import SetupError
from jvdiff.media.video import import_av
from jvdiff.runtime import environment, foreign


def raised(action):
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def deep():
    json.loads("[" * 100_000)


def read(path, content):
    path.write_bytes(content)
    return path


def system(number, name=None):
    def action():
        raise OSError(number, os.strerror(number), name)

    return action


def av(folder):
    return lambda: import_av().open(str(read(folder / "x.mp4", b"no video at all")))


def guarded():
    with jax.transfer_guard("disallow"):
        jax.numpy.asarray(np.arange(3.0)) + 1


CASES = {
    "transfer guard": (7, lambda folder: guarded, "JAX_TRANSFER_GUARD forbids"),
    "full disk": (4, lambda folder: system(errno.ENOSPC, "out/x.mp4"), "out/x.mp4: No space left"),
    "quota": (4, lambda folder: system(errno.EDQUOT), "quota"),
    "too many files": (4, lambda folder: system(errno.EMFILE), "ulimit -n"),
    "disk fails": (4, lambda folder: system(errno.EIO, "x"), "x: Input/output error"),
    "dangling": (3, lambda folder: (folder / "nothing").read_bytes, "nothing: No such file"),
    "loop of links": (3, lambda folder: system(errno.ELOOP, b"x"), "x: Too many levels"),
    "not permitted": (3, lambda folder: system(errno.EACCES, "x"), "Permission denied"),
    "network": (7, lambda folder: system(errno.ECONNREFUSED), "the network fails"),
    "FFmpeg": (3, av, "FFmpeg cannot"),
    "nested JSON": (3, lambda folder: deep, "JSON"),
    "JSON": (3, lambda folder: lambda: json.loads("{"), "JSON"),
    "bytes": (3, lambda folder: lambda: b"\xff".decode(), "UTF-8"),
    "surrogates": (2, lambda folder: lambda: "\ud800".encode(), "cannot be written"),
    "digits": (2, lambda folder: lambda: int("1" * 5000), "too many digits"),
    "zip": (3, lambda folder: lambda: np.load(io.BytesIO(b"PK\3\4 and no more")), "arrays"),
    "npy": (3, lambda folder: lambda: np.load(read(folder / "x.npy", b"\x93NUMPY\1\0\xff\xffx")), "arrays"),
    "tokenizer": (3, lambda folder: lambda: Tokenizer.from_str("{}"), "tokenizer"),
    "package": (7, lambda folder: lambda: __import__("no_such_package"), "no_such_package"),
    "memory": (4, lambda folder: lambda: np.empty(2**60, np.uint8), "not enough memory"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_others_raise_is_a_sentence_with_a_status(tmp_path, name):
    status, action, words = CASES[name]
    known = foreign.explained(raised(action(tmp_path)))
    assert known is not None and known.exit_code == status and words in str(known)


@pytest.mark.parametrize("error", [AssertionError(), KeyError("x"), ValueError("x"), TypeError("x"), RecursionError()])
def test_what_is_ours_stays_a_bug(error):
    def action():
        raise error

    assert foreign.explained(raised(action)) is None


def test_flags_that_end_the_process_are_foreseen(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=3")
    environment.check_flags()  # JAX is there: it has read its flags
    monkeypatch.delitem(sys.modules, "jaxlib")
    with pytest.raises(SetupError, match="Unknown flag in XLA_FLAGS: --xla_no_such_flag=3"):
        environment.check_flags()
    assert not list(tmp_path.rglob("*"))


def test_flags_that_were_tried_are_not_tried_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: calls.append(1) or DONE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    monkeypatch.delitem(sys.modules, "jaxlib")
    environment.check_flags()
    environment.check_flags()
    assert calls == [1]
    monkeypatch.delenv("XLA_FLAGS")
    environment.check_flags()
    assert calls == [1]


class DONE:
    returncode, stderr = 0, b""
