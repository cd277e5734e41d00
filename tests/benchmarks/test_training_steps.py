"""The training steps that the benchmark compiles and times are those of the config, and its counts are theirs."""

import jax
import numpy as np
import pytest

from benchmarks import training_steps
from jvdiff.errors import SetupError
from jvdiff.models import latent_video
from jvdiff.models.latent_video.objective import LabelledLatents, latent_video_task
from jvdiff.training.loop import Schedule


@pytest.mark.parametrize("size", latent_video.SIZES)
def test_a_size_is_trained_as_the_config_says(size):
    task, _, batch = training_steps.step_of(size)
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert batch.latents.shape == (8, 4, 32, 32, 4)
    assert params["blocks"]["ffn"]["gate"]["kernel"].shape[0] == latent_video.SIZES[size].depth


def test_a_step_is_run_and_counted(monkeypatch, capsys):
    cfg = latent_video.DiTConfig(hidden_size=16, depth=2, num_heads=2, num_classes=10, freq_dim=16)
    task = latent_video_task(cfg, lambda start: iter(()))  # type: ignore[arg-type]
    struct = jax.ShapeDtypeStruct
    batch = LabelledLatents(struct((2, 2, 4, 4, 4), np.float32), struct((2,), np.int32))  # type: ignore[arg-type]
    monkeypatch.setattr(training_steps, "step_of", lambda size: (task, Schedule(steps=9, warmup=1), batch))
    (row,) = training_steps.measured(["small"], None, repeats=2)
    assert row["parameters"] == sum(x.size for x in jax.tree.leaves(latent_video.abstract_params(cfg)))
    # Two layers of 8 matrices D x D and 3 of D x 4D, for 2 clips of 2 frames of 4 tokens.
    linear = 2 * 20 * 16**2 * 2 * 2 * 4
    assert 3 * 2 * linear < row["flops"] < 6 * 2 * linear and np.isfinite(row["loss"]) and row["seconds"] > 0
    assert "small" in capsys.readouterr().out


def test_the_largest_batch_is_what_the_rest_of_the_memory_holds():
    few = {"clips": 2, "state_gib": 4.0, "temporary_gib": 3.0, "predicted_s": 0.1}
    many = {"clips": 8, "state_gib": 4.0, "temporary_gib": 6.0, "predicted_s": 0.4}
    assert training_steps._largest(few, many, 18.0) == {"largest_batch": 24, "largest_batch_s": 1.2}
    assert training_steps._largest(few, many, 5.0)["largest_batch"] == 0


def test_another_device_than_wanted_is_refused():
    other = "cpu" if jax.default_backend() == "gpu" else "gpu"
    with pytest.raises(SetupError, match=f"--device {other}: JAX runs on"):
        next(training_steps.measured(["small"], other, 1))
