"""The notebooks run from the first cell to the last, on a tiny random repository, and are committed without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))


def read(name):
    return nbformat.read(NOTEBOOKS / name, as_version=4)


def test_there_are_notebooks():
    assert "text_to_video.ipynb" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_no_outputs_are_committed(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert not [c for c in notebook.cells if c.cell_type == "code" and (c.outputs or c.execution_count)]


def test_text_to_video(tiny_repository, monkeypatch):
    notebook = read("text_to_video.ipynb")
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert 'checkpoint = "../checkpoints/digits"' in parameters.source
    parameters.source += f"\ncheckpoint = {str(tiny_repository)!r}"
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}}).execute()
    shown = [kind for cell in notebook.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())]
    assert shown.count("image/png") >= 4  # text rows, noise levels, steps, contact sheet
    assert "text/html" in shown  # the clip that plays
