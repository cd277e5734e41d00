"""Who may import whom, read from the source; and the map of rooms in docs/architecture.md, section 3."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rooms, or files where those of one room stand on different levels; the longest name that fits decides.
LEVELS = [
    {"__version__", "types", "errors", "precision", "config", "lazy", "program", "runtime"},
    {"kernels", "diffusion", "weights", "media"},
    {"sharding"},
    {"models"},
    {"models.*.family"},
    {"pipeline", "streaming", "training"},
    {"models.*.rollout", "models.*.objective", "models.*.runs", "models.*.trainings"}
    | {"models.wan.flow_matching", "models.wan.teacher_forcing", "models.wan.reconstruction"},
    {"plan", "convert"},
    {"commands", "data", "digits", "doctor", "sample", "stream", "train", "windows", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FILES = sorted(p for p in (ROOT / "jvdiff").rglob("*.py") if p != ROOT / "jvdiff" / "__init__.py")


def level_of(name):
    """The level of a dotted name below jvdiff, None where no room has it; a room's own command line is on top."""
    parts = name.split(".")
    if parts[-1] == "__main__":
        return LEVEL["__main__"]
    for count in range(len(parts), 0, -1):
        for room, level in LEVEL.items():
            pattern = room.split(".")
            if len(pattern) == count and all(a in ("*", b) for a, b in zip(pattern, parts, strict=False)):
                return level
    return None


def imports(path):
    """Every dotted module or name that a file imports, wherever in it; TYPE_CHECKING blocks count too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level and path.is_relative_to(ROOT / "convert"):
                continue  # installed as jvdiff.convert too
            assert node.level == 0, f"{path}: relative imports hide the room; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_imports_from_a_higher_level(path):
    own = ".".join(path.relative_to(ROOT / "jvdiff").with_suffix("").parts)
    level = level_of(own)
    assert level is not None, f"{own} is in a new room; give it a level here and in docs/architecture.md"
    for name in imports(path):
        room = name.removeprefix("jvdiff.")
        if name.startswith("jvdiff."):
            assert level_of(room) is not None, f"{path} imports {name}; import from the room itself"
            assert level_of(room) <= level, f"{path} (level {level}) imports {name} ({level_of(room)})"
        if name.split(".")[0] == "flax":
            assert own.startswith("models."), f"{path}: flax is only for models/"
        assert name.split(".")[0] != "convert", f"{path}: that is jvdiff.convert where it is installed"


def rooms():
    """The map of rooms: [path below jvdiff, level, names of the files in brackets or None], in order."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = text.split("\n    jvdiff/\n", 1)[1].split("\n\n", 1)[0]
    found, room = [], ""
    for line in drawn.splitlines():
        if entry := re.match(r" {6}(  )?([\w.]+/?) +L(\d|-)  \S", line):
            inner, name, level = entry.groups()
            room = room if inner else name
            found.append([room + name if inner else name, level, None])
        elif files := re.fullmatch(r" {20,}\[([\w ]+)\]", line):
            found[-1][2] = files[1].split()
        else:
            raise AssertionError(f"docs/architecture.md: {line!r} is neither a room nor files in brackets")
    return found


def on_disk(folder):
    """What belongs to a folder of the package, by name: files of Python, and folders that hold some, with a slash."""
    inside = [path for path in folder.iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))]
    return {f"{path.name}/" if path.is_dir() else path.name for path in inside}


def test_the_map_shows_every_room_and_no_other():
    shown = [path for path, _, _ in rooms()]
    assert len(shown) == len(set(shown)) and not [path for path in shown if not (ROOT / "jvdiff" / path).exists()]
    assert {path for path in shown if "/" not in path[:-1]} == on_disk(ROOT / "jvdiff") | {"py.typed"}
    inner = {path.removeprefix("models/") for path in shown if path.startswith("models/") and path != "models/"}
    assert inner == on_disk(ROOT / "jvdiff" / "models") - {"__init__.py"}


def test_the_map_shows_the_files_of_a_room():
    for path, _, files in rooms():
        if files is not None:
            there = {name.removesuffix(".py") for name in on_disk(ROOT / "jvdiff" / path)} - {"__init__", "__main__"}
            assert set(files) == {name for name in there if name[-1] != "/"}, path


def test_the_map_shows_the_levels():
    for path, level, _ in rooms():
        if level != "-":
            name = path.removesuffix("/").removesuffix(".py").replace("/", ".")
            assert level_of(name) == int(level), f"{path} is drawn on level {level}, and stands on {level_of(name)}"


@pytest.mark.parametrize("folder", ["jvdiff", "convert", "configs"])
def test_nothing_that_runs_imports_torch_or_diffusers(folder):
    for path in (ROOT / folder).rglob("*.py"):
        found = {name.split(".")[0] for name in imports(path)} & {"torch", "diffusers", "torchvision"}
        assert not found, f"{path} imports {found}"


def test_a_room_gives_its_files():
    """After `import jvdiff` alone; what has been imported already is an attribute, and not asked for."""
    for path in FILES:
        package, name = ".".join(path.relative_to(ROOT).parts[:-1]), path.stem
        room = importlib.import_module(package)
        if "." in package and name[0] != "_" and hasattr(room, "__getattr__"):
            assert room.__getattr__(name) is sys.modules[f"{package}.{name}"]


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
