"""What is installed is the package jvdiff alone: the folders beside it become part of it. All else: pyproject.toml."""

from setuptools import find_packages, setup

BESIDE = {f"jvdiff.{name}": name for name in ("convert", "configs", "checkpoints")}

setup(packages=[*find_packages(include=["jvdiff", "jvdiff.*"]), *BESIDE], package_dir={"": ".", **BESIDE})
