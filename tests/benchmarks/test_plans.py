"""The table of what published models take says what the file of results says."""

import importlib
import json
from pathlib import Path

import pytest

from jvdiff import config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plans(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return importlib.import_module("plans")


def test_the_table_in_the_docs_is_that_of_the_file(plans):
    rows = json.loads((ROOT / "benchmarks" / "results" / "plans_h200.json").read_text())["rows"]
    assert "\n".join([plans.HEAD, *map(plans.line, rows)]) in (ROOT / "docs" / "models.md").read_text()
    assert {row["name"] for row in rows} == {row.name for row in plans.PLANS}


def test_every_row_is_of_a_configuration_that_takes_its_changes(plans):
    for row in plans.PLANS:
        fields = config.load(row.config)
        assert {*row.changes} <= {*fields.keys()}, row.name
