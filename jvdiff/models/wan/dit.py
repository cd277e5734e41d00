"""Wan 2.1's diffusion transformer: the velocity of flow matching, given latents, a timestep and a text.

B batch · T latent frames · H W latent grid · C latent channels · L video tokens · S text tokens · N heads ·
K head dim · D model width.

The numbers are those of diffusers 0.42 (WanTransformer3DModel); in bfloat16 they are nearer to the float32 ones than
diffusers' own, because what costs next to nothing stays float32: the residual stream, all norms, the whole timestep
path with the modulation tables, the rotation, the patch embedding and the output head. Only the attention and
feed-forward matrices and the text embedding are in the lower precision (see `abstract_params`).

Sparse self-attention works on tiles of tokens, so with such a pattern the tokens are in tile order from the patches to
the output head; nothing else in the network looks at their order.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jvdiff import kernels
from jvdiff.errors import UsageError
from jvdiff.kernels import Dense, SlidingTile, VideoSparse, block_sparse, tiles
from jvdiff.models.wan.config import DiTConfig
from jvdiff.models.wan.layers import MLP, LayerNorm, Linear, RMSNorm, gelu, layer_norm, rope_tables, rotate
from jvdiff.sharding import Placement, Sizes, Split, rules, sequence
from jvdiff.types import Array, Params

Pattern = Dense | SlidingTile | VideoSparse
Grid = tuple[int, int, int]


def velocity(
    params: Params,
    cfg: DiTConfig,
    latents: Array,
    timestep: Array,
    text: Array,
    *,
    pattern: Pattern = Dense(),  # noqa: B008 - a frozen value
    text_length: int | None = None,
    remat: bool = False,
    implementation: str | None = None,
    placement: Placement | None = None,
) -> Array:
    """d x / d sigma at `latents`: noise minus clean latents, as the network predicts it. Pure and differentiable.

    Args:
      params: the tree of `abstract_params(cfg)`; the compute dtype is that of its attention and feed-forward matrices.
      latents: float32 [B,T,H,W,C]; T, H, W multiples of the patch size.
      timestep: float32 [B] in 0..1000. Never lower precision: bfloat16 turns 937.5 into 936.
      text: [B,S,text_dim], the text encoder's output, zero beyond each prompt's end.
      pattern: which tokens the self-attention sees; no choice changes the parameters. `VideoSparse` adds its coarse
        branch where the configuration has its gate (`gate_compress`); the other patterns ignore the gate.
      text_length: the last row of `text` stands for all rows up to this many (512 in Wan's pipeline, which attends
        to the zero padding too): exactly the result of repeating it, without the work. None: S.
      remat: recompute each block in the backward pass instead of keeping its activations.
      implementation: of the self-attention, see `jvdiff.kernels`; of the attention to text too where there is a dense
        one of that name, which otherwise takes the best.
      placement: the devices to work on, `params` on them by `sharding.rules.WAN_DIT`; the rest, and the result, is on
        all of them. None: one device.

    Returns:
      float32 [B,T,H,W,out_channels].
    """
    _check(cfg, latents, timestep, text, text_length)
    if not isinstance(pattern, Pattern):
        raise UsageError(
            f"velocity: pattern is {pattern!r:.80}; expected Dense(), SlidingTile(...) or VideoSparse(...)"
        )
    extra = 0 if text_length is None else text_length - text.shape[1]
    split = None
    if placement is not None:
        split = placement.split(mesh_sizes(cfg, latents.shape[1:4], len(latents), pattern))
        whole: Any = placement.whole({k: v for k, v in params.items() if k != "blocks"}, rules.WAN_DIT)
        params = {**whole, "blocks": params["blocks"]}
        latents, timestep, text = placement.replicate((latents, timestep, text))
    model = _Transformer(cfg, pattern, extra, remat, implementation, placement, split)
    v: Any = model.apply({"params": params}, latents, timestep, text)
    return v


def abstract_params(cfg: DiTConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter tree as ShapeDtypeStructs; linear kernels are [in,out], `blocks` has the layers in axis 0.

    With a lower `dtype`, the text embedding and the linear layers of the blocks have it; the rest stays float32.
    """
    leaves: dict[Any, Any] = traverse_util.flatten_dict(jax.eval_shape(lambda: _init(jax.random.key(0), cfg)))

    def dtype_of(path: tuple[str, ...]) -> Any:
        lower = path[0] in ("blocks", "text_embed") and path[-1] in ("kernel", "bias") and path[1] != "cross_norm"
        return dtype if lower else jnp.float32

    return traverse_util.unflatten_dict(
        {path: jax.ShapeDtypeStruct(x.shape, dtype_of(path)) for path, x in leaves.items()}
    )


def init_params(key: Array, cfg: DiTConfig) -> dict[str, Any]:
    """Float32 parameters to train from, as Wan's training starts: Xavier matrices, zero biases, a zero output head."""
    return jax.jit(_init, static_argnums=1)(key, cfg)


def attention_choice(
    cfg: DiTConfig,
    grid: Grid,
    *,
    pattern: Pattern = Dense(),  # noqa: B008 - a frozen value
    batch: int = 1,
    text_rows: int = 512,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
    ring: bool = False,
) -> dict[str, str]:
    """Which implementation self- and cross-attention get for latents of (T,H,W): for the record of a run.

    ring: keys go round several devices, which needs an implementation that gives the log-sum-exp.
    """
    t, h, w = (n // p for n, p in zip(grid, cfg.patch_size, strict=True))
    shape = lambda n: jax.ShapeDtypeStruct(  # noqa: E731
        (batch, n, cfg.num_attention_heads, cfg.attention_head_dim), dtype
    )
    q, k = shape(t * h * w), shape(text_rows)
    if isinstance(pattern, Dense):
        own = kernels.choose(q, q, q, return_lse=ring, implementation=implementation)
    else:
        block = math.prod(pattern.tile)
        x = shape(math.prod(tiles.counts((t, h, w), pattern.tile)) * block)
        own = block_sparse.choose(x, x, x, block=block, implementation=implementation)
    return {"self": own, "cross": kernels.choose(q, k, k, implementation=_dense(implementation))}


def mesh_sizes(cfg: DiTConfig, grid: tuple[int, ...], batch: int, pattern: Pattern) -> Sizes:
    """What a mesh must divide to run this model on `batch` latents of (T,H,W)."""
    tokens = math.prod(n // p for n, p in zip(grid, cfg.patch_size, strict=True))
    return Sizes(batch, tokens, cfg.num_attention_heads, cfg.ffn_dim, isinstance(pattern, Dense))


def _dense(implementation: str | None) -> str | None:
    """The implementation of the attention to text, which is dense: the named one where there is such a dense one."""
    return implementation if implementation in kernels.IMPLEMENTATIONS else None


class _Transformer(nn.Module):
    cfg: DiTConfig
    pattern: Pattern
    extra_text: int  # how many more times the last text row counts
    remat: bool
    implementation: str | None
    placement: Placement | None = None
    split: Split | None = None

    @nn.compact
    def __call__(self, latents: Array, timestep: Array, text: Array) -> Array:
        cfg, D = self.cfg, self.cfg.width
        B, T, H, W, C = latents.shape
        pt, ph, pw = cfg.patch_size
        grid = (T // pt, H // ph, W // pw)

        # Patches enter in the order (c, pt, ph, pw) and leave as (pt, ph, pw, c).
        x = latents.reshape(B, grid[0], pt, grid[1], ph, grid[2], pw, C)
        x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6).reshape(B, -1, C * pt * ph * pw)
        rope = rope_tables(grid, cfg.attention_head_dim)
        if not isinstance(self.pattern, Dense):
            x = tile_order(x, grid, self.pattern.tile)
            rope = tuple(tile_order(table[None], grid, self.pattern.tile)[0] for table in rope)
        if split := self.split:
            x, *rope = (jnp.pad(a, ((0, 0), (0, split.padding), (0, 0))) for a in (x, rope[0][None], rope[1][None]))
            x, rope = split.along_tokens(x), tuple(split.constrain(a[0], split.ring + split.heads) for a in rope)
        x = Linear(D, exact=True, name="patch_embed")(x)

        t = MLP(D, D, nn.silu, exact=True, name="time_embed")(_sinusoid(timestep, cfg.freq_dim))
        modulation = Linear(6 * D, exact=True, name="time_proj")(nn.silu(t)).reshape(B, 6, D)
        text = MLP(D, D, gelu, name="text_embed")(text)
        if placement := self.placement:
            t, modulation, text = placement.replicate((t, modulation, text))

        block = _Block
        if placement and placement.mesh.shape["fsdp"] > 1:
            block = nn.map_variables(block, "params", partial(_gathered, placement), init=self.is_initializing())
        block = nn.remat(block, prevent_cse=False) if self.remat else block
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType] - documented, and wrongly annotated
            length=cfg.num_layers,
        )(cfg, grid, self.pattern, self.extra_text, self.implementation, split, name="blocks")
        x, _ = blocks(x, modulation, text, *rope)

        x = _Head(cfg, name="head")(x, t)
        if placement and split:
            x = placement.replicate(x)[:, : split.tokens]
        if not isinstance(self.pattern, Dense):
            x = raster_order(x, grid, self.pattern.tile)
        x = x.reshape(B, *grid, pt, ph, pw, cfg.out_channels).transpose(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(B, T, H, W, cfg.out_channels)


class _Block(nn.Module):
    cfg: DiTConfig
    grid: Grid
    pattern: Pattern
    extra_text: int
    implementation: str | None
    split: Split | None

    @nn.compact
    def __call__(self, x: Array, modulation: Array, text: Array, cos: Array, sin: Array) -> tuple[Array, None]:
        cfg = self.cfg
        if self.split:
            x, text = self.split.along_tokens(x), self.split.constrain(text, self.split.batch)
        table = self.param("modulation", _modulation_init, (6, cfg.width), jnp.float32)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation + table[None], 6, axis=1)

        h = layer_norm(x, cfg.eps) * (1 + scale_1) + shift_1
        attend = partial(_attend_video, self.grid, self.pattern, self.implementation, self.split)
        gated = cfg.gate_compress and isinstance(self.pattern, VideoSparse)
        x = x + gate_1 * _Attention(cfg, attend, gated, name="self_attn")(h, h, (cos, sin))

        h = LayerNorm(cfg.eps, name="cross_norm")(x)
        attend = partial(_attend_text, self.extra_text, _dense(self.implementation), self.split)
        x = x + _Attention(cfg, attend, name="cross_attn")(h, text, None)

        h = layer_norm(x, cfg.eps) * (1 + scale_2) + shift_2
        h = MLP(cfg.ffn_dim, cfg.width, gelu, names=("up", "down"), name="ffn")(h)
        x = x + gate_2 * h.astype(jnp.float32)
        return x, None


class _Attention(nn.Module):
    """x, context -> float32 [B,L,D]. Queries and keys are normalised over all heads together, before the rotation."""

    cfg: DiTConfig
    attend: Callable[[Array, Array, Array, Array | None], Array]
    gated: bool = False

    @nn.compact
    def __call__(self, x: Array, context: Array, rope: tuple[Array, Array] | None) -> Array:
        cfg, D = self.cfg, self.cfg.width
        q, k, v = Linear(D, name="q")(x), Linear(D, name="k")(context), Linear(D, name="v")(context)
        gate = Linear(D, nn.initializers.zeros, name="gate")(x) if self.gated else None
        dtype = v.dtype
        q, k = RMSNorm(cfg.eps, name="q_norm")(q), RMSNorm(cfg.eps, name="k_norm")(k)
        heads = lambda a: a.reshape(*a.shape[:2], -1, cfg.attention_head_dim)  # noqa: E731
        q, k, v, gate = jax.tree.map(heads, (q, k, v, gate))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out = self.attend(q.astype(dtype), k.astype(dtype), v, gate)
        return Linear(D, name="out")(out.reshape(x.shape)).astype(jnp.float32)


def _attend_video(
    grid: Grid,
    pattern: Pattern,
    implementation: str | None,
    split: Split | None,
    q: Array,
    k: Array,
    v: Array,
    gate: Array | None,
) -> Array:
    """Self-attention of video tokens [B,L,N,K], in tile order where the pattern has tiles."""

    def local(q: Array, k: Array, v: Array, gate: Array | None, first_head: Any = None) -> Array:
        if isinstance(pattern, Dense):
            return kernels.attention(q, k, v, implementation=implementation)
        common: Any = dict(grid=grid, tile=pattern.tile, tiled=True, implementation=implementation)
        if isinstance(pattern, SlidingTile):
            return kernels.sliding_tile_attention(q, k, v, window=pattern.window, first_head=first_head, **common)
        return kernels.video_sparse_attention(q, k, v, gate, sparsity=pattern.sparsity, **common)

    if split is None:
        return local(q, k, v, gate)
    return sequence.self_attention(local, split, q, k, v, gate, _dense(implementation))


def _attend_text(
    extra: int, implementation: str | None, split: Split | None, q: Array, k: Array, v: Array, gate: Array | None
) -> Array:
    """Attention to text [B,S,N,K] whose last row counts 1 + extra times."""

    def local(q: Array, k: Array, v: Array) -> Array:
        if extra == 0:
            return kernels.attention(q, k, v, implementation=implementation)
        if kernels.choose(q, k, v, implementation=implementation) == "cudnn":  # gives no float32 log-sum-exp
            pad = ((0, 0), (0, extra), (0, 0), (0, 0))
            return kernels.attention(q, jnp.pad(k, pad, "edge"), jnp.pad(v, pad, "edge"), implementation=implementation)
        out, lse = kernels.attention(q, k, v, return_lse=True, implementation=implementation)
        last = jnp.einsum("blnk,bnk->bnl", q, k[:, -1], preferred_element_type=jnp.float32)
        lse_last = last * q.shape[-1] ** -0.5 + math.log(extra)
        return kernels.merge(out, lse, jnp.broadcast_to(v[:, -1:], out.shape), lse_last)[0]

    return local(q, k, v) if split is None else sequence.cross_attention(local, split, q, k, v)


class _Head(nn.Module):
    cfg: DiTConfig

    @nn.compact
    def __call__(self, x: Array, t: Array) -> Array:
        """x [B,L,D] and the timestep's embedding [B,D], before its SiLU -> patches [B,L,pt*ph*pw*C]."""
        cfg = self.cfg
        table = self.param("modulation", _modulation_init, (2, cfg.width), jnp.float32)
        shift, scale = jnp.split(t[:, None] + table[None], 2, axis=1)
        x = layer_norm(x, cfg.eps) * (1 + scale) + shift
        features = cfg.out_channels * math.prod(cfg.patch_size)
        return Linear(features, nn.initializers.zeros, exact=True, name="proj")(x)


def _gathered(placement: Placement, layer: Params) -> Params:
    """The weights of one layer, whole but for `tensor`: inside the scan, so that one layer at a time is gathered."""
    return {"params": placement.whole(layer["params"], rules.WAN_DIT, stack="blocks")}


def tile_order(x: Array, grid: Grid, tile: Grid) -> Array:
    """[B,L,...] in raster order over `grid` -> the same tokens in the order of `kernels.tiles.partition_indices`."""
    (t, h, w), (a, b, c) = tiles.counts(grid, tile), tile
    if (t * a, h * b, w * c) != grid:
        return _permuted(x, tiles.partition_indices(grid, tile))
    y = x.reshape(x.shape[0], t, a, h, b, w, c, -1)
    return y.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(x.shape)


def raster_order(x: Array, grid: Grid, tile: Grid) -> Array:
    """The inverse of `tile_order`."""
    (t, h, w), (a, b, c) = tiles.counts(grid, tile), tile
    if (t * a, h * b, w * c) != grid:
        return _permuted(x, tiles.reverse_partition_indices(grid, tile))
    y = x.reshape(x.shape[0], t, h, w, a, b, c, -1)
    return y.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape)


def _permuted(x: Array, index: np.ndarray) -> Array:
    if np.array_equal(index, np.arange(index.size)):
        return x
    return jnp.take(x, index.astype(np.int32), axis=1, mode="clip", unique_indices=True)


def _modulation_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5


def _sinusoid(timestep: Array, size: int) -> Array:
    """[B] float32 -> [B,size]: the cosines, then the sines, of t * 10000^(-i/(size/2))."""
    rates = np.exp(-math.log(10000.0) * np.arange(size // 2) / (size // 2)).astype(np.float32)
    angles = timestep[:, None] * rates[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _init(key: Array, cfg: DiTConfig) -> dict[str, Any]:
    pattern = VideoSparse((1, 1, 1), 0.0) if cfg.gate_compress else Dense()  # one that uses every parameter
    model = _Transformer(cfg, pattern, 0, False, "xla")
    latents = jnp.zeros((1, *cfg.patch_size, cfg.in_channels))
    variables: Any = model.init(key, latents, jnp.zeros((1,)), jnp.zeros((1, 1, cfg.text_dim)))
    return variables["params"]


def _check(cfg: DiTConfig, latents: Array, timestep: Array, text: Array, text_length: int | None) -> None:
    if latents.ndim != 5 or latents.shape[-1] != cfg.in_channels:
        raise UsageError(f"velocity: latents are {latents.shape}; expected [B,T,H,W,{cfg.in_channels}]")
    B, *grid, _ = latents.shape
    for name, n, p in zip("THW", grid, cfg.patch_size, strict=True):
        if n % p or not 1 <= n // p <= cfg.rope_max_seq_len:
            raise UsageError(
                f"velocity: latent {name} is {n}; expected a multiple of the patch size {p}, "
                f"at most {p * cfg.rope_max_seq_len} (rope_max_seq_len {cfg.rope_max_seq_len})"
            )
    if timestep.shape != (B,) or timestep.dtype != jnp.float32:
        raise UsageError(f"velocity: timestep is {timestep.dtype}{list(timestep.shape)}; expected float32[{B}]")
    if text.ndim != 3 or text.shape[0] != B or text.shape[2] != cfg.text_dim or text.shape[1] == 0:
        raise UsageError(f"velocity: text is {text.shape}; expected [{B},S,{cfg.text_dim}] with S at least 1")
    if text_length is not None and text_length < text.shape[1]:
        raise UsageError(f"velocity: text_length is {text_length}, and text has {text.shape[1]} rows; give fewer rows")
