"""Wrong folders, known by sight: what stands where a repository was expected, and what to do. Without JAX."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from jvdiff.errors import CheckpointError, JvdiffError, UnsafeFormat, UsageError
from jvdiff.weights.hub import unfinished
from jvdiff.weights.safetensors import readable

INDEX = "model_index.json"
_PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".pkl", ".pickle")


def check(path: Path, families: Sequence[str] = ()) -> None:
    """Raises UsageError where there is nothing, and `misread` where there is something else than a repository."""
    if not path.exists():
        raise UsageError(f"{path}: no such folder.\nExpected a Diffusers repository or a converted one.")
    if not os.path.lexists(path / INDEX):
        raise misread(path, families)


def inside(folder: Path, part: str) -> str:
    """A sentence, where a part was asked for and the folder is what holds it; else empty."""
    there = folder / part
    return f" The {part} in it is {there}; give that." if (there / "config.json").is_file() else ""


def misread(path: Path, families: Sequence[str] = ()) -> JvdiffError:
    """What a folder without model_index.json, or a file, is; an error to raise.

    families: packages whose settings.py may have a function `foreign`: (path, names in it) -> a sentence about a layout
        of the family's own authors, or None.
    """
    if path.is_file():
        return _a_file(path)
    with readable(path):
        names = sorted(entry.name for entry in path.iterdir())
    own = [importlib.import_module(f"{package}.settings") for package in families]
    looks = [module.foreign for module in own if hasattr(module, "foreign")]
    for look in (*_INSIDE, *looks, *_LOOKS):
        if (sentence := look(path, names)) is not None:
            return CheckpointError(f"{path}: {sentence}{unfinished(path)}")
    found = ", ".join(map(repr, names[:8])) or "an empty folder"
    return CheckpointError(
        f"{path}: no {INDEX} in it; expected the folder of a Diffusers repository, or of a converted one.\n"
        f"Found: {found:.300}.{unfinished(path)}"
    )


def _a_file(path: Path) -> JvdiffError:
    if path.name == INDEX:
        return CheckpointError(f"{path}: a file of a repository. Give its folder, {path.parent}.")
    if root := _above(path):
        return CheckpointError(f"{path}: one file of the repository {root}. Give that folder.")
    if path.suffix in (".safetensors", ".gguf"):
        kind = "GGUF, which jvdiff does not read" if path.suffix == ".gguf" else "all in one, as ComfyUI takes them"
        return CheckpointError(
            f"{path}: a single file of weights ({kind}).\n"
            f"Expected the folder of a Diffusers repository, the one that holds {INDEX}:\n"
            "the same model is usually published as OWNER/NAME-Diffusers (hf download OWNER/NAME-Diffusers)."
        )
    return UnsafeFormat(
        f"{path}: a single file; files such as .pth or .ckpt can run code and are not opened.\n"
        f"Give the folder of a Diffusers repository, the one that holds {INDEX}."
    )


def _above(path: Path) -> Path | None:
    """The repository in which a file or folder lies, up to three folders above it."""
    return next((p for p in list(path.absolute().parents)[:3] if (p / INDEX).is_file()), None)


def _run_folder(path: Path, names: Sequence[str]) -> str | None:
    if (path / "repository" / INDEX).is_file():
        return f"the folder of a training. The model that it made is {path / 'repository'}; give that."
    if "state" not in names or not {"metrics.jsonl", "config.json"} & {*names}:
        return None
    if (path / "vae" / "config.json").is_file():
        return f"the folder of a training that made one part, {path / 'vae'}, and not a repository."
    return (
        "the folder of a training that has made no repository yet.\n"
        "Run the same `jvdiff train` again: it goes on, and writes one at the end."
    )


def _state(path: Path, names: Sequence[str]) -> str | None:
    return "a saved state. Give it to --resume." if path.resolve().suffix == ".state" else None


def _too_deep(path: Path, names: Sequence[str]) -> str | None:
    root = _above(path)
    return root and f"a part of the repository {root}. Give that folder."


def _too_high(path: Path, names: Sequence[str]) -> str | None:
    there = sorted(file.parent for pattern in (f"*/{INDEX}", f"*/*/{INDEX}") for file in path.glob(pattern))
    if len(there) == 1:
        return f"one folder too high: the repository is {there[0]}. Give that folder."
    if there:
        return f"holds {len(there)} repositories: {', '.join(map(str, there[:4]))}. Give one of them."
    return None


def _cache(path: Path, names: Sequence[str]) -> str | None:
    every = [name.removeprefix("models--").replace("--", "/", 1) for name in names if name.startswith("models--")]
    return f"a cache of the hub. Name what is in it: {', '.join(every[:4])}." if every else None


def _component(path: Path, names: Sequence[str]) -> str | None:
    if "params" in names or {"_METADATA", "manifest.ocdbt"} & {*names}:
        return (
            "one part alone, as a conversion or a training writes it, and not a repository.\n"
            f"Give the folder that holds all parts and {INDEX}."
        )
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return f"one part of a repository alone. Give the folder that holds all parts and {INDEX}."
    if "adapter_config.json" in names or any("lora" in name and name.endswith(".safetensors") for name in names):
        return "a LoRA, and jvdiff has none yet. Give the folder of a whole Diffusers repository."
    return None


def _incomplete(path: Path, names: Sequence[str]) -> str | None:
    parts = [name for name in names if (path / name / "config.json").is_file()]
    if len(parts) < 2:
        return None
    return (
        f"no {INDEX} in it, beside {', '.join(parts)}: a copy or a download was not finished.\n"
        "Copy or download it again, whole."
    )


def _single_files(path: Path, names: Sequence[str]) -> str | None:
    below = [p for p in (*path.glob("*.safetensors"), *path.glob("*/*.safetensors"), *path.glob("*/*/*.safetensors"))]
    if below and not any((p.parent / "config.json").is_file() for p in below):
        return (
            f"single files of weights ({below[0].name}), as ComfyUI takes them.\n"
            "Expected the folder of a Diffusers repository; that of the same model is usually OWNER/NAME-Diffusers."
        )
    if any(Path(name).suffix in _PICKLES for name in names):
        return (
            "files of pickles, which can run code and are not opened.\n"
            "Use the safetensors version of it, usually published as OWNER/NAME-Diffusers."
        )
    return None


_Look = Callable[[Path, Sequence[str]], str | None]
_INSIDE: tuple[_Look, ...] = (_run_folder, _state, _too_deep)
_LOOKS: tuple[_Look, ...] = (_incomplete, _cache, _too_high, _component, _single_files)
