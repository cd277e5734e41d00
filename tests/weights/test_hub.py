"""What a checkpoint's name means: a folder, a shipped checkpoint, a repository of the hub; no network (F22, F64)."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from jvdiff.errors import CheckpointError, UsageError
from jvdiff.weights import locate

ROOT = Path(__file__).parents[2]
COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, and an empty cache of the hub that is never filled from outside."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "here"


def fill(cache, refs):
    """A repository owner/name in a cache: the snapshots that branches and tags point to."""
    folder = cache / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    for ref, commit in refs.items():
        (folder / "refs" / ref).write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "model_index.json").write_text("{}")
    return folder / "snapshots"


def test_a_folder_goes_first(here):
    for name in ("owner/name", "digits", "checkpoints/digits"):
        (here / name).mkdir(parents=True)
        assert locate(name) == Path(name)
    assert locate(here / "digits") == here / "digits"


@pytest.mark.parametrize("name", ["digits", "checkpoints/digits", "checkpoints/digits/", Path("checkpoints/digits")])
def test_what_comes_with_jvdiff_is_found_by_name_anywhere(here, name):
    assert locate(name) == ROOT / "checkpoints" / "digits"


def test_what_comes_with_an_installed_jvdiff(here):
    """A copy of the package alone, with its checkpoints inside; beside it is other people's."""
    (here / "jvdiff" / "checkpoints" / "digits").mkdir(parents=True)
    for folder in (here / "checkpoints" / "strangers", here / "jvdiff" / "checkpoints" / "digits"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model_index.json").write_text("{}")
    (here / "jvdiff" / "weights").mkdir()
    for name in (
        "__init__.py",
        "config.py",
        "errors.py",
        "lazy.py",
        "program.py",
        "weights/__init__.py",
        "weights/hub.py",
    ):
        (here / "jvdiff" / name).write_text((ROOT / "jvdiff" / name).read_text())
    program = (
        "import sys; from jvdiff.weights import locate\n"
        "assert not {'jax', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "print(locate('digits'))\n"
        "try: locate('strangers')\n"
        "except ValueError as error: print(error)\n"
    )
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(here)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    first, *rest = done.stdout.splitlines()
    assert first == str(here / "jvdiff" / "checkpoints" / "digits")
    assert "'strangers': no such folder" in rest[0] and rest[-1].endswith("with jvdiff are: digits.")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("checkpoints/digitz", "did you mean checkpoints/digits?"),
        ("runs/owner", "begins with runs/ is not looked up on the hub"),
        ("mine/modle", "no such folder (did you mean mine/model?)"),
        ("digit", "did you mean digits?"),
        ("hub/models--Wan-AI--Wan2.1", "did you mean Wan-AI/Wan2.1?"),
        ("no/such/folder", "nor is it a repository's name (OWNER/NAME or OWNER/NAME@REVISION)"),
        ("./owner/name", "no such folder"),
        ("/owner/name", "no such folder"),
        ("owner/name@../../x", "no such folder"),
        ("owner/name@", "no such folder"),
        ("owner/na me", "no such folder"),
        ("", "no such folder"),
        ("x" * 5000, "no such folder"),
        ("a\0\n", "no such folder"),
    ],
)
def test_a_typing_error_is_never_a_repository(here, name, words):
    (here / "mine" / "model").mkdir(parents=True)
    with pytest.raises(UsageError) as error:
        locate(name, tell=pytest.fail)
    assert words in str(error.value) and len(str(error.value)) < 600
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("download", [True, False])
def test_a_repository_in_the_cache(here, download):
    snapshots, said = fill(here.parent / "cache", {"main": COMMIT, "v1": OTHER}), []
    for name, commit in {"owner/name": COMMIT, "owner/name@v1": OTHER, f"owner/name@{OTHER}": OTHER}.items():
        assert locate(name, download=download, tell=said.append) == snapshots / commit
    assert len(said) == 3 * download and "owner/name" in "".join(said[:1] or ["owner/name"])


@pytest.mark.parametrize(("download", "why"), [(True, ", and not downloaded ("), (False, ".")])
def test_a_repository_that_is_not_in_the_cache(here, monkeypatch, download, why):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fill(here.parent / "cache", {"main": COMMIT})
    for name, command in {"owner/name@v2": "owner/name --revision v2", "owner/other": "owner/other"}.items():
        with pytest.raises(CheckpointError) as error:
            locate(name, download=download)
        text = str(error.value)
        assert text.startswith(f"{name.partition('@')[0]}: not in the local cache{why}")
        assert text.endswith(f"run: hf download {command}") and "hf_secret" not in text


FILES = {
    "model_index.json": b"{}",
    "README.md": b"hello",
    "transformer_2/config.json": b"{}",
    "transformer_2/diffusion_pytorch_model-00001-of-00002.safetensors": b"weights",
    "image_encoder/model.safetensors": b"more weights",
    "tokenizer/spiece.model": b"pieces",
}
LEFT = ("all_in_one.safetensors", "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin", "a/clip.mp4")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as one repository takes; remembers what was asked for."""

    asked: tuple[str, ...] = ()

    def do_GET(self):
        Hub.asked += (self.path.partition("?")[0],)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{abs(hash(self.path))}"'}
        if self.path.startswith("/api/models/owner/name/revision/"):
            body = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode()
        elif self.path.startswith("/api/models/owner/name/tree/"):
            sizes = {name: len(data) for name, data in FILES.items()} | dict.fromkeys(LEFT, 1)
            tree = [{"type": "file", "path": name, "size": n, "oid": name} for name, n in sizes.items()]
            body = json.dumps(tree).encode()
        else:
            body = FILES[self.path.partition(f"/resolve/{COMMIT}/")[2]]
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


def test_a_download_and_then_no_network(here):
    """What is needed comes, and nothing else; without a connection what has come is taken."""
    with http.server.ThreadingHTTPServer(("localhost", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "HF_HUB_CACHE": str(here.parent / "cache"),
            "HF_ENDPOINT": f"http://localhost:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "localhost",
        }

        def run():
            program = "from jvdiff.weights import locate; print(locate('owner/name', tell=print))"
            command = [sys.executable, "-c", program]
            return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=here)

        online = run()
        server.shutdown()
    assert online.returncode == 0, online.stderr
    said, folder = online.stdout.splitlines()
    assert said.startswith("owner/name: ") and Path(folder).name == COMMIT
    there = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    assert there == FILES
    assert sum("/revision/" in path for path in Hub.asked) == 1  # a branch is resolved once
    offline = run()
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout == online.stdout
