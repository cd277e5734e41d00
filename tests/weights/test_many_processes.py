"""Two processes of four devices each: every one reads its part of the weights, process 0 writes, and a training is the
same as in one process."""

import json
import os
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jvdiff.errors import UsageError
from jvdiff.models.family import read_config
from jvdiff.models.wan.family import TRANSFORMER
from jvdiff.runtime import peers
from jvdiff.sharding import MeshShape, make_mesh
from jvdiff.training import loop
from jvdiff.weights import manifest, orbax, restore, save
from jvdiff.weights.naming import flatten
from tests.forks import Process

ROOT = Path(__file__).parents[2]
SCHEDULE = loop.Schedule(steps=4, learning_rate=1e-3, warmup=0, clip=1e3)
RULES = ((r"up/kernel", P(None, "tensor")), (r"down", P("tensor")))
MESH = MeshShape(data=2, fsdp=2, tensor=2)
WORKER = """
import sys, traceback, warnings
warnings.simplefilter("error")
from ml_collections import ConfigDict
from jvdiff.runtime import peers, verdict
config, (_, address, rank, *folders) = ConfigDict(peers.fields()), sys.argv
config.update(distributed=True, coordinator_address=address, num_processes=2, process_id=int(rank))
peers.join(config)
sys.path.insert(0, "FOLDER")
code, message = 0, ""
try:
    __import__("test_many_processes").work(rank, *folders)
except Exception as error:
    traceback.print_exc()
    code, message = getattr(error, "exit_code", 1), str(error)
sys.exit(verdict.leave(code, message))
""".replace("FOLDER", str(Path(__file__).parent))


def init(key):
    one, two = jax.random.split(key)
    return {"up": {"kernel": jax.random.normal(one, (128, 256))}, "down": jax.random.normal(two, (256, 128))}


def loss(params, batch, key):
    noisy = batch + 0.1 * jax.random.normal(key, batch.shape)
    return jnp.mean((jnp.tanh(noisy @ params["up"]["kernel"]) @ params["down"] - batch) ** 2), {}


def clips(step):
    return np.random.default_rng(step).standard_normal((8, 128), np.float32)


TASK = loop.Task(init, loss, loop.each(clips), RULES)


def divided(tree, mesh):
    """Every leaf along its last dimension that the devices divide."""

    def place(leaf):
        able = [axis for axis, n in enumerate(leaf.shape) if n % mesh.size == 0]
        return NamedSharding(
            mesh, P(*(mesh.axis_names if axis == able[-1] else None for axis in range(leaf.ndim)) if able else ())
        )

    return jax.tree.map(place, tree)


def same_shards(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.sharding == b.sharding
        for mine, theirs in zip(a.addressable_shards, b.addressable_shards, strict=True):
            np.testing.assert_array_equal(mine.data, theirs.data)


def work(rank, repository, folder):
    """What each process does; tells what it read of files, in bytes, as JSON in `folder`."""
    folder, told, read, sha256 = Path(folder), {}, [], manifest.file_sha256
    source = Path(repository) / "transformer"
    cfg = read_config(source, TRANSFORMER)
    wanted, eight = TRANSFORMER.abstract(cfg, jnp.float32), make_mesh(MeshShape(fsdp=8))
    places = divided(wanted, eight)

    with pytest.MonkeyPatch.context() as patch:
        pread = os.preadv
        patch.setattr(os, "preadv", lambda file, views, at: read.append(len(views[0])) or pread(file, views, at))
        params = restore(source, wanted, TRANSFORMER.names(cfg), places)
    held = {(name, str(s.index)): s.data.nbytes for name, x in flatten(params).items() for s in x.addressable_shards}
    told["hf"], told["held"] = sum(read), sum(held.values())

    save(folder / "saved", params, config=cfg.to_json())
    with pytest.MonkeyPatch.context() as patch:
        hashed = []
        patch.setattr(manifest, "file_sha256", lambda file: hashed.append(file.name) or sha256(file))
        same_shards(restore(folder / "saved", wanted, (), places), params)
    told["hashed"] = hashed

    large = {"w": np.random.default_rng(0).standard_normal((1024, 4096), np.float32)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orbax, "_CHUNK", 2**18)
        save(folder / "large", large)
    before = io()
    whole = restore(folder / "large", large, (), NamedSharding(eight, P(None, eight.axis_names)), verify=False)["w"]
    told["orbax"] = (io() - before) / whole.nbytes

    loop.fit(TASK, SCHEDULE, folder / "run", save_every=2, mesh=make_mesh(MESH))
    (folder / f"told_{rank}.json").write_text(json.dumps(told))

    peers.gather("both have told")
    (folder / "saved" / "jvdiff.json").unlink(missing_ok=True)  # so that process 0 refuses to write there
    save(folder / "saved", params, overwrite=True)
    raise AssertionError("it was written")


def io():
    """Bytes that this process has read of files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_two_processes(tiny_repository, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # Compiled as this process is: where a gradient is mere rounding, Adam takes its sign for a step.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    words = ["-c", WORKER, address]
    environment = {"XLA_FLAGS": flags}
    workers = [Process(*words, rank, tiny_repository, tmp_path, environment=environment) for rank in range(2)]
    try:
        codes = [worker.wait(240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, code in zip(workers, codes, strict=True):  # all end as process 0 did, and know why
        assert code == UsageError.exit_code and "is not an Orbax directory of jvdiff" in worker.err, worker.err
    one, two = (json.loads((tmp_path / f"told_{rank}.json").read_text()) for rank in range(2))
    assert one["hf"] == one["held"] and two["hf"] == two["held"]  # no more than the devices hold, and once
    weights = tiny_repository / "transformer" / "diffusion_pytorch_model.safetensors"
    assert one["hf"] < 0.6 * weights.stat().st_size
    files = [p.name for p in (tmp_path / "saved").rglob("*") if p.is_file()]
    assert sorted([*one["hashed"], *two["hashed"]]) == sorted(files) and abs(len(one["hashed"]) - len(files) / 2) <= 1
    assert one["orbax"] < 0.6 and two["orbax"] < 0.6

    # The run of two processes is that of one, and one goes on with what two saved.
    alone = loop.fit(TASK, SCHEDULE, tmp_path / "alone", mesh=make_mesh(MESH))
    there = loop.fit(TASK, SCHEDULE, tmp_path / "run")
    for new, old in zip(jax.tree.leaves(there), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-7)
