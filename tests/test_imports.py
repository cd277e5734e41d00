"""Who may import whom (docs/architecture.md, section 3), read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = [
    {"types", "errors", "precision", "progress", "interrupts", "staging", "distributed"},
    {"kernels"},
    {"sharding"},
    {"models"},
    {"diffusion"},
    {"data", "checkpoint", "repository", "run_state", "settings", "pipeline", "training"}
    | {"streaming", "stream_config", "stream_programs", "streaming_video", "class_conditional"},
    {
        "sample",
        "sample_classes",
        "train_plan",
        "jobs",
        "one_video",
        "stream",
        "one_stream",
        "train",
        "plan",
        "command_line",
        "__main__",
    },
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FILES = sorted(p for p in (ROOT / "jvdiff").rglob("*.py") if p != ROOT / "jvdiff" / "__init__.py")


def imports(path):
    """Every dotted module or name that a file imports, wherever in it; TYPE_CHECKING blocks count too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path):
    """The first part of its path below jvdiff/; a room's own command line is a room apart."""
    parts = path.relative_to(ROOT / "jvdiff").with_suffix("").parts
    return parts[-1] if parts[-1] == "__main__" else parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_imports_from_a_higher_level(path):
    room = room_of(path)
    assert room in LEVEL, f"{room} is a new room; give it a level here and in docs/architecture.md"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "jvdiff" and len(parts) > 1:
            assert parts[1] in LEVEL, f"{path} imports {name}; import from the room itself"
            assert LEVEL[parts[1]] <= LEVEL[room], f"{path} (level {LEVEL[room]}) imports {name} ({LEVEL[parts[1]]})"
        if room == "diffusion":
            assert not name.startswith("jvdiff.models"), f"{path}: diffusion knows no model"
        if parts[0] == "flax":
            assert room == "models", f"{path}: flax is only for models/"
        if parts[0] == "convert":
            known = ("checkpoint", "repository", "class_conditional", "train", "training")
            assert room in known, f"{path}: {room} does not know convert"


@pytest.mark.parametrize("folder", ["jvdiff", "convert", "configs"])
def test_nothing_that_runs_imports_torch_or_diffusers(folder):
    for path in (ROOT / folder).rglob("*.py"):
        found = {name.split(".")[0] for name in imports(path)} & {"torch", "diffusers", "torchvision"}
        assert not found, f"{path} imports {found}"


def test_importing_jvdiff_is_quick_and_lists_the_product():
    code = (
        "import sys, jvdiff\n"
        "heavy = {'jax', 'flax', 'numpy', 'transformers', 'orbax'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(jvdiff.__all__) <= set(dir(jvdiff))\n"
        "for name in jvdiff.__all__: getattr(jvdiff, name)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert callable(jvdiff.load) and callable(jvdiff.generate)\n"
        "try: jvdiff.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
