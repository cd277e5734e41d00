"""What is derived is derived once and handed on: counted through the real command line."""

import collections
import json
import time

import jax
import pytest

import jvdiff
from jvdiff import pipeline
from jvdiff.commands import sample
from jvdiff.diffusion import schedules
from jvdiff.models.text import tokenizer
from jvdiff.models.wan import family
from jvdiff.pipeline import repository

SMALL = {"num_frames": 5, "height": 16, "width": 16, "steps": 2, "pattern": "sliding_tile:1x1x1:1x1x1"}
PROGRAMS = {"jit(text)", "jit(denoise)", "jit(decode)"}
CLIPS = {"a red two moving left": 2.0, "a blue seven moving right": 3.5, "a blue two": 4.0}  # guidance


@pytest.fixture
def count(monkeypatch):
    """count(module, name): a list that gets the arguments of each call from now on."""

    def install(module, name):
        calls, real = [], getattr(module, name)

        def counted(*args, **named):
            calls.append((args, named))
            return real(*args, **named)

        monkeypatch.setattr(module, name, counted)
        return calls

    return install


def words(checkpoint, folder, **more):
    fields = {"checkpoint": checkpoint, "output": folder, "compile_cache": "off", **SMALL, **more}
    return ["jvdiff sample", *(f"--{name}={value}" for name, value in fields.items())]


def test_one_clip_is_derived_once_and_three_compile_once(tiny_repository, tmp_path, count, compiled, monkeypatch):
    jax.clear_caches()  # of other tests
    load = pipeline.load

    def waiting(*args, **how):
        """Weights are not read before all is compiled: that needs none of them."""
        until = time.monotonic() + 120
        while sum(name in PROGRAMS for name in compiled) < 4 and time.monotonic() < until:
            time.sleep(0.01)
        compiled.append("loaded")
        return load(*args, **how)

    monkeypatch.setattr(pipeline, "load", waiting)
    counts = {
        "the tokenizer is read": count(tokenizer.Tokenizer, "from_str"),
        "the prompt is checked": count(tokenizer, "check_prompt"),
        "the prompt is tokenised": count(tokenizer, "tokenize"),
        "the weights are fingerprinted": count(repository, "_fingerprint"),
        "the pattern is parsed": count(family, "read_pattern"),
        "the schedule is made": count(schedules, "make"),
    }
    assert sample.main(words(tiny_repository, tmp_path, prompt="a red seven moving left", seed=3)) == 0
    assert {what: len(calls) for what, calls in counts.items()} == dict.fromkeys(counts, 1)
    programs = collections.Counter(name for name in compiled[: compiled.index("loaded")] if name in PROGRAMS)
    assert programs == {"jit(text)": 1, "jit(denoise)": 1, "jit(decode)": 2}  # the first latent frame, and those behind
    assert not PROGRAMS & {*compiled[compiled.index("loaded") :]}
    monkeypatch.undo()

    compiled.clear()
    lines = [{"prompt": prompt, "guidance": guidance} for prompt, guidance in CLIPS.items()]
    (tmp_path / "three.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert sample.main(words(tiny_repository, tmp_path, prompts=tmp_path / "three.jsonl", seed=7)) == 0
    assert len(list(tmp_path.glob("*.mp4"))) == 4 and compiled == []

    pipe = jvdiff.load(tiny_repository, "float32")
    for seed, (prompt, guidance) in enumerate(CLIPS.items()):
        jvdiff.generate(pipe, prompt, seed=seed, guidance=guidance, **SMALL)
    assert not set(compiled) & PROGRAMS
    compiled.clear()
    jvdiff.generate(pipe, "a red seven", seed=99, guidance=7.5, **SMALL)
    assert compiled == []
