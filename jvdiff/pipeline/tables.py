"""Which model a component folder holds, and the table that goes with it, decided by its config.json.

One thing published files do not say there: whether a Wan transformer has the gate of video sparse attention. Where the
configuration is silent, its tensors decide.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jvdiff.errors import CheckpointError, UnsafeFormat
from jvdiff.models import wan
from jvdiff.models.text import umt5
from jvdiff.models.text import umt5_names as umt5_table
from jvdiff.models.wan import names as wan_names
from jvdiff.types import Params
from jvdiff.weights.naming import Rule
from jvdiff.weights.safetensors import read_json, tensor_names


class Component(NamedTuple):
    """A model with its configuration: `abstract(dtype)` is its parameter tree without data."""

    cfg: Any
    rules: list[Rule]
    abstract: Callable[..., Params]


def component(cfg: Any) -> Component:
    """The table and the parameter tree of a configuration."""
    if isinstance(cfg, umt5.Config):
        return Component(cfg, umt5_table.RULES, lambda dtype: umt5.abstract_params(cfg, dtype))
    rules = wan_names.vae(cfg) if isinstance(cfg, wan.VAEConfig) else wan_names.transformer(cfg)
    return Component(cfg, rules, lambda dtype: wan.abstract_params(cfg, dtype))


def read_component(folder: Path) -> Component:
    """Reads `folder/config.json`, and the names of its tensors, and says what the folder holds.

    Raises:
        CheckpointError: no config.json, or a model that jvdiff does not have, or a field out of range.
        UnsafeFormat: the configuration asks for code of its own.
    """
    config = read_json(folder / "config.json")
    if "auto_map" in config:
        raise UnsafeFormat(f"{folder / 'config.json'}: remote code is not supported (auto_map).")
    name = config.get("_class_name") or config.get("model_type") or config.get("architectures")
    classes = {
        "WanTransformer3DModel": wan.DiTConfig,
        "CausalWanTransformer3DModel": wan.DiTConfig,
        "AutoencoderKLWan": wan.VAEConfig,
        "umt5": umt5.Config,
    }
    if not isinstance(name, str) or name not in classes:
        raise CheckpointError(
            f"{folder / 'config.json'}: describes {str(name)!r:.80}, which jvdiff does not have.\n"
            f"Expected _class_name or model_type to be one of {', '.join(classes)}."
        )
    if classes[name] is wan.DiTConfig and "gate_compress" not in config:
        config |= {"gate_compress": f"{wan_names.GATE.format(layer=0)}.weight" in tensor_names(folder)}
    return component(classes[name].from_json(config))
