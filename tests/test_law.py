"""Two laws, read from the source: a family's name stands in its own folder alone, and what computes is silent."""

import ast
import re
from pathlib import Path

import pytest

from jvdiff.models import FAMILIES

ROOT = Path(__file__).parents[1] / "jvdiff"
FILES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}
# Besides doors (at the top, and the __main__ of a room) only these talk to a terminal.
TALK = (
    "commands/",
    "runtime/rescue.py",  # asks for space
    "runtime/progress.py",  # bars and lines of a run under way
    "runtime/claims.py",  # what is waited for
    "runtime/interrupts.py",  # what Ctrl-C will do
    "runtime/verdict.py",  # the last words of a process that ends at once
    "runtime/children.py",  # a child answers who asked
    "runtime/libcuda.py",  # such a child
    "plan/resources.py",  # flushes before it reads what compilers wrote to the same files
    "plan/targets.py",  # flushes before another process writes to the same terminal
)
STREAMS = ("stdin", "stdout", "stderr", "__stdout__", "__stderr__")


def names_a_family(line):
    """Whether a family's name is in it as a whole word: `_`, `-` and digits behind it end a word, letters do not.

    The name of a configuration may have a family's in it (`--config wan2_1_t2v_14b`): configs/ is free.
    """
    line = re.sub(r"--config[ =]\w+", "", line)
    words = "|".join(name.replace("_", "[_ ]") for name in FAMILIES)
    return re.search(rf"(?<![a-z0-9])({words})(?![a-z])", line, re.IGNORECASE) is not None


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Wan's grid", True),
        ("Wan-AI/Wan2.1-T2V", True),
        ("from jvdiff.models.wan import dit", True),
        ("SELF_FORCING_WAN_2_1 = 1", True),
        ("a Latent video model", True),
        ("latent_video.denoise", True),
        ("jvdiff sample --config wan2_1_t2v_14b --mesh=auto", False),
        ("is wanted, and wanders; Taiwan", False),
        ("latent frames of a video", False),
    ],
)
def test_what_names_a_family(line, expected):
    assert names_a_family(line) == expected


def test_a_family_is_named_in_its_own_folder_and_in_one_line():
    free = (*(f"models/{family}/" for family in FAMILIES), "digits/")
    lines = [(name, line) for name, text in FILES.items() if not name.startswith(free) for line in text.splitlines()]
    named = [(name, line) for name, line in lines if names_a_family(line)]
    assert [name for name, _ in named] == ["models/__init__.py"], named
    assert named[0][1].startswith("FAMILIES = ")


def talks(text):
    """(line, source) of everything in a file that prints, reads what is typed, or touches a standard stream."""
    for node in ast.walk(ast.parse(text)):
        call = isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "input", "pprint", "pprint.pprint")
        stream = isinstance(node, ast.Attribute) and node.attr in STREAMS and ast.unparse(node.value) == "sys"
        imported = (
            isinstance(node, ast.ImportFrom) and node.module == "sys" and {a.name for a in node.names} & {*STREAMS}
        )
        if call or stream or imported:
            yield getattr(node, "lineno", 0), ast.unparse(node)[:80]


def test_what_talks():
    text = 'import sys\nprint(1)\nsys.stderr.write("")\nfrom sys import stdout\n"print(2)"\nfile.print(3)\n'
    assert sorted(line for line, _ in talks(text)) == [2, 3, 4]


def test_what_computes_never_talks_to_a_terminal():
    computes = {
        name: list(talks(text))
        for name, text in FILES.items()
        if "/" in name and not name.endswith("__main__.py") and not name.startswith(TALK)
    }
    assert len(computes) > 80 and {name: found for name, found in computes.items() if found} == {}
    assert all(any(name.startswith(place) for name in FILES) for place in TALK)
