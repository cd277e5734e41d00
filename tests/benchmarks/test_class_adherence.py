"""The benchmark of classes: what is counted, and that a model's clips are made, read and shown class by class."""

import importlib
from pathlib import Path

import numpy as np
import pytest

import jvdiff
from jvdiff import pipeline
from jvdiff.digits import clips as digits
from jvdiff.digits.judge import Seen
from jvdiff.errors import UsageError
from jvdiff.models import latent_video
from jvdiff.models.latent_video.family import CLASS_CONDITIONAL


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("class_adherence")


def model(folder, classes, random_params):
    vae = latent_video.VAEConfig(width=4, groups=2, blocks=1, multipliers=(1, 1, 1, 1))
    dit = latent_video.DiTConfig(16, depth=1, num_heads=2, num_classes=len(classes), freq_dim=16)
    configs = {"transformer": dit, "vae": vae}
    parts = {name: (cfg, random_params(latent_video.abstract_params(cfg))) for name, cfg in configs.items()}
    index = {"classes": list(classes), "defaults": {"num_frames": 4, "height": 64, "width": 64, "steps": 2}}
    pipeline.save(folder, CLASS_CONDITIONAL, parts, files={}, index=index)
    return jvdiff.load(folder, "float32")


def test_kinds_are_counted_within_a_class_and_do_not_depend_on_how_many_clips_there_are(benchmark):
    kinds = [Seen(colour, 3, way) for colour in ("red", "blue") for way in ("up", "down")]
    for times in (10, 40):
        seen, wanted = kinds * times + kinds[:1] * 4 * times, [3] * 4 * times + [4] * 4 * times
        video = np.zeros((len(seen), 1, 1, 1, 3), np.uint8)
        video[::2] = 200
        result = benchmark.score(seen, video, wanted, video)
        assert result["digit"] == {"right": 4 * times, "percent": 50.0} and result["spread"] == 1
        same = 1, 1 / 4  # chance that two clips agree, in the second class and in the first
        assert result["kinds"] == pytest.approx(2 / sum(same), abs=0.1)
    nothing = [Seen(None, None, None)] * 8
    assert benchmark.score(nothing, video[:8], [3] * 4 + [4] * 4, video[:8])["kinds"] is None


def test_spread_is_within_classes_and_beside_that_of_real_clips(benchmark):
    rng = np.random.default_rng(0)
    around = np.repeat([60, 160], 50)[:, None, None, None, None]  # what distinguishes the classes is no spread
    wide, narrow = (np.rint(around + d * rng.choice([-1, 1], (100, 2, 8, 8, 3))).astype(np.uint8) for d in (40, 20))
    seen, wanted = [Seen("red", 1, "up")] * 100, [1] * 50 + [2] * 50
    assert benchmark.score(seen, narrow, wanted, wide)["spread"] == pytest.approx(0.25, abs=0.01)


def test_clips_of_each_class_are_made_for_each_weight_and_shown(
    benchmark, tmp_path, monkeypatch, capsys, random_params
):
    monkeypatch.setattr(benchmark.digits_judge, "look", lambda judge, videos: [Seen("red", 7, "left")] * len(videos))
    trained = model(tmp_path / "digits", ("one", "seven"), random_params)
    report, picture = benchmark.measure({}, trained, (1.0, 7.5), 4, batch=2, seed=5)
    assert list(report["measured"]) == ["real", "real, through the VAE", "guidance 1", "guidance 7.5"]
    assert {row["digit"]["percent"] for row in report["measured"].values()} == {50.0}
    assert report["measured"]["real"]["spread"] == 1 and report["steps"] == 2
    made = jvdiff.generate(trained, labels=["seven", "seven"], seed=7, guidance=7.5).video
    np.testing.assert_array_equal(picture[-128:, 64:], np.concatenate(list(made[:, 2])))
    assert picture.shape == (8 * 64, 2 * 64, 3)
    benchmark.show(report)
    assert "2/4 = 50.0 %" in capsys.readouterr().out
    with pytest.raises(UsageError, match="5 clips; expected a multiple of the 2 classes"):
        benchmark.measure({}, trained, (1.0,), 5, batch=5, seed=0)


def test_only_classes_that_are_digits_are_judged(benchmark, tmp_path, random_params):
    with pytest.raises(UsageError, match="of the classes cat, dog; expected 64x64 and digits in words"):
        benchmark.measure({}, model(tmp_path / "pets", ("cat", "dog"), random_params), (1.0,), 4, batch=4, seed=0)


def test_real_clips_show_the_digits_by_held_out_glyphs_in_combinations_of_the_training(benchmark, monkeypatch):
    asked, sample = [], digits.sample
    monkeypatch.setattr(digits, "sample", lambda rng, *how: asked.append(how) or sample(rng, *how))
    real = benchmark.real_clips([3, 8] * 20, 4, seed=0)
    assert real.shape == (40, 4, 64, 64, 3) and real.dtype == np.uint8
    splits, combos, _ = zip(*asked, strict=True)
    assert set(splits) == {"test"} and [c.digit for c in combos] == [3, 8] * 20
    assert not digits.HELD_OUT & set(combos) and len(set(combos)) > 20
