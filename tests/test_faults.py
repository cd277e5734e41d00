"""docs/faults.md names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = [line for line in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
NAMED = sorted({name for row in ROWS for name in re.findall(r"[\w/]+::test_\w+", row)})


def test_every_test_that_a_fault_names_is_there():
    absent = []
    for name in NAMED:
        path, function = name.split("::")
        file = ROOT / "tests" / f"{path}.py"
        tree = ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else ast.Module([], [])
        if function not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
            absent.append(name)
    assert len(NAMED) > 80 and not absent, absent


def test_every_test_is_named_with_its_file():
    bare = [row for row in ROWS if re.search(r"(?<!::)\btest_\w+(?!::|\w)", re.sub(r"[\w/]+::test_\w+", "", row))]
    assert not bare, bare
