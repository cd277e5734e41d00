"""A whole text-to-video repository: what it says of itself, and how trained components become one.

In either layout it is a folder with model_index.json, transformer/, vae/, text_encoder/, tokenizer/ and scheduler/;
what differs is how a component holds its weights (`jvdiff.weights`): safetensors files, or the Orbax
directory `params/`.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jvdiff.errors import CheckpointError, UnsafeFormat, UsageError
from jvdiff.models import wan
from jvdiff.models.text import umt5
from jvdiff.pipeline.tables import read_component
from jvdiff.runtime.staging import MANIFEST, staged
from jvdiff.types import Params
from jvdiff.weights import safetensors as reader
from jvdiff.weights.manifest import file_sha256, write_manifest
from jvdiff.weights.orbax import PARAMS, by_process_0, leaves_of, write_params

COMPONENTS = ("transformer", "vae", "text_encoder")
_PIPELINES = {False: "WanPipeline", True: "WanCausalDMDPipeline"}  # DiTConfig.causal: the class in model_index.json
_CAUSAL_SCHEDULERS = ("SelfForcingFlowMatchScheduler", "UniPCMultistepScheduler")


@dataclass(frozen=True)
class Repository:
    """What a repository says of itself; no weights were read.

    `kind` is "hf" or "orbax"; `tokenizer` is a folder; `scheduler` the content of scheduler_config.json. `digest`
    names the weights: of an Orbax directory the sha256 of its manifest, and so of everything; of a Hugging Face
    folder that of all JSON, of weight files up to 64 MiB, and of size and 64 samples of larger ones.
    """

    path: Path
    kind: str
    transformer: wan.DiTConfig
    vae: wan.VAEConfig
    text_encoder: umt5.Config
    scheduler: dict[str, Any]
    tokenizer: Path
    digest: str


def inspect(path: str | Path, causal: bool | None = None) -> Repository:
    """Reads every configuration of a text-to-video repository, in either layout, and checks that they fit together.

    causal: which models the caller can run, True those that make a video chunk by chunk, False those that make it at
    once; None takes both.

    Raises:
        UsageError: there is no such folder, or a repository of the other kind.
        UnsafeFormat: a file of pickles instead of a folder, or a repository that wants its own code run.
        CheckpointError: incomplete, damaged, or a model that jvdiff does not have.
    """
    path = Path(path)
    if path.is_file():
        raise UnsafeFormat(
            f"{path}: a single file; files such as .pth or .ckpt can run code and are not opened.\n"
            "Give the folder of a Diffusers repository, for instance Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    if not path.is_dir():
        raise UsageError(f"{path}: there is no such folder.\nExpected a Diffusers repository or a converted one.")
    pipeline = _check_model_index(path)
    found = {}
    for name, kind in zip(COMPONENTS, (wan.DiTConfig, wan.VAEConfig, umt5.Config), strict=True):
        found[name] = read_component(path / name).cfg
        if not isinstance(found[name], kind):
            raise CheckpointError(f"{path / name}: holds {type(found[name]).__name__}, expected {kind.__name__}.")
    dit, vae, text = (found[name] for name in COMPONENTS)
    if dit.in_channels != vae.z_dim or dit.text_dim != text.d_model:
        raise CheckpointError(
            f"{path}: its components do not fit together: the transformer takes {dit.in_channels} latent channels and "
            f"text of width {dit.text_dim},\nthe VAE gives {vae.z_dim} and the text encoder {text.d_model}.\n"
            "Take all folders from one repository."
        )
    if _PIPELINES[dit.causal] != pipeline:
        raise CheckpointError(
            f"{path}: model_index.json describes a {pipeline}, transformer/config.json a "
            f"{dit.to_json()['_class_name']}; expected {_PIPELINES[dit.causal]} with that.\n"
            "Take all folders from one repository."
        )
    if causal is not None and causal != dit.causal:
        raise UsageError(
            f"{path}: a causal model, which makes a video chunk by chunk; run it with `python -m jvdiff.stream`."
            if dit.causal
            else f"{path}: no causal model, it makes a video at once; run it with `python -m jvdiff.sample`."
        )
    orbax = (path / "transformer" / PARAMS).is_dir()
    return Repository(
        path=path,
        kind="orbax" if orbax else "hf",
        transformer=dit,
        vae=vae,
        text_encoder=text,
        scheduler=reader.read_json(path / "scheduler" / "scheduler_config.json"),
        tokenizer=path / "tokenizer",
        digest=file_sha256(path / MANIFEST) if orbax and (path / MANIFEST).is_file() else _fingerprint(path),
    )


def _check_model_index(path: Path) -> str:
    """The pipeline's class, one that we have, of classes of diffusers and transformers; none is ever imported."""
    index = reader.read_json(path / "model_index.json")
    for name, value in index.items():
        if isinstance(value, list) and (len(value) != 2 or value[0] not in ("diffusers", "transformers", None)):
            raise UnsafeFormat(
                f"{path / 'model_index.json'}: {name} names {str(value)!r:.80}; remote code is not supported.\n"
                "Expected classes of diffusers and transformers only."
            )
    if (pipeline := str(index.get("_class_name"))) not in _PIPELINES.values():
        raise CheckpointError(
            f"{path / 'model_index.json'}: describes a {pipeline!r:.60}; expected 'WanPipeline' (text-to-video) "
            "or 'WanCausalDMDPipeline' (streaming)."
        )
    if (index.get("transformer_2") or [None])[0] is not None:
        raise CheckpointError(
            f"{path}: holds two transformers (Wan 2.2 A14B), which jvdiff does not run yet.\n"
            "Use a Wan 2.1 text-to-video repository."
        )
    return pipeline


def _fingerprint(path: Path) -> str:
    """A digest of a Hugging Face folder that takes the same short time for 20 MB and for 60 GB."""
    total = hashlib.sha256()
    for name in (*COMPONENTS, "scheduler", "tokenizer"):
        for file in sorted(p for p in (path / name).glob("*") if p.is_file()):
            size = file.stat().st_size
            total.update(f"{name}/{file.name}\0{size}\0".encode())
            with open(file, "rb") as data:
                for place in [0] if size <= 2**26 else [i * (size - 2**20) // 63 for i in range(64)]:
                    data.seek(place)
                    total.update(data.read(min(size, 2**26 if size <= 2**26 else 2**20)))
    return total.hexdigest()


def save(
    path: str | Path,
    components: Mapping[str, tuple[Any, Params]],
    *,
    tokenizer: str | Path,
    scheduler: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes trained components as a repository that `inspect` and `restore` read, and `convert.to_hf` exports.

    Args:
        components: for "transformer", "vae" and "text_encoder" the configuration and the parameter tree.
        tokenizer: a folder with the tokenizer's files.
        scheduler: the content of scheduler_config.json, with diffusers' `_class_name`; of a causal transformer, which
            the class names written here make known, SelfForcingFlowMatchScheduler or UniPCMultistepScheduler.
        defaults: the content of jvdiff_defaults.json: size, steps and so on that suit these weights.

    Raises: as `jvdiff.weights.save`, and UsageError where a component is missing or the scheduler does not fit.
    """
    if sorted(components) != sorted(COMPONENTS):
        raise UsageError(f"components are {', '.join(components)}; expected {', '.join(COMPONENTS)}.")
    dit = components["transformer"][0]
    if dit.causal and scheduler["_class_name"] not in _CAUSAL_SCHEDULERS:
        raise UsageError(
            f"scheduler is a {scheduler['_class_name']}; a causal transformer needs one of "
            f"{', '.join(_CAUSAL_SCHEDULERS)}."
        )
    index = {
        "_class_name": _PIPELINES[dit.causal],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", dit.to_json()["_class_name"]],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }

    def write_json(file: Path, content: Mapping[str, Any]) -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    spread: list[jax.Array] = []
    leaves = {name: leaves_of(tree, spread) for name, (_, tree) in components.items()}

    def write() -> None:
        with staged(path, overwrite=overwrite) as staging:
            write_json(staging / "model_index.json", index)
            write_json(staging / "scheduler" / "scheduler_config.json", scheduler)
            if defaults is not None:
                write_json(staging / "jvdiff_defaults.json", defaults)
            shutil.copytree(tokenizer, staging / "tokenizer")
            records: dict[str, Any] = {}
            for name, (cfg, _) in components.items():
                write_json(staging / name / "config.json", cfg.to_json())
                records |= write_params(staging, name, leaves[name])
            write_manifest(staging, records, {})

    by_process_0(write, spread)
