"""The notebooks run from the first cell to the last, on something tiny, and are committed without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))


def read(name):
    return nbformat.read(NOTEBOOKS / name, as_version=4)


def run(name, monkeypatch, **parameters):
    """The executed notebook and the kinds of its outputs, with other values in its cell of parameters."""
    notebook = read(name)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    for field, value in parameters.items():
        assert f"{field} = " in cell.source
        cell.source += f"\n{field} = {value!r}"
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    for strictness in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION"):  # as a reader's JAX is
        monkeypatch.delenv(strictness)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return outputs, [kind for output in outputs for kind in output.get("data", ())]


def test_there_are_notebooks():
    assert NAMES == ["text_to_video.ipynb", "train_a_tiny_model.ipynb"]


@pytest.mark.parametrize("name", NAMES)
def test_no_outputs_are_committed(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert not [c for c in notebook.cells if c.cell_type == "code" and (c.outputs or c.execution_count)]


def test_text_to_video(tiny_repository, monkeypatch):
    _, shown = run("text_to_video.ipynb", monkeypatch, checkpoint=str(tiny_repository))
    assert shown.count("image/png") >= 4  # text rows, noise levels, steps, contact sheet
    assert "text/html" in shown  # the clip that plays


def test_train_a_tiny_model(monkeypatch):
    outputs, shown = run("train_a_tiny_model.ipynb", monkeypatch, steps=4, batch=4, sampling_steps=2)
    assert shown.count("image/png") == 7  # clips, noise, curve, two solvers with two weights
    assert "text/html" in shown  # the clips that play
    assert "largest difference" in outputs[-1].text  # of guidance with weight 1
