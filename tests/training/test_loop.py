"""The loop on a network of two layers: exact resume in another process, signals, NaN, and the optimiser's pieces."""

import dataclasses
import json
import os
import shutil
import signal
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jvdiff.errors import CheckpointError, Interrupted, NumericsError, SetupError, UsageError
from jvdiff.sharding import MeshShape, make_mesh
from jvdiff.training import loop
from jvdiff.training.metrics import SINKS
from tests.forks import Process

SCHEDULE = loop.Schedule(steps=24, learning_rate=1e-2, warmup=2)
EVERY = {"save_every": 4, "log_every": 2}


def init(key):
    one, two = jax.random.split(key)
    return {
        "inner": {"kernel": jax.random.normal(one, (5, 7)), "bias": jnp.zeros(7)},
        "outer": {"kernel": jax.random.normal(two, (7, 3)), "scale": jnp.ones(3)},
    }


def loss(params, batch, key):
    x = batch + 0.1 * jax.random.normal(key, batch.shape)
    hidden = jnp.tanh(x @ params["inner"]["kernel"] + params["inner"]["bias"][None])
    value = jnp.mean((hidden @ params["outer"]["kernel"] * params["outer"]["scale"][None] - batch[:, :3]) ** 2)
    return value, {"twice": 2.0 * value}


def batch(step):
    return np.random.default_rng(step).standard_normal((4, 5), np.float32)


TASK = loop.Task(init, loss, loop.each(batch))


def at(step, action):
    """TASK, with something that happens when the batch of a step is asked for."""

    def batches(now):
        if now == step:
            action()
        return batch(now)

    return dataclasses.replace(TASK, batches=loop.each(batches))


def stored(folder, step):
    """Every array of a checkpoint by its path in the tree that was written."""
    path = (folder / "state" / str(step) / "default").absolute()
    with ocp.PyTreeCheckpointer() as orbax:
        tree = orbax.metadata(path).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        tree = orbax.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def lines(folder):
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in every]


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def in_new_process(folder, task):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import os, pathlib, signal, time, warnings; warnings.simplefilter('error')\n"
        "from test_loop import *\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "def die():\n"
        "    while not (folder / 'state' / '4').exists(): time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "def terminate(): os.kill(os.getpid(), signal.SIGTERM)\n"
        f"try: loop.fit({task}, SCHEDULE, folder, seed=1, **EVERY)\n"
        "except Interrupted as error: print(error, file=sys.stderr); sys.exit(error.exit_code)\n"
    )
    return Process("-c", code)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped: its folder and its last state."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, loop.fit(TASK, SCHEDULE, folder, seed=1, **EVERY)


# ---------------------------------------------------------------------------------------------------------- resuming


def test_a_killed_run_goes_on_bit_for_bit_in_another_process(whole, tmp_path):
    died = in_new_process(tmp_path, "at(7, die)")
    assert died.wait() == -signal.SIGKILL, died.err
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # as a kill in the middle of a line leaves it
    assert (tmp_path / "state" / "4").is_dir() and not (tmp_path / "state" / "8").exists()
    loop.fit(TASK, SCHEDULE, tmp_path, seed=1, **EVERY)
    folder, _ = whole
    assert_same_bits(stored(tmp_path, 24), stored(folder, 24))
    assert lines(tmp_path) == lines(folder)
    assert [line["step"] for line in lines(folder)] == list(range(2, 25, 2))


def test_the_state_comes_back_as_it_was(whole):
    folder, state = whole
    again = loop.fit(TASK, SCHEDULE, folder, seed=1, **EVERY)  # nothing left to do
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert isinstance(again, loop.State) and isinstance(again.optimizer[1][0], optax.ScaleByAdamState)
    for new, old in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert new.dtype == old.dtype and new.weak_type == old.weak_type
        np.testing.assert_array_equal(new, old)


def flip(folder, step):
    """Changes one bit of the numbers of a saved state."""
    file = max((folder / "state" / str(step) / "default").rglob("d/*"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_in_a_state_is_noticed_and_the_run_goes_on_from_the_state_before(whole, tmp_path, caplog):
    folder, state = whole
    shutil.copytree(folder / "state", tmp_path / "state")
    flip(tmp_path, 24)
    again = loop.fit(TASK, SCHEDULE, tmp_path, seed=1, **EVERY)
    assert "state/24: differs from what was written" in caplog.text
    for new, old in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(new, old)
    (aside,) = tmp_path.glob("damaged-24-*")
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["20", "24"] and aside.is_dir()
    for step in (20, 24):
        flip(tmp_path, step)
    with pytest.raises(CheckpointError, match="No earlier state is whole"):
        loop.fit(TASK, SCHEDULE, tmp_path, seed=1, **EVERY)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["20", "24"]


def test_a_state_of_a_version_without_digests_goes_on_with_a_warning(whole, tmp_path, caplog):
    shutil.copytree(whole[0] / "state", tmp_path / "state")
    for manifest in tmp_path.glob("state/*/jvdiff.json"):
        manifest.unlink()
    loop.fit(TASK, SCHEDULE, tmp_path, seed=1, **EVERY)
    assert "saved without digests" in caplog.text


def test_the_layout_on_the_disk_is_a_contract(whole):
    """Runs that were begun with an earlier version must go on."""
    assert {name[:3] for name in stored(whole[0], 24)} == {"[0]", "[1]", "[2]", "[3]", "[4]", "[5]"}
    assert sorted(name for name in stored(whole[0], 24) if "kernel" not in name and name.startswith("[3]")) == sorted(
        [
            "[3][1][0]['count']",
            "[3][1][2]['count']",
            *(f"[3][1][0]['{m}']{leaf}" for m in ("mu", "nu") for leaf in ("['inner']['bias']", "['outer']['scale']")),
        ]
    )


def test_a_saved_state_is_not_touched_by_later_steps(tmp_path):
    """Steps reuse the buffers of the state that is being written behind them."""
    state = loop.fit(TASK, dataclasses.replace(SCHEDULE, steps=9), tmp_path, save_every=1, log_every=9, keep=9)
    step = loop.make_step(TASK, dataclasses.replace(SCHEDULE, steps=9), jax.random.split(jax.random.key(0))[1])
    again = loop.start(TASK, SCHEDULE, jax.random.split(jax.random.key(0))[0])
    for number in range(1, 10):
        again, _ = step(again, batch(number - 1))
        kept = stored(tmp_path, number)
        np.testing.assert_array_equal(kept["[1]['inner']['kernel']"], again.params["inner"]["kernel"])
        np.testing.assert_array_equal(kept["[2]['inner']['kernel']"], again.average["inner"]["kernel"])
    np.testing.assert_array_equal(state.params["inner"]["kernel"], again.params["inner"]["kernel"])


def test_another_model_in_the_folder_is_told_in_a_sentence(whole):
    folder, _ = whole
    wider = dataclasses.replace(TASK, init=lambda key: init(key) | {"more": {"kernel": jnp.zeros((2, 2))}})
    with pytest.raises(
        CheckpointError,
        match=r"(?s)step 24 cannot be restored: 1 parameters differ, more/kernel is None.*choose another",
    ):
        loop.fit(wider, SCHEDULE, folder, seed=1)
    shapes = dataclasses.replace(TASK, init=lambda key: jax.tree.map(lambda x: jnp.zeros((*x.shape, 2)), init(key)))
    with pytest.raises(CheckpointError, match=r"4 parameters differ, inner/bias is \(7,\) there, \(7, 2\) here"):
        loop.fit(shapes, SCHEDULE, folder, seed=1)


def test_given_parameters_are_copied_and_begin_the_run(tmp_path):
    params = jax.jit(init)(jax.random.key(9))
    still = dataclasses.replace(SCHEDULE, steps=1, warmup=0, learning_rate=1e-30)
    state = loop.fit(TASK, still, tmp_path, params=params)
    for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-29)  # and `params` was not donated


# ----------------------------------------------------------------------------------------------------------- stopping


def test_sigterm_saves_and_exits_5_and_the_next_run_goes_on(whole, tmp_path):
    stopped = in_new_process(tmp_path, "at(5, terminate)")
    assert stopped.wait() == 5, stopped.err
    saved = int(max(p.name for p in (tmp_path / "state").iterdir()))
    assert saved in (4, 5, 6) and f"stopped after step {saved}, state saved; the same command" in stopped.err
    loop.fit(TASK, SCHEDULE, tmp_path, seed=1, **EVERY)
    assert_same_bits(stored(tmp_path, 24), stored(whole[0], 24))
    assert lines(tmp_path) == lines(whole[0])


def test_ctrl_c_saves_at_any_step_and_leaves_the_handlers_as_they_were(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted):
        loop.fit(at(0, lambda: os.kill(os.getpid(), signal.SIGINT)), SCHEDULE, tmp_path, seed=1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert int(max(p.name for p in (tmp_path / "state").iterdir())) <= 1


def broken_at(steps, where="loss"):
    """TASK, with a loss or a gradient that is NaN at these steps."""

    def broken(params, batch, key):
        bad, batch = batch[0, 0] > 1e6, jnp.where(batch > 1e6, 0.0, batch)
        value, metrics = loss(params, batch, key)
        if where == "gradient":  # the slope of a root at 0
            return value + jnp.sqrt(jnp.where(bad, 0.0 * jnp.sum(params["inner"]["bias"]), 1.0)), metrics
        return value * jnp.where(bad, jnp.nan, 1.0), metrics

    return loop.Task(init, broken, loop.each(lambda step: batch(step) + np.float32(1e7 if step in steps else 0)))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, where):
    short = dataclasses.replace(SCHEDULE, steps=9)
    state = loop.fit(broken_at({5, 8}, where), short, tmp_path, save_every=1, keep=9, log_every=3)
    before, after = stored(tmp_path, 5), stored(tmp_path, 6)
    counts = {"[0]", "[4]", "[5]"}  # the step, and the two counts of skipped ones
    assert_same_bits(*({k: v for k, v in each.items() if k not in counts} for each in (before, after)))
    assert (int(state.step), int(state.skipped), int(state.in_a_row)) == (9, 2, 1)
    assert [line["skipped"] for line in lines(tmp_path)] == [0, 1, 2]
    assert lines(tmp_path)[2]["loss" if where == "loss" else "grad_norm"] is None
    assert not np.array_equal(stored(tmp_path, 7)["[1]['inner']['kernel']"], after["[1]['inner']['kernel']"])


def test_too_many_such_steps_stop_the_run_and_the_last_good_state_is_kept(tmp_path):
    task = broken_at(range(6, 99))
    with pytest.raises(
        NumericsError, match=r"step 10 .* for 4 steps in a row;\n3 end the run(?s:.*)state of step 8 is kept"
    ) as raised:
        loop.fit(task, SCHEDULE, tmp_path, save_every=2, log_every=100, most_skipped=3)
    assert raised.value.exit_code == 6
    assert all(np.isfinite(array).all() for array in stored(tmp_path, 8).values())
    kept, good = stored(tmp_path, 8)["[1]['inner']['kernel']"], stored(tmp_path, 6)["[1]['inner']['kernel']"]
    np.testing.assert_array_equal(kept, good)


def test_an_error_in_the_data_comes_out_and_what_was_saved_stays(tmp_path):
    def fail():
        raise CheckpointError("clip.mp4 cannot be read")

    with pytest.raises(CheckpointError, match="cannot be read"):
        loop.fit(at(6, fail), SCHEDULE, tmp_path, save_every=2)
    assert (tmp_path / "state" / "4").is_dir()


def test_no_batch_is_asked_for_that_is_not_used(tmp_path):
    asked = []
    task = dataclasses.replace(TASK, batches=loop.each(lambda step: asked.append(step) or batch(step)))
    loop.fit(task, dataclasses.replace(SCHEDULE, steps=3), tmp_path)
    assert asked == [0, 1, 2]


def test_only_the_last_checkpoints_are_kept(tmp_path):
    loop.fit(TASK, dataclasses.replace(SCHEDULE, steps=7), tmp_path, save_every=2, keep=2)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["6", "7"]


def test_two_processes_never_share_a_folder(tmp_path):
    def again():
        with pytest.raises(CheckpointError, match=f"is being written by process {os.getpid()}"):
            loop.fit(TASK, SCHEDULE, tmp_path)

    loop.fit(at(1, again), dataclasses.replace(SCHEDULE, steps=3), tmp_path)


@pytest.mark.parametrize("field", ["save_every", "log_every", "keep"])
def test_counts_below_one_are_refused(tmp_path, field):
    with pytest.raises(UsageError, match=f"{field} is 0; expected 1"):
        loop.fit(TASK, SCHEDULE, tmp_path, **{field: 0})


def test_devices_that_share_a_batch_give_the_same_run(whole, tmp_path):
    state = loop.fit(TASK, SCHEDULE, tmp_path, seed=1, mesh=make_mesh(MeshShape(data=2)), **EVERY)
    for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole[1].params), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-3, atol=1e-4)  # only the order of sums differs
    with pytest.raises(UsageError, match="the batch is 4; expected a multiple of the 8"):
        loop.fit(TASK, SCHEDULE, tmp_path / "new", mesh=make_mesh(MeshShape(data=8)))


# ------------------------------------------------------------------------------------------------- samples and numbers


def test_samples_are_shown_of_the_average_and_change_nothing(whole, tmp_path):
    shown = {}
    task = dataclasses.replace(
        TASK, show=lambda average, step: shown.update({step: np.array(average["inner"]["bias"])})
    )
    state = loop.fit(task, SCHEDULE, tmp_path, seed=1, show_every=8, **EVERY)
    assert sorted(shown) == [8, 16, 24]
    np.testing.assert_array_equal(shown[24], state.average["inner"]["bias"])
    assert_same_bits(stored(tmp_path, 24), stored(whole[0], 24))


def test_numbers_go_to_other_places_on_request(tmp_path, monkeypatch):
    told = []

    class Run:
        def log(self, numbers, step):
            told.append((step, numbers["loss"]))

        def finish(self):
            told.append("finished")

    wandb = types.SimpleNamespace(init=lambda **how: told.append(how) or Run())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = tmp_path / "run"
    loop.fit(TASK, dataclasses.replace(SCHEDULE, steps=4), folder, log_every=2, log_to=("wandb", "tensorboard"))
    losses = [(line["step"], line["loss"]) for line in lines(folder)]
    assert told == [{"id": "run", "dir": str(folder), "resume": "allow"}, *losses, "finished"]
    assert next(iter((folder / "tensorboard").glob("events.out.tfevents.*"))).stat().st_size > 100


def test_a_place_that_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="log_to has 'paper'; expected some of tensorboard, wandb"):
        loop.fit(TASK, SCHEDULE, tmp_path, log_to=("paper",))
    monkeypatch.setitem(sys.modules, "wandb", None)
    closed = []
    monkeypatch.setitem(SINKS, "tensorboard", lambda stack, *_: stack.callback(closed.append, "tensorboard"))
    with pytest.raises(SetupError, match="pip install wandb"):
        loop.fit(TASK, SCHEDULE, tmp_path, log_to=("tensorboard", "wandb"))
    assert closed == ["tensorboard"]


# ------------------------------------------------------------------------------------------------------- optimisation


def test_a_batch_in_parts_has_the_gradient_of_the_whole(tmp_path):
    """On a mesh too, where a part of one row is less than the devices are."""

    def noiseless(params, batch, key):  # noise is drawn for each part
        x = jnp.tanh(batch @ params["inner"]["kernel"] + params["inner"]["bias"][None])
        return jnp.mean((x @ params["outer"]["kernel"] * params["outer"]["scale"][None]) ** 2), {"rows": jnp.mean(x)}

    task = loop.Task(init, noiseless, loop.each(batch))
    short = dataclasses.replace(SCHEDULE, steps=5)
    runs = [
        loop.fit(task, short, tmp_path / str(n), accumulate=n, mesh=mesh, log_every=1)
        for n, mesh in ((1, None), (2, None), (4, make_mesh(MeshShape(data=2))))
    ]
    for run in runs[1:]:
        for one, other in zip(jax.tree.leaves(runs[0].params), jax.tree.leaves(run.params), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)
    for one, other in zip(lines(tmp_path / "1"), lines(tmp_path / "4"), strict=True):
        np.testing.assert_allclose([one[k] for k in one], [other[k] for k in one], rtol=1e-4, atol=1e-6)
    with pytest.raises(UsageError, match="accumulate is 3; expected a divisor of the batch, which is 4"):
        loop.fit(task, SCHEDULE, tmp_path / "3", accumulate=3)


def update(transformation, grads, params):
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(lambda g, p: transformation.update(g, transformation.init(p), p))(grads, params)


def test_the_learning_rate_warms_up_and_falls_like_a_cosine():
    rate = loop.learning_rate(loop.Schedule(steps=1000, learning_rate=2e-3, warmup=100, final_rate=0.1))
    with jax.numpy_dtype_promotion("standard"):
        rates = jax.jit(jax.vmap(rate))(jnp.array([0, 50, 100, 550, 1000]))
    np.testing.assert_allclose(rates, [0, 1e-3, 2e-3, (2e-3 + 2e-4) / 2, 2e-4], rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0; expected 1 or more"),
        ({"steps": 10, "warmup": 10}, "warmup is 10; expected 0 or more, and fewer than the 10 steps"),
        ({"steps": 10, "warmup": 1, "learning_rate": float("nan")}, "learning_rate is nan"),
        ({"steps": 10, "warmup": 1, "clip": 0}, "clip is 0"),
        ({"steps": 10, "warmup": 1, "average_decay": 1.0}, "average_decay is 1.0"),
    ],
)
def test_a_schedule_that_cannot_be(fields, message):
    with pytest.raises(UsageError, match=message):
        loop.Schedule(**fields)


def test_matrices_decay_and_stacked_biases_do_not():
    params = {
        "blocks": {"ffn": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}, "modulation": jnp.ones((2, 6, 3))},
        "norm": {"scale": jnp.ones((2, 3))},
        "token_embed": {"embedding": jnp.ones((4, 3))},
    }
    transformation = loop.optimizer(loop.Schedule(steps=10, warmup=0, learning_rate=0.5, weight_decay=0.1))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = update(transformation, zero, params)
    assert jax.tree.map(lambda x: round(float(x.min()), 6), updates) == {
        "blocks": {"ffn": {"kernel": -0.05, "bias": 0.0}, "modulation": 0.0},
        "norm": {"scale": 0.0},
        "token_embed": {"embedding": -0.05},
    }


def test_the_average_follows_its_recurrence():
    schedule = dataclasses.replace(SCHEDULE, average_decay=0.3)
    step, state = loop.make_step(TASK, schedule, jax.random.key(0)), loop.start(TASK, schedule, jax.random.key(1))
    expected = np.array(state.params["inner"]["kernel"])
    for number in range(6):
        state, metrics = step(state, batch(number))
        decay = min(0.3, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * np.array(state.params["inner"]["kernel"])
        np.testing.assert_allclose(state.average["inner"]["kernel"], expected, rtol=1e-5)
    assert step._cache_size() == 1 and set(metrics) == {"loss", "grad_norm", "twice", "skipped"}


def test_the_gradient_is_clipped_as_a_whole():
    transformation = loop.optimizer(dataclasses.replace(SCHEDULE, clip=1.0))
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), jax.eval_shape(init, jax.random.key(0)))
    grads = jax.tree.map(lambda x: np.float32(1e3) * x, params)
    _, state = update(transformation, grads, params)
    norm = optax.tree.norm(state[1][0].mu) / 0.1  # Adam's first moment after one step
    np.testing.assert_allclose(norm, 1.0, rtol=1e-5)
