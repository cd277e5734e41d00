"""How fast is jvdiff beside diffusers and transformers? Same weights, inputs, machine, threads and process, in turn.

    python benchmarks/compare_diffusers.py                                  # models alone, on the CPU
    python benchmarks/compare_diffusers.py --checkpoint checkpoints/digits  # and the whole clip, and the first frame
    python benchmarks/compare_diffusers.py --device gpu                     # the 1.3B model at 480x832x81, bfloat16

Each row is the median of runs that alternate (ours, theirs, ours, theirs, ...) after one of each that does not count;
what JAX needs to compile is a column of its own. `difference` is the relative L2 distance between the two results, so
that a fast wrong answer shows. `products` is the time of the program's matrix products and convolutions, each compiled
and run by itself, as a share of the time of the whole. Without torch and diffusers (`make parity` installs them) only
our side is timed; with them, --checkpoint needs accelerate too, without which the rival cannot load one. The table goes
to benchmarks/results with the machine that it was measured on.

B batch · T latent frames · H W latent grid · C latent channels · S text tokens · F pixel frames · Y X pixel size.
"""

import argparse
import gc
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from machine import describe
from timing import RESULTS, in_turn, short, write

from jvdiff import models
from jvdiff.errors import JvdiffError, SetupError
from jvdiff.models import wan
from jvdiff.models.family import Part
from jvdiff.models.hunyuan_video import config as hunyuan_config
from jvdiff.models.hunyuan_video import dit as hunyuan_dit
from jvdiff.models.hunyuan_video import vae as hunyuan_vae
from jvdiff.models.hunyuan_video.vae_config import VAEConfig as HunyuanVAEConfig
from jvdiff.models.text import clip_text, llama, umt5
from jvdiff.models.vision import clip
from jvdiff.plan import count_flops, products
from jvdiff.weights.naming import disassemble, flatten, unflatten

PROMPT = "a red seven moving left"
RIVALS = ("torch", "diffusers", "transformers")

# The sizes of configs/train_digits_*.py.
DIGITS_DIT = wan.DiTConfig(
    in_channels=8, out_channels=8, text_dim=64, num_attention_heads=3, attention_head_dim=64, num_layers=6, ffn_dim=768
)
DIGITS_VAE = wan.VAEConfig(
    base_dim=8, dim_mult=(1, 4, 8, 8), num_res_blocks=1, z_dim=8, latents_mean=(0.0,) * 8, latents_std=(1.0,) * 8
)
SMALL_VAE_2_2 = replace(wan.WAN_2_2_VAE, base_dim=8, decoder_base_dim=8, num_res_blocks=1)
DIGITS_TOWER = clip.Config(64, 128, 32, num_hidden_layers=4, num_attention_heads=4, patch_size=14, hidden_act="gelu")
DIGITS_TEXT = umt5.Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
SMALL_LLAMA = replace(
    llama.LLAMA_3_8B,
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4 + llama.SKIPPED},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
)
SMALL_HUNYUAN = hunyuan_config.DiTConfig(
    num_attention_heads=3,
    attention_head_dim=64,
    num_layers=2,
    num_single_layers=4,
    text_embed_dim=64,
    pooled_projection_dim=64,
    rope_axes_dim=(16, 24, 24),
)
SMALL_HUNYUAN_VAE = HunyuanVAEConfig(block_out_channels=(8, 16, 32, 32), norm_num_groups=4, layers_per_block=1)
SMALL_CLIP_TEXT = replace(
    clip_text.CLIP_L,
    **{
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
)

Run = Callable[[], Any]  # runs once, waits for the result, returns it as our side lays it out


@dataclass(frozen=True)
class Case:
    """One program of both sides.

    name: in the report
    cfg: of the model
    inputs: numpy arrays of our layout
    ours: (params, *inputs) -> output; traced
    theirs: (model, *inputs) -> output; gets torch tensors of the same layout and dtype on its device, and answers in it
    dtype: of inputs and weights
    counted: a form of `ours` whose products are all visible to `plan.products`; None: `ours`
    """

    name: str
    cfg: Any
    inputs: tuple[np.ndarray, ...]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    dtype: str = "float32"
    counted: Callable[..., Any] | None = None

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.inputs[0].shape)) + f" {self.dtype}"


@dataclass
class Row:
    """What was measured of a case.

    ours, theirs: seconds of every counted run; `theirs` is None without a rival
    compile: seconds that JAX took to compile ours
    difference: relative L2 distance between the two results
    flops: of one run
    products: seconds of all bare products together
    """

    name: str
    shape: str
    ours: list[float]
    theirs: list[float] | None = None
    compile: float | None = None
    difference: float | None = None
    flops: float | None = None
    products: float | None = None

    def record(self) -> dict[str, Any]:
        ours = statistics.median(self.ours)
        record: dict[str, Any] = {"name": self.name, "shape": self.shape, "ours_s": short(ours)}
        if self.theirs:
            theirs = statistics.median(self.theirs)
            record |= {"theirs_s": short(theirs), "ratio": round(ours / theirs, 3), "difference": self.difference}
        record |= {"compile_s": self.compile, "runs": len(self.ours), "ours_all_s": [short(s) for s in self.ours]}
        record |= {"theirs_all_s": [short(s) for s in self.theirs or ()]}
        if self.flops:
            record["ours_tflops_per_s"] = short(self.flops / ours / 1e12)
        if self.products:
            record |= {"products_s": short(self.products), "share_of_products": round(self.products / ours, 3)}
        return record


# ----------------------------------------------------------------------------------------------------------- cases


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def dit(name: str, cfg: wan.DiTConfig, size: Sequence[int], text: int, prompt: int, **options: Any) -> Case:
    """size: B, T, H, W; text: rows that both sides attend to, zero beyond the first `prompt`, as in both pipelines.
    A model that attends to pictures gets the 257 tokens of one; `text` is 512 then, which is how diffusers parts them.

    Ours gets only those and merges the zero rows' share, as `jvdiff.generate` does; the numbers are the same.
    """
    implementation = options.pop("implementation", None)

    def ours(params: Any, x: Any, t: Any, rows: Any, image: Any = None, how: str | None = implementation) -> Any:
        # `rows` are cast as the pipeline has them, in the dtype of the text encoder.
        rows = rows[:, : prompt + 1].astype(params["blocks"]["ffn"]["up"]["kernel"].dtype)
        return wan.velocity(params, cfg, x, t, rows, image=image, text_length=text, implementation=how)

    def theirs(model: Any, x: Any, t: Any, rows: Any, image: Any = None) -> Any:
        first = x.permute(0, 4, 1, 2, 3).to(model.dtype)
        image = None if image is None else image.to(model.dtype)
        return model(first, t, rows.to(model.dtype), image, return_dict=False)[0].permute(0, 2, 3, 4, 1)

    rows = _normal(size[0], text, cfg.text_dim)
    rows[:, prompt:] = 0
    inputs = _normal(*size, cfg.in_channels), np.full(size[0], 500.0, np.float32), rows
    inputs += (_normal(size[0], 257, cfg.image_dim),) if cfg.image_dim else ()
    return Case(name, cfg, inputs, ours, theirs, counted=partial(ours, how="xla"), **options)


def joint(
    name: str, cfg: hunyuan_config.DiTConfig, size: Sequence[int], text: int, prompt: int, **options: Any
) -> Case:
    """size: B, T, H, W; text: rows that both sides are given, of which `prompt` count. Ours gets only those, as in
    `jvdiff.generate`."""

    def ours(params: Any, x: Any, t: Any, rows: Any, mask: Any, *others: Any, how: str | None = None) -> Any:
        return hunyuan_dit.velocity(params, cfg, x, t, rows[:, :prompt], mask[:, :prompt], *others, implementation=how)

    def theirs(model: Any, x: Any, t: Any, rows: Any, mask: Any, pooled: Any, guidance: Any) -> Any:
        return model(x.permute(0, 4, 1, 2, 3), t, rows, mask, pooled, guidance, return_dict=False)[0].permute(
            0, 2, 3, 4, 1
        )

    rows, pooled = _normal(size[0], text, cfg.text_embed_dim), _normal(size[0], cfg.pooled_projection_dim)
    mask = np.arange(text)[None].repeat(size[0], 0) < prompt
    t, guidance = (np.full(size[0], value, np.float32) for value in (500, 6000))
    inputs = _normal(*size, cfg.in_channels), t, rows, mask, pooled, guidance
    return Case(name, cfg, inputs, ours, theirs, counted=partial(ours, how="xla"), **options)


def _vae(cfg: Any) -> tuple[Any, int]:
    """The functions of a VAE, and the channels of its latents."""
    return (hunyuan_vae, cfg.latent_channels) if isinstance(cfg, HunyuanVAEConfig) else (wan, cfg.z_dim)


def vae_decode(name: str, cfg: Any, size: Sequence[int], **options: Any) -> Case:
    """size: B, T, H, W of the latents."""

    def theirs(model: Any, z: Any) -> Any:
        return model.decode(z.permute(0, 4, 1, 2, 3).to(model.dtype), return_dict=False)[0].permute(0, 2, 3, 4, 1)

    vae, channels = _vae(cfg)
    return Case(name, cfg, (_normal(*size, channels),), lambda p, z: vae.decode(p, cfg, z), theirs, **options)


def vae_encode(name: str, cfg: Any, size: Sequence[int], **options: Any) -> Case:
    """size: B, T, H, W of the latents."""

    def theirs(model: Any, x: Any) -> Any:
        return model.encode(x.permute(0, 4, 1, 2, 3).to(model.dtype)).latent_dist.mode().permute(0, 2, 3, 4, 1)

    (vae, _), (B, T, H, W) = _vae(cfg), size
    grid = (B, 1 + cfg.temporal_factor * (T - 1), H * cfg.spatial_factor, W * cfg.spatial_factor, 3)
    return Case(name, cfg, (np.tanh(_normal(*grid)),), lambda p, x: vae.encode(p, cfg, x), theirs, **options)


def text(name: str, cfg: umt5.Config, size: Sequence[int], **options: Any) -> Case:
    """size: B, S."""

    def theirs(model: Any, ids: Any, mask: Any) -> Any:
        return model(ids.long(), attention_mask=mask.long()).last_hidden_state

    ids = np.random.default_rng(0).integers(2, cfg.vocab_size, size, np.int32)
    inputs = ids, np.ones(size, bool)
    return Case(name, cfg, inputs, lambda p, ids, mask: umt5.encode(p, cfg, ids, mask), theirs, **options)


def decoder(name: str, cfg: llama.Config, size: Sequence[int], **options: Any) -> Case:
    """size: B, S. Theirs has as many layers as ours computes, and no last norm."""

    def theirs(model: Any, ids: Any, mask: Any) -> Any:
        return model(ids.long(), attention_mask=mask.long()).last_hidden_state

    ids = np.random.default_rng(0).integers(2, cfg.vocab_size, size, np.int32)
    inputs = ids, np.ones(size, bool)
    return Case(name, cfg, inputs, lambda p, ids, mask: llama.encode(p, cfg, ids, mask), theirs, **options)


def pooled(name: str, cfg: clip_text.Config, size: Sequence[int], **options: Any) -> Case:
    """size: B, S."""

    def theirs(model: Any, ids: Any) -> Any:
        return model(ids.long()).pooler_output

    ids = np.random.default_rng(0).integers(2, cfg.vocab_size, size, np.int32)
    return Case(name, cfg, (ids,), lambda p, ids: clip_text.encode(p, cfg, ids), theirs, **options)


def tower(name: str, cfg: clip.Config, pictures: int, **options: Any) -> Case:
    """What the tower of an image encoder sees in so many pictures."""

    def theirs(model: Any, pixels: Any) -> Any:
        pixels = pixels.permute(0, 3, 1, 2).to(model.dtype)
        return model(pixels, output_hidden_states=True).hidden_states[-2]

    inputs = (_normal(pictures, cfg.image_size, cfg.image_size, 3),)
    return Case(name, cfg, inputs, lambda p, pixels: clip.encode(p, cfg, pixels), theirs, **options)


def with_pictures(cfg: wan.DiTConfig, image_dim: int = 1280) -> wan.DiTConfig:
    """The same transformer with a condition of 20 channels (with 16 of latents) and picture tokens."""
    behind = 4 + cfg.out_channels
    more = {"image_dim": image_dim, "added_kv_proj_dim": cfg.width}
    return replace(cfg, in_channels=cfg.out_channels + behind, **more)


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """What is compared on a device; `quick` shrinks everything, to see that it runs."""
    if quick:
        heads: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 64}
        small_dit = replace(DIGITS_DIT, text_dim=16, freq_dim=16, **heads)
        small_vae = replace(DIGITS_VAE, base_dim=4, dim_mult=(1, 2, 2), temperal_downsample=(True, True))
        small_text = replace(DIGITS_TEXT, d_model=16, d_kv=8, num_heads=2)
        dtype = "bfloat16" if device == "gpu" else "float32"
        yield dit("DiT", small_dit, (2, 2, 4, 6), 8, 3, dtype=dtype)
        yield vae_decode("VAE decode", small_vae, (1, 2, 2, 3), dtype=dtype)
        yield vae_encode("VAE encode", small_vae, (1, 2, 2, 3), dtype=dtype)
        yield text("UMT5", small_text, (1, 8), dtype=dtype)
        yield dit("I2V", with_pictures(small_dit, 24), (1, 2, 4, 6), 512, 3, dtype=dtype)
        yield tower("CLIP", replace(DIGITS_TOWER, image_size=28), 1, dtype=dtype)
        yield decoder("Llama", replace(SMALL_LLAMA, num_hidden_layers=1 + llama.SKIPPED), (1, 8), dtype=dtype)
        yield pooled("CLIP text", replace(SMALL_CLIP_TEXT, num_hidden_layers=1), (1, 8), dtype=dtype)
    elif device == "gpu":
        size = (1, 21, 60, 104)
        half = {"dtype": "bfloat16"}
        yield dit("DiT 1.3B", wan.WAN_2_1_T2V_1_3B, size, 512, 63, implementation="cudnn", **half)
        yield vae_decode("VAE decode", wan.WAN_2_1_VAE, size)  # float32, as both programs run it by default
        yield vae_decode("VAE decode", wan.WAN_2_1_VAE, size, **half)
        yield vae_encode("VAE encode", wan.WAN_2_1_VAE, size)
        yield vae_encode("VAE encode", wan.WAN_2_1_VAE, size, **half)
        yield vae_decode("VAE 2.2 decode", wan.WAN_2_2_VAE, (1, 21, 44, 80))
        yield vae_encode("VAE 2.2 encode", wan.WAN_2_2_VAE, (1, 21, 44, 80))
        yield text("UMT5-XXL", umt5.UMT5_XXL, (1, 512), **half)
        layers = replace(wan.WAN_2_1_I2V_14B, num_layers=4)
        yield dit("I2V 14B, 4 layers", layers, size, 512, 63, implementation="cudnn", **half)
        yield tower("CLIP ViT-H/14", clip.VIT_H_14, 1)  # float32, as both programs run it by default
        yield decoder("Llama 3 8B, 30 layers", llama.LLAMA_3_8B, (1, 351), **half)
        yield pooled("CLIP-L text", clip_text.CLIP_L, (1, 77), **half)
    else:
        heads = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 4}
        yield dit("DiT digits", DIGITS_DIT, (2, 5, 8, 8), 512, 31)  # 2: with and without the prompt
        yield dit("DiT 1536 wide, 4 layers", wan.DiTConfig(**heads), (1, 3, 60, 104), 512, 63)
        yield vae_decode("VAE decode digits", DIGITS_VAE, (1, 5, 8, 8))
        yield vae_decode("VAE decode 96 wide", wan.WAN_2_1_VAE, (1, 3, 16, 24))
        yield vae_encode("VAE encode digits", DIGITS_VAE, (1, 5, 8, 8))
        yield vae_encode("VAE encode 96 wide", wan.WAN_2_1_VAE, (1, 3, 16, 24))
        yield vae_decode("VAE 2.2 decode 8 wide", SMALL_VAE_2_2, (1, 5, 8, 8))
        yield vae_encode("VAE 2.2 encode 8 wide", SMALL_VAE_2_2, (1, 5, 8, 8))
        yield vae_decode("VAE 2.2 decode 256 wide", wan.WAN_2_2_VAE, (1, 3, 8, 12))
        yield vae_encode("VAE 2.2 encode 160 wide", wan.WAN_2_2_VAE, (1, 3, 8, 12))
        yield text("UMT5 digits", DIGITS_TEXT, (2, 512))
        wide = {"vocab_size": 8192, "d_model": 1024, "d_ff": 2560, "num_layers": 4, "num_heads": 16}
        yield text("UMT5 1024 wide, 4 layers", umt5.Config(**wide), (1, 512))
        yield dit("I2V digits", with_pictures(DIGITS_DIT), (2, 5, 8, 8), 512, 31)
        yield dit("I2V 1536 wide, 4 layers", with_pictures(wan.DiTConfig(**heads)), (1, 3, 60, 104), 512, 63)
        yield tower("CLIP digits", DIGITS_TOWER, 1)
        yield tower("CLIP 1280 wide, 4 layers", replace(clip.VIT_H_14, num_hidden_layers=4), 1)
        yield decoder("Llama 64 wide, 4 layers", SMALL_LLAMA, (2, 127))
        few = replace(llama.LLAMA_3_8B, vocab_size=8192, num_hidden_layers=2 + llama.SKIPPED)
        yield decoder("Llama 4096 wide, 2 layers", few, (1, 351))
        yield pooled("CLIP text 64 wide, 4 layers", SMALL_CLIP_TEXT, (2, 77))
        yield pooled("CLIP-L text", clip_text.CLIP_L, (1, 77))
        yield joint("Hunyuan small", SMALL_HUNYUAN, (1, 5, 16, 16), 256, 31)
        few_blocks = replace(hunyuan_config.HUNYUAN_VIDEO, num_layers=1, num_single_layers=2)
        yield joint("Hunyuan 3072 wide, 3 blocks", few_blocks, (1, 3, 32, 48), 256, 63)
        shallow = HunyuanVAEConfig(layers_per_block=1)
        for label, sizes, grid in (("8 wide", SMALL_HUNYUAN_VAE, (1, 4, 8, 8)), ("128 wide", shallow, (1, 3, 8, 12))):
            yield vae_decode(f"Hunyuan VAE decode {label}", sizes, grid)
            yield vae_encode(f"Hunyuan VAE encode {label}", sizes, grid)


# ------------------------------------------------------------------------------------------------------- both sides


def part_of(cfg: Any) -> Part:
    """The part of a repository that a configuration is of."""
    parts = (part for family in models.families() for part in family.parts.values())
    return next(part for part in parts if isinstance(cfg, part.config))


def random_params(cfg: Any) -> dict[str, Any]:
    """float32 numpy parameters that keep activations of order one; no leaf idle."""
    block = np.random.default_rng(0).standard_normal(1_000_003, np.float32)  # repeated: billions of draws take minutes
    leaves = {}
    for path, leaf in flatten(part_of(cfg).abstract(cfg, jnp.float32)).items():
        if path.endswith("scale"):
            leaves[path] = np.ones(leaf.shape, np.float32)
        elif path.endswith(("kernel", "embedding")):
            stacked = not {"blocks", "layers"}.isdisjoint(path.split("/")[:2])
            fan_in = 1 if "embedding" in path else max(math.prod(leaf.shape[stacked:-1]), 1)
            size = 1 / math.sqrt(fan_in * (cfg.d_kv if isinstance(cfg, umt5.Config) and "attn/q/" in path else 1))
            leaves[path] = np.resize(block, leaf.shape) * np.float32(size)
        else:  # biases, modulations
            leaves[path] = np.resize(block, leaf.shape) * np.float32(0.1)
    return unflatten(leaves)


def our_run(case: Case, params: dict[str, Any]) -> tuple[Run, float]:
    """A compiled run, and the seconds that compiling took."""
    abstract = part_of(case.cfg).abstract(case.cfg, jnp.dtype(case.dtype))
    params = jax.tree.map(lambda leaf, value: jnp.asarray(value, leaf.dtype), abstract, params)
    inputs = [jnp.asarray(x) for x in case.inputs]
    began = time.perf_counter()
    compiled = jax.jit(case.ours).lower(params, *inputs).compile()
    took = time.perf_counter() - began
    return lambda: jax.block_until_ready(compiled(params, *inputs)), took


def missing(packages: Sequence[str]) -> str:
    """Those of the packages that are not installed, as a sentence names them."""
    return ", ".join(name for name in packages if not importlib.util.find_spec(name))


def their_run(case: Case, params: dict[str, Any], device: str) -> Run:
    """The rival's run on the same weights."""
    import torch

    model, names = _torch_model(case.cfg, device), part_of(case.cfg).names
    assert names is not None
    prefix = "text_model." if isinstance(case.cfg, clip_text.Config) else ""  # which transformers 5 has no more
    state = {name.removeprefix(prefix): torch.from_numpy(array) for name, array in disassemble(names(case.cfg), params)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"encoder.embed_tokens.weight"} and not unexpected, (missing, unexpected)
    del state
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ()) if isinstance(case.cfg, wan.DiTConfig) else ()
    for name, parameter in model.named_parameters():  # as from_pretrained(torch_dtype=...) casts
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(getattr(torch, case.dtype))
    model.eval()
    inputs = [torch.from_numpy(x).to(device) for x in case.inputs]

    def run() -> Any:
        with torch.inference_mode():
            out = case.theirs(model, *inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    return run


def _torch_model(cfg: Any, device: str) -> Any:
    import diffusers
    import torch
    import transformers

    with torch.device(device):
        if isinstance(cfg, umt5.Config):
            return transformers.UMT5EncoderModel(transformers.UMT5Config(**cfg.to_json()))
        if isinstance(cfg, llama.Config):
            sizes: Any = cfg.to_json() | {"num_hidden_layers": cfg.layers}
            model: Any = transformers.LlamaModel(transformers.LlamaConfig(**sizes))
            model.norm = torch.nn.Identity()
            return model
        if isinstance(cfg, clip_text.Config):
            return transformers.CLIPTextModel(transformers.CLIPTextConfig(**cfg.to_json()))
        if isinstance(cfg, clip.Config):
            return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**cfg.to_json()))
        kinds: Any = {
            wan.VAEConfig: diffusers.AutoencoderKLWan,
            wan.DiTConfig: diffusers.WanTransformer3DModel,
            HunyuanVAEConfig: diffusers.AutoencoderKLHunyuanVideo,
            hunyuan_config.DiTConfig: diffusers.HunyuanVideoTransformer3DModel,
        }
        return kinds[type(cfg)].from_config(cfg.to_json())


def alternate(ours: Run, theirs: Run | None, repeats: int) -> tuple[list[float], list[float] | None, float | None]:
    """Seconds of each side's runs in turn, after one uncounted run of each whose results are compared."""
    first = np.asarray(_leaf(ours()), np.float32)
    difference = None
    if theirs is not None:
        other = theirs()
        other = other if isinstance(other, np.ndarray) else other.float().cpu().numpy()
        difference = float(f"{np.linalg.norm(first - other) / np.linalg.norm(other):.1e}")
    ours_seconds, *their_seconds = in_turn([ours] if theirs is None else [ours, theirs], repeats)
    return ours_seconds, their_seconds[0] if their_seconds else None, difference


def _leaf(result: Any) -> Any:
    return jax.tree.leaves(result)[0]


def bare(jaxpr: Any, repeats: int) -> float:
    """Seconds of the products of a jaxpr: the median of each, compiled by itself, as often as it is in the jaxpr."""
    alike: dict[str, tuple[int, Any]] = {}
    for times, equation in products(jaxpr):
        key = f"{equation.primitive} {[each.aval for each in equation.invars]} {equation.params}"
        alike[key] = (alike.get(key, (0, None))[0] + times, equation)
    total = 0.0
    for times, equation in alike.values():
        inputs = [jnp.asarray(_normal(*each.aval.shape), each.aval.dtype) for each in equation.invars]
        product = jax.jit(partial(equation.primitive.bind, **equation.params))
        run = lambda product=product, inputs=inputs: jax.block_until_ready(product(*inputs))  # noqa: E731
        run()
        total += times * statistics.median(in_turn([run], repeats)[0])
    return total


def measure(case: Case, repeats: int, rival: str | None, alone: bool = True) -> Row:
    """One row of the table; `rival`: torch's device, or None; `alone`: the bare products too."""
    params = random_params(case.cfg)
    ours, compile_seconds = our_run(case, params)
    theirs = their_run(case, params, rival) if rival else None
    abstract = part_of(case.cfg).abstract(case.cfg, jnp.dtype(case.dtype))
    counted = jax.make_jaxpr(case.counted or case.ours)(abstract, *case.inputs).jaxpr
    del params
    seconds, their_seconds, difference = alternate(ours, theirs, repeats)
    compiling, flops = short(compile_seconds), count_flops(counted)
    row = Row(case.name, case.shape, seconds, their_seconds, compiling, difference, flops)
    return replace(row, products=bare(counted, repeats)) if alone else row


# ------------------------------------------------------------------------------------------- a checkpoint's clip


def measure_clip(checkpoint: str, repeats: int, rival: str | None) -> Row:
    """Prompt to frames, with the checkpoint's own settings, from the same noise."""
    import jvdiff
    from jvdiff import pipeline

    pipe = jvdiff.load(checkpoint)
    clip = pipe.clip()
    settings, noise = clip.settings, np.asarray(pipeline.initial_noise([0], clip.latents))

    def ours() -> np.ndarray:
        return jvdiff.generate(pipe, [PROMPT], noise=noise).video

    began = time.perf_counter()
    ours()
    first = time.perf_counter() - began
    theirs = _their_clip(checkpoint, settings, noise, rival) if rival else None
    seconds, their_seconds, difference = alternate(ours, theirs, repeats)
    shape = f"{settings.num_frames}x{settings.height}x{settings.width}, {settings.steps} steps"
    compiling = short(max(first - statistics.median(seconds), 0.0))
    return Row("whole clip", f"{shape} {pipe.precision.name}", seconds, their_seconds, compiling, difference)


def _their_clip(checkpoint: str, settings: Any, noise: np.ndarray | None, device: str) -> Run:
    import diffusers
    import torch

    pipe = diffusers.WanPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    start = None if noise is None else torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy()).to(device)

    def run() -> np.ndarray:
        frames = pipe(
            prompt=[PROMPT],
            negative_prompt=settings.negative_prompt,
            height=settings.height,
            width=settings.width,
            num_frames=settings.num_frames,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            latents=start,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).frames  # type: ignore[union-attr]
        return np.round(frames * 255).astype(np.uint8)

    return run


def first_frame(checkpoint: str, side: str, cache: str) -> None:
    """In a process of its own: prints the time of day when the first frame is in host memory."""
    import jvdiff
    from jvdiff import pipeline

    if side == "ours":
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        pipe = jvdiff.load(checkpoint)
        context, run, clip = pipe.context, pipe.run, pipe.clip()
        solver = clip.sampler.make()
        inputs = pipe.family.inputs(pipe.models, clip, pipeline.make_request(pipe.family, clip, (PROMPT,)))
        conditions = pipeline.encode(context, clip, inputs, run)
        state = pipeline.begin(clip, solver, pipeline.initial_noise([0], clip.latents), [0])
        latents = pipeline.denoise(context, clip, conditions, state, solver, run).x
        told = lambda done: print(time.time(), flush=True) if done == 1 else None  # noqa: E731
        pipeline.decode(context, clip, latents, run, callback=told)
    else:  # the rival gives all frames at once
        _their_clip(checkpoint, pipeline.inspect(checkpoint).settings(), None, "cpu")()
        print(time.time(), flush=True)


def measure_first_frame(checkpoint: str, repeats: int, rival: str | None) -> Row:
    """Seconds from the start of a process to the first frame, files and compilations cached by a run before."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    sides = ["ours", "theirs"] if rival else ["ours"]
    with tempfile.TemporaryDirectory() as cache:
        for i in range(repeats + 1):
            for side in sides:
                command = [sys.executable, __file__, "--checkpoint", checkpoint, "--first-frame", side, cache]
                began = time.time()
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                if i:
                    times[side].append(float(done.stdout.split()[-1]) - began)
    return Row("first frame", "a cold process, warm caches", times["ours"], times["theirs"] or None)


# ------------------------------------------------------------------------------------------------------------ report


def table(rows: Sequence[Row]) -> str:
    """The rows as text; a ratio below 1 means that jvdiff is faster."""
    lines = [
        f"{'':<28}{'input':<34}{'ours':>10}{'theirs':>10}{'ratio':>7}{'compile':>9}{'difference':>12}{'TFLOP/s':>9}{'products':>10}"
    ]
    for row in rows:
        r = row.record()
        theirs = (f"{r['theirs_s']:.4g} s", f"{r['ratio']:.2f}") if "ratio" in r else ("-", "-")
        compiling = "-" if row.compile is None else f"{row.compile:.1f} s"
        apart = "-" if row.difference is None else f"{row.difference:.0e}"
        rate = f"{r['ours_tflops_per_s']:.3g}" if row.flops else "-"
        share = f"{r['share_of_products']:.0%}" if row.products else "-"
        numbers = f"{r['ours_s']:.4g} s".rjust(10) + theirs[0].rjust(10) + theirs[1].rjust(7)
        lines.append(f"{row.name:<28}{row.shape:<34}{numbers}{compiling:>9}{apart:>12}{rate:>9}{share:>10}")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--checkpoint", help="a Diffusers folder: time the whole clip and the first frame too")
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--repeats", type=int, default=7, help="counted runs of each side")
    parser.add_argument("--alone", action="store_true", help="do not run the rival")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one run, to see that all works")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/compare_diffusers_DEVICE.json")
    parser.add_argument("--first-frame", nargs=2, metavar=("SIDE", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.first_frame:
        first_frame(args.checkpoint, *args.first_frame)
        return 0

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the rival needs room on the same GPU
    if args.device == "gpu" and not args.quick and jax.default_backend() != "gpu":
        raise SetupError(f"--device gpu: JAX finds no GPU, its backend is {jax.default_backend()!r}.")
    rival, threads = _rival(args), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if rival:
        import torch

        torch.set_num_threads(threads or 1)
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None  # other work spoils figures
    repeats, rows = 1 if args.quick else args.repeats, []
    todo: list[tuple[str, Callable[[], Row]]] = [
        (case.name, partial(measure, case, repeats, rival, not args.quick)) for case in cases(args.device, args.quick)
    ]
    if args.checkpoint:
        todo.append(("whole clip", partial(measure_clip, args.checkpoint, repeats, rival)))
    if args.checkpoint and args.device == "cpu":
        todo.append(("first frame", partial(measure_first_frame, args.checkpoint, repeats, rival)))
    for name, job in todo:
        if args.only and args.only not in name:
            continue
        rows.append(job())
        print(table(rows[-1:]).splitlines()[1], file=sys.stderr, flush=True)
        gc.collect()
        if rival == "cuda":
            import torch

            torch.cuda.empty_cache()
    print(table(rows))

    output = args.output or (None if args.quick else RESULTS / f"compare_diffusers_{args.device}.json")
    if output:
        rivals = {name: version(name) for name in RIVALS} if rival else {}
        report = {
            "machine": describe() | rivals | {"threads": threads, "load_before": load},
            "rows": [row.record() for row in rows],
        }
        write(output, report)
    return 0


def _rival(args: argparse.Namespace) -> str | None:
    """The rival's device; None where our side is timed alone.

    Raises:
        SetupError: the rival is there and cannot load a checkpoint.
    """
    if args.alone:
        return None
    if names := missing(RIVALS):
        print(f"not installed: {names} (make parity installs them); timing jvdiff alone", file=sys.stderr, flush=True)
        return None
    if args.checkpoint and missing(("accelerate",)):
        raise SetupError(
            "--checkpoint: diffusers needs the package accelerate to load one, which is not installed.\n"
            "Run: pip install accelerate (or give --alone, to time jvdiff alone)."
        )
    if args.device == "cpu" or args.quick:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        print("this torch has no CUDA: timing jvdiff alone", file=sys.stderr)
        return None
    return "cuda"


if __name__ == "__main__":
    if "--device=gpu" not in sys.argv and "gpu" not in sys.argv:
        jax.config.update("jax_platforms", "cpu")
    try:
        sys.exit(main())
    except JvdiffError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
