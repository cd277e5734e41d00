"""Two processes of four devices: the clip of one process; and how all of them end, whatever happens to one.

Most of it happens to a small program whose steps are sums over all devices (`PROGRAM`), the rest to a tiny model.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import jvdiff
from jvdiff.commands import sample, train
from jvdiff.errors import UsageError
from jvdiff.runtime import peers, run_state, verdict
from jvdiff.sharding import read_mesh
from tests.forks import Process

ROOT = Path(__file__).parents[2]
STEM = "a-red-seven-moving-left_seed3"
PROMPT = "a red seven moving left"
PROGRAM = """
import sys, time, os, signal, contextlib
from pathlib import Path
import jax, numpy as np
from ml_collections import config_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jvdiff.commands import command_line
from jvdiff.runtime import peers
from jvdiff.runtime.files import claim
from jvdiff.errors import UsageError

def work(request):
    rank, unlucky = jax.process_index(), jax.process_index() == int(sys.argv[2])
    mesh = Mesh(np.array(jax.devices()), ("data",))
    put = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    ones = jax.make_array_from_callback((8,), put("data"), lambda i: np.ones(8, np.float32)[i])
    total = jax.jit(lambda x: x.sum(), out_shardings=put())
    assert peers.gather(rank) == [0, 1]
    with claim(request.config.folder, "clip") if rank == 0 else contextlib.nullcontext() as base:
        for step in range(200):
            assert float(total(ones)) == 8
            if step == 3:
                match sys.argv[1]:
                    case "done": break
                    case "bug" if unlucky: raise KeyError("x")
                    case "disagree": peers.agree("colour", "red" if unlucky else "blue")
                    case "raise" if unlucky: raise UsageError("not so.")
                    case "kill" if unlucky: os.kill(os.getpid(), signal.SIGKILL)
                    case "silent" if unlucky: os.kill(os.getpid(), signal.SIGSTOP)
        if rank == 0:
            Path(f"{base}.json").write_text("done")
    return [Path("made")]

config = config_dict.ConfigDict({"folder": sys.argv[3], **peers.fields()})
for word in sys.argv[5:]:
    name, value = word.removeprefix("--config.").split("=")
    kind = {"distributed": bool, "coordinator_address": str, "distributed_timeout": float}.get(name, int)
    config[name] = kind(value)
Path(f"{sys.argv[3]}.{config.process_id}.ready").touch()  # how long imports take decides nothing
while len(list(Path(sys.argv[3]).parent.glob("*.ready"))) < int(sys.argv[4]):
    time.sleep(0.05)
request = command_line.Request(config, {}, "program")
sys.exit(command_line.main([], lambda argv: request, work, "folder"))
"""


class Team:
    """Processes started together, by rank."""

    def __init__(self, words, count=2, started=(0, 1), timeout=60):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
        self.processes = {}
        for rank in started:
            own = ["distributed=true", f"coordinator_address={address}", f"num_processes={count}"]
            own += [f"process_id={rank}", f"distributed_timeout={timeout}"]
            given = [f"--config.{field}" for field in own]
            self.processes[rank] = Process(*words, *given, environment={"XLA_FLAGS": flags})

    def wait(self, timeout=300):
        """The exit status of each."""
        return [process.wait(timeout) for process in self.processes.values()]

    def end(self):
        for process in self.processes.values():
            process.kill()

    def text(self, rank, stream="err"):
        return getattr(self.processes[rank], stream)

    def wait_for(self, words, seconds=300):
        until = time.monotonic() + seconds
        while words not in self.text(0):
            assert time.monotonic() < until and self.processes[0].poll() is None, self.text(0)
            time.sleep(0.1)


@pytest.fixture
def team():
    """start(words of the command line) -> a Team; what is left of it is ended with the test."""
    teams = []

    def start(words, **more):
        teams.append(Team(words, **more))
        return teams[-1]

    yield start
    for each in teams:
        each.end()


@pytest.fixture
def program(team, tmp_path):
    """start(what happens, to whom) -> a Team that runs PROGRAM; and the folder that it writes to."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "made").mkdir()

    def start(what, unlucky=1, started=(0, 1), **more):
        words = [str(tmp_path / "program.py"), what, str(unlucky), str(tmp_path / "made"), str(len(started))]
        return team(words, started=started, **more)

    return start, tmp_path / "made"


# ---------------------------------------------------------------------------------------------------------- how it ends


def test_all_do_their_part_and_the_first_speaks(program):
    start, made = program
    running = start("done")
    assert running.wait() == [0, 0], running.text(0) + running.text(1)
    assert "made\n" in running.text(0, "out") and "made\n" not in running.text(1, "out")
    assert [path.name for path in made.iterdir()] == ["clip.json"]


@pytest.mark.parametrize(
    "what, unlucky, status, there, elsewhere",
    [
        ("raise", 0, 2, "error: not so.", "error: process 0 (.*) failed: not so."),
        ("disagree", 1, 2, "colour: process 1 has 'red', process 0 'blue'", "colour: process 1 has 'red'"),
        ("bug", 1, 1, "error: KeyError: 'x'", "error: process 1 (.*) failed: KeyError"),
    ],
)
def test_the_error_of_one_ends_all_with_its_status_and_a_sentence(program, what, unlucky, status, there, elsewhere):
    start, made = program
    running = start(what, unlucky)
    assert running.wait() == [status, status], running.text(0) + running.text(1)
    assert there in running.text(unlucky) and re.search(elsewhere, running.text(1 - unlucky)), running.text(1 - unlucky)
    assert "Traceback" not in running.text(0) + running.text(1)
    assert not [path for path in made.iterdir() if not path.name.startswith("jvdiff-error")]


def test_the_others_survive_process_0_long_enough_to_say_so_and_to_tidy_up_for_it(program):
    start, made = program
    running = start("kill", 0)
    assert running.wait() == [-signal.SIGKILL, 7], running.text(1)
    last = running.text(1).splitlines()[-1]
    assert last.startswith("error: process 0 (") and last.endswith("ended without a word.")
    assert list(made.iterdir()) == []


def test_a_silent_process_counts_as_dead_after_the_time_out(program):
    start, made = program
    running = start("silent", timeout=4)
    assert running.processes[0].wait(300) == 7
    assert "error: process 1 (" in running.text(0) and "has been silent for 4 s." in running.text(0)
    assert list(made.iterdir()) == []
    running.processes[1].kill()
    running.wait()


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_in_vain_says_so(program, rank):
    start, _ = program
    running = start("done", started=[rank], timeout=3)
    assert running.wait() == [7]
    assert f"error: process {rank} waited 3 s, but not all of 2 processes came" in running.text(rank)


def test_who_comes_after_the_verdict_hears_it():
    hub = verdict.Hub(2, 5.0)
    port, token = hub.place.split()

    def connected(rank, *messages):
        lines = [{"token": token, "rank": rank, "name": f"process {rank}"}, *messages]
        with socket.create_connection(("localhost", int(port)), 5) as connection:
            connection.sendall(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            return json.loads(connection.makefile("rb").readline())

    for rank, messages in (0, [{"end": [3, "no weights."]}]), (1, []):
        assert connected(rank, *messages) == {"verdict": [3, "process 0 failed: no weights."]}
    hub.shutdown()
    hub.server_close()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_processes": 2}, "num_processes: only with --distributed=true"),
        ({"distributed": True, "distributed_timeout": 0.0}, "distributed_timeout is 0; expected 1"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields, message):
    config = sample.default_config()
    config.update(fields)
    with pytest.raises(UsageError, match=re.escape(message)):
        peers.join(config)
    assert not peers.several() and peers.writes() and peers.gather(3) == [3]


def test_without_a_cluster_addresses_are_asked_for():
    """In a process of its own: JAX joins others only before it is used."""
    code = """
from jvdiff.commands import sample
from jvdiff.errors import UsageError
from jvdiff.runtime import peers
config = sample.default_config()
config.distributed = True
try:
    peers.join(config)
except UsageError as error:
    print(error)
"""
    process = Process("-c", code)
    assert process.wait() == 0, process.err
    assert "give --coordinator_address=HOST:PORT" in process.out


# ------------------------------------------------------------------------------------------------------------ sampling


@pytest.fixture
def sampling(team, tmp_path):
    """start(repository, fields) -> a Team that samples on all its devices; and the folder of its clips."""
    config = tmp_path / "config.py"
    config.write_text("from jvdiff.commands import sample\nget_config = sample.default_config\n")
    common = {"prompt": PROMPT, "seed": 3, "height": 64, "width": 64, "mesh": "sequence=8"}
    common |= {"output": tmp_path / "clips", "save_arrays": "true"}

    def start(repository, **given):
        fields = [f"--config.{name}={value}" for name, value in (common | {"checkpoint": repository} | given).items()]
        return team(["-m", "jvdiff.sample", f"--config={config}", *fields])

    return start, tmp_path / "clips"


def test_two_processes_make_the_clip_of_one(sampling, tiny_repository):
    start, clips = sampling
    running = start(tiny_repository, num_frames=1, steps=2)
    pipe = jvdiff.load(tiny_repository, mesh="sequence=8")
    same = jvdiff.generate(pipe, PROMPT, seed=3, num_frames=1, height=64, width=64, steps=2)
    assert running.wait() == [0, 0], running.text(0) + running.text(1)
    assert sorted(path.name for path in clips.iterdir()) == [f"{STEM}.{kind}" for kind in ("json", "mp4", "npz", "png")]
    with np.load(clips / f"{STEM}.npz") as made:
        np.testing.assert_array_equal(made["latents"], same.latents[0])
        np.testing.assert_array_equal(made["video"], same.video[0])
    assert running.text(1) == ""
    assert f"{STEM}.mp4" in running.text(0, "out") and STEM not in running.text(1, "out")


def test_a_signal_to_one_stops_all_and_the_first_saves(sampling, tiny_repository):
    start, clips = sampling
    running = start(tiny_repository, num_frames=1, steps=500)
    running.wait_for("denoise  ")
    running.processes[1].send_signal(signal.SIGTERM)
    assert running.wait() == [5, 5], running.text(0) + running.text(1)
    assert [path.name for path in clips.iterdir()] == [f"{STEM}.state"]
    assert f"--config.resume={clips / STEM}.state" in running.text(0)


def test_a_killed_process_leaves_no_half_written_file(sampling, tiny_repository):
    start, clips = sampling
    running = start(tiny_repository, num_frames=1, steps=500)
    running.wait_for("denoise  ")
    assert [path.name for path in clips.iterdir()] == [f".{STEM}.claim"]
    running.processes[1].kill()
    assert running.wait() == [7, -signal.SIGKILL], running.text(0)
    assert "error: process 1 (" in running.text(0) and "Traceback" not in running.text(0)
    states = list(clips.iterdir())  # of the steps that were done, if process 0 was not waiting for the other by then
    assert [run_state.load(state).done > 0 for state in states] in ([], [True])


def test_what_is_wrong_for_all_is_said_before_any_weight_is_read(sampling, tiny_repository):
    start, clips = sampling
    running = start(tiny_repository, mesh="sequence=2")
    assert running.wait() == [2, 2]
    assert "expected one of all 8 devices of 2 processes" in running.text(0) and "loading" not in running.text(0)
    assert list(clips.iterdir()) == []


# ------------------------------------------------------------------------------------------------- docs/clusters.md

BLOCKS = re.findall(r"```(bash|yaml)\n(.*?)```", (ROOT / "docs" / "clusters.md").read_text(), re.DOTALL)


def check_command(words, devices):
    """The program of a command line that its own parser takes, with a mesh of `devices` devices."""
    program = words[words.index("-m") + 1]
    parser = {"jvdiff.sample": sample, "jvdiff.train": train}[program]
    config = parser.parse([program, *words[words.index(program) + 1 :]]).config
    assert config.distributed is True
    assert read_mesh(config.mesh if parser is sample else config.loop.mesh).devices == devices
    return program


def test_the_shell_scripts_of_the_documentation_are_sound(monkeypatch):
    monkeypatch.chdir(ROOT)
    programs = []
    for _, text in (block for block in BLOCKS if block[0] == "bash"):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        if shellcheck := shutil.which("shellcheck"):
            subprocess.run([shellcheck, "--shell=bash", "-"], input=text, text=True, check=True)
        line = next(line for line in text.replace("\\\n", " ").splitlines() if line.startswith(("srun", "mpirun")))
        programs.append((line.split()[0], check_command(shlex.split(line), 16)))
    assert sorted(programs) == [(m, f"jvdiff.{p}") for m in ("mpirun", "srun") for p in ("sample", "train")]


def test_the_job_sets_of_the_documentation_are_sound(monkeypatch):
    monkeypatch.chdir(ROOT)
    yaml = pytest.importorskip("yaml")
    programs = []
    for _, text in (block for block in BLOCKS if block[0] == "yaml"):
        found = yaml.safe_load(text)
        assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        (job,) = found["spec"]["replicatedJobs"]
        spec = job["template"]["spec"]
        assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"] > 1
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        devices = spec["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]
        assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
        programs.append(check_command(container["command"], devices))
    assert programs == ["jvdiff.sample", "jvdiff.train"]
