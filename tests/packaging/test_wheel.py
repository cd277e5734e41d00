"""What pyproject.toml says against what the source says; that the wheel works elsewhere is for `make wheel`."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import jvdiff
from jvdiff import config

ROOT = Path(__file__).parents[2]
FOLDERS = ("jvdiff", "convert", "configs")  # what is installed
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BY_NAME = {"grain", "mlxtend", "tensorboardX", "wandb"}  # those that run time asks for only where they are used


def plain(name):
    """The name of a distribution as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required(*groups):
    """The distributions of some lists of requirements."""
    return {plain(Requirement(line).name) for group in groups for line in group}


def imported():
    """The top-level modules that the installed code imports anywhere, of others than Python and jvdiff."""
    modules = set()
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(str(node.module).split(".")[0])
    return modules - {"jvdiff", "convert"} - set(sys.stdlib_module_names)


def test_run_time_requires_what_it_imports_and_nothing_else():
    of = packages_distributions()
    distributions = {module: {plain(name) for name in of.get(module, [module])} for module in imported()}
    declared, extras = required(PROJECT["dependencies"]), required(*PROJECT["optional-dependencies"].values())
    missing = {module for module, names in distributions.items() if not names & (declared | extras)}
    assert not missing, f"imported, and in no list of pyproject.toml: {missing}"
    optional = {module for module, names in distributions.items() if not names & declared}
    assert optional <= BY_NAME, f"imported, and not among the dependencies: {optional - BY_NAME}"
    idle = declared - {name for names in distributions.values() for name in names}
    assert not idle, f"required, and not imported: {idle}"


def test_the_version_is_told_once():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    text = (ROOT / "jvdiff" / "__init__.py").read_text()
    assert f'__version__ = "{jvdiff.__version__}"\n' in text  # read without importing anything
    assert re.fullmatch(r"\d+\.\d+\.\d+", jvdiff.__version__)


def test_there_are_the_extras_that_the_docs_name():
    assert set(PROJECT["optional-dependencies"]) == {"cuda12", "cuda13", "train", "notebook", "parity", "dev"}


@pytest.mark.parametrize("name", ["convert", "configs", "checkpoints"])
def test_what_lies_beside_the_package_is_part_of_it(name):
    """In this checkout, whatever else is installed: the folder that is imported is this one."""
    assert config.shipped(name) == ROOT / name and str(ROOT) in jvdiff.__path__


def test_configurations_are_found_by_name_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "configs/digits.py", str(ROOT / "configs" / "digits.py")):
        assert config.find(name) == ROOT / "configs" / "digits.py"
    derived, base = config.load("train_digits_sparse"), config.load("train_digits_dit")
    assert derived.transformer.gate_compress and derived.text_encoder == base.text_encoder
    with pytest.raises(
        config.UsageError, match=r"no configuration 'digit' \(did you mean digits\?\); expected a file, or"
    ):
        config.find("digit")
    (tmp_path / "digits").mkdir()  # a folder is no configuration
    assert config.find("digits") == ROOT / "configs" / "digits.py"
