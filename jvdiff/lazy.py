"""Packages that import a name when it is first used, so that a help page needs no JAX."""

import importlib
import importlib.util
from collections.abc import Callable, Collection
from typing import Any


def attach(package: str, names: Collection[str], files: tuple[str, ...] = ()) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        names: what it gives: files of the package, and names that are defined in them. A room gives all its files.
        files: where names are looked for, in this order; those that need no JAX come first.
    """

    def get(name: str) -> Any:
        room = "." in package and not name.startswith("_")
        if (room or name in names) and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        modules = (importlib.import_module(f"{package}.{file}") for file in files)
        return next(getattr(module, name) for module in modules if hasattr(module, name))

    return get
