"""Two laws, read from the source: a family's name stands in its own folder alone, and what computes is silent."""

import ast
import re
from pathlib import Path

import pytest

from jvdiff.models import FAMILIES

ROOT = Path(__file__).parents[1] / "jvdiff"
FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.relative_to(ROOT).parts[0] != "convert"]
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
# Files that talk to a terminal; the doors of the commands lie at the top, those of rooms are their __main__.
TALK = ("commands/", "runtime/progress.py", "runtime/verdict.py", "runtime/interrupts.py")
TALK += ("plan/report.py", "plan/training.py", "plan/targets.py")  # `show`; and what hands a terminal to another process


def names_a_family(line):
    """Whether a line has the name of a family as a word in any case; `_` and `-` end a word, digits do not begin one."""
    words = {part for name in FAMILIES for part in (name, name.replace("_", " "))}
    return any(re.search(rf"(?<![a-z0-9]){word}(?![a-z])", line, re.IGNORECASE) for word in words)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("Wan's grid", True),
        ("Wan-AI/Wan2.1-T2V", True),
        ("from jvdiff.models.wan import dit", True),
        ("SELF_FORCING_WAN_2_1", True),
        ("a Latent video model", True),
        ("latent_video.denoise", True),
        ("is wanted, and wanders; Taiwan", False),
        ("latent frames of a video", False),
    ],
)
def test_what_names_a_family(line, found):
    assert names_a_family(line) == found


def test_a_family_is_named_in_its_own_folder_and_in_one_line():
    said = {}
    for path, name in zip(FILES, NAMES, strict=True):
        if name.startswith((*(f"models/{family}/" for family in FAMILIES), "digits/")):
            continue
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if names_a_family(line)]
        if lines:
            said[name] = lines
    assert said == {"models/__init__.py": [f"FAMILIES = {FAMILIES!r}".replace("'", '"')]}


@pytest.mark.parametrize("name", NAMES)
def test_what_computes_never_talks_to_a_terminal(name):
    if "/" not in name or name.endswith("__main__.py") or name.startswith(TALK):
        return
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "input")
        stream = isinstance(node, ast.Attribute) and ast.unparse(node) in (
            *(f"sys.{stream}" for stream in ("stdout", "stderr", "__stdout__", "__stderr__", "stdin")),
        )
        assert not call and not stream, f"{name} line {node.lineno}: {ast.unparse(node):.80}"
