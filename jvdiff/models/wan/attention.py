"""The attention of the transformer's blocks: of video tokens to one another, to the past of a stream, and to text.

B batch · L video tokens · S text or past tokens · I tokens of pictures · N heads · K head dim · D model width ·
P texts of a clip.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jvdiff import kernels
from jvdiff.errors import UsageError
from jvdiff.kernels import Dense, Pattern
from jvdiff.kernels.tiles import Grid
from jvdiff.models.layers import Linear, RMSNorm, rotate
from jvdiff.models.wan.config import DiTConfig
from jvdiff.models.wan.plan import Attend, Layer, Plan, Shared
from jvdiff.runtime.target import Target
from jvdiff.sharding import sequence
from jvdiff.types import Array


class Attention(nn.Module):
    """x [B,L,D], context [B,S,D] -> float32 [B,L,D], and what `attend` keeps.

    Queries and keys are normalised over all heads together, before the rotation.

    gated: `attend` gets a gate for each token and channel.
    dtype: of the products.
    """

    cfg: DiTConfig
    gated: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        context: Any,
        rope: tuple[Array, Array] | None,
        attend: Callable[[Array, Array, Array, Array | None], tuple[Array, Any]],
        keys: tuple[Array, Array] | None = None,
        second: tuple[Array, Callable[..., tuple[Array, Any]]] | None = None,
    ) -> tuple[Array, Any]:
        """keys: those of the context with their values, [B,S,N,K], worked out before.

        second: another context [B,I,D], with keys and values of its own, and how the queries attend to it; the two
            results are added.
        """
        cfg, D = self.cfg, self.cfg.width
        linear = partial(Linear, D, dtype=self.dtype)
        heads = lambda a: a.reshape(*a.shape[:2], -1, cfg.attention_head_dim)  # noqa: E731 - [B,L,D] -> [B,L,N,K]
        q = linear(name="q")(x)
        dtype = q.dtype
        norm = partial(RMSNorm, cfg.eps, rope is not None)
        q = heads(norm(name="q_norm")(q))
        if keys is None:
            k, v = linear(name="k")(context), heads(linear(name="v")(context))
            k = heads(norm(name="k_norm")(k))
        else:
            k, v = keys
        gate = heads(linear(kernel_init=nn.initializers.zeros, name="gate")(x)) if self.gated else None
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out, memory = attend(q.astype(dtype), k.astype(dtype), v, gate)
        if second is not None:
            image, attend = second
            k, v = heads(norm(name="image_k_norm")(linear(name="image_k")(image))), heads(linear(name="image_v")(image))
            out = out + attend(q.astype(dtype), k.astype(dtype), v, None)[0]
            if cfg.image_q_norm and self.is_initializing():  # the file has it, and nothing is computed with it
                norm(name="image_q_norm")(x)
        out = out.reshape(x.shape)  # [B,L,N,K] -> [B,L,D]
        return linear(name="out")(out).astype(jnp.float32), memory


def attend_video(
    plan: Plan, shared: Shared, layer: Layer, q: Array, k: Array, v: Array, gate: Array | None
) -> tuple[Array, Any]:
    """Self-attention of video tokens [B,L,N,K], in tile order where the pattern has tiles; and what is to be kept."""
    split, implementation = plan.split, plan.implementation
    if shared.past is not None:
        attend = partial(_attend_past, plan)
        common: Any = shared.past, shared.rope if plan.relative else None
        if split is None:
            return attend(q, k, v, layer.past, common), (k, v) if plan.keep else None
        out, memory = sequence.cached_attention(attend, split, q, k, v, layer.past, common)
        return out, memory if plan.keep else None

    def local(q: Array, k: Array, v: Array, gate: Array | None, first_head: Any = None, chosen: Any = None) -> Array:
        if callable(implementation):
            return _attend_by(implementation, q, k, v)
        common: Any = dict(grid=plan.grid, first_head=first_head, implementation=implementation, target=plan.target)
        common |= {} if chosen is None else {"chosen": chosen}
        return plan.pattern.attend(q, k, v, gate, **common)

    if split is None:
        out, (tile, candidates) = local(q, k, v, gate, None, layer.chosen), plan.measured or (None, ())
        if tile is None:
            return out, None
        how: Any = dict(grid=plan.grid, tile=tile, candidates=candidates)
        return out, kernels.mask_search.losses(q, k, v, **how, implementation=None)
    return sequence.self_attention(local, split, q, k, v, gate, _dense(implementation), layer.chosen), None


def _attend_by(attend: Attend, q: Array, k: Array, v: Array) -> Array:
    """Attention [B,L,N,K] by a function of the user's own."""
    out = attend(q, k, v)
    if jnp.shape(out) != q.shape:
        name = getattr(attend, "__qualname__", repr(attend))
        raise UsageError(
            f"attention: {name} returned {list(jnp.shape(out))}; expected {list(q.shape)}, the shape of q."
        )
    return out.astype(q.dtype)


def _attend_past(plan: Plan, q: Array, k: Array, v: Array, past: tuple[Array, Array] | None, common: Any) -> Array:
    """Attention of a chunk's tokens [B,L,N,K] to themselves and to the past; or among themselves, as a matrix says."""
    (state, rope), implementation = common, plan.implementation
    assert not callable(implementation)  # `make_plan` has looked
    pattern: Any = plan.pattern
    how: Any = dict(implementation=implementation, target=plan.target)
    turned = lambda x, rope: rotate(x.astype(jnp.float32), *rope).astype(x.dtype)  # noqa: E731
    if rope is not None:
        q, k = turned(q, rope), turned(k, rope)
    if past is None:
        if pattern.near is not None:
            return pattern.attend_near(q, k, v, state.visible, plan.grid, **how)
        return kernels.block_causal_attention(q, k, v, state.visible, **how)
    old_k, old_v = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in past)  # [B,frames,V,N,K] -> [B,S,N,K]
    if state.rope is not None:
        old_k = turned(old_k, state.rope)
    # The past behind the chunk: of its slots the first are filled, so that one length says which count.
    k, v = jnp.concatenate([k, old_k], axis=1), jnp.concatenate([v, old_v], axis=1)  # [B,L+S,N,K]
    if pattern.near is not None:
        return pattern.attend_near(q, k, v, state.visible, plan.grid, **how)
    length = q.shape[1] + state.length
    return kernels.attention(q, k, v, kv_length=length, implementation=_dense(implementation), target=plan.target)


def attend_text(
    plan: Plan, parts: int, extra: int, q: Array, k: Array, v: Array, gate: Array | None
) -> tuple[Array, None]:
    """Attention to text [B,P*S,N,K], of each of P parts of the tokens to its own part; the last row counts `extra`
    times more."""

    def local(q: Array, k: Array, v: Array) -> Array:
        shape = q.shape
        if parts > 1:  # [B,P*S,N,K] -> [B*P,S,N,K]
            q, k, v = (x.reshape(x.shape[0] * parts, -1, *x.shape[2:]) for x in (q, k, v))
        how = dict(implementation=_dense(plan.implementation), target=plan.target)
        return _attend_rows(q, k, v, extra, how).reshape(shape)  # [B,L,N,K]

    return local(q, k, v) if plan.split is None else sequence.cross_attention(local, plan.split, q, k, v), None


def _attend_rows(q: Array, k: Array, v: Array, extra: int, how: Any) -> Array:
    """Attention of q [B,L,N,K] to the rows k, v [B,S,N,K] of a text, the last of which counts `extra` times more.

    how: implementation and target.
    """
    if extra == 0:
        return kernels.attention(q, k, v, **how)
    attend = jax.custom_jvp(partial(_attend_merged, extra, how))

    @attend.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        cudnn = kernels.choose(*primals, **how) == "cudnn"  # whose backward pass knows nothing of what is merged
        return jax.jvp(partial(_attend_padded if cudnn else _attend_merged, extra, how), primals, tangents)

    return attend(q, k, v)


def _attend_merged(extra: int, how: Any, q: Array, k: Array, v: Array) -> Array:
    """The rows, and the last one again, merged."""
    out, lse = kernels.attention(q, k, v, return_lse=True, **how)
    last = jnp.einsum("blnk,bnk->bnl", q, k[:, -1], preferred_element_type=jnp.float32)  # its logits [B,N,L]
    lse_last = last * q.shape[-1] ** -0.5 + math.log(extra)
    return kernels.merge(out, lse, jnp.broadcast_to(v[:, -1:], out.shape), lse_last)[0]


def _attend_padded(extra: int, how: Any, q: Array, k: Array, v: Array) -> Array:
    """As many rows as count."""
    pad = ((0, 0), (0, extra), (0, 0), (0, 0))
    return kernels.attention(q, jnp.pad(k, pad, "edge"), jnp.pad(v, pad, "edge"), **how)  # [B,S+extra,N,K]


def _dense(implementation: str | Attend | None) -> str | None:
    """The implementation of the attention to text, which is dense: the named one where there is such a dense one."""
    return implementation if isinstance(implementation, str) and implementation in kernels.IMPLEMENTATIONS else None


def attention_choice(
    cfg: DiTConfig,
    grid: Grid,
    *,
    pattern: Pattern = Dense(),  # noqa: B008 - a frozen value
    batch: int = 1,
    text_rows: int = 512,
    dtype: Any = jnp.float32,
    implementation: str | Attend | None = None,
    ring: bool = False,
    target: Target | None = None,
) -> dict[str, str]:
    """Which implementation self- and cross-attention get for latents of (T,H,W): for the record of a run.

    ring: keys go round several devices, which needs an implementation that gives the log-sum-exp.
    target: what the program is made for; None: the devices at hand.
    """
    t, h, w = (n // p for n, p in zip(grid, cfg.patch_size, strict=True))
    shape = lambda n: jax.ShapeDtypeStruct(  # noqa: E731
        (batch, n, cfg.num_attention_heads, cfg.attention_head_dim), dtype
    )
    q, k = shape(t * h * w), shape(text_rows)
    if callable(implementation):
        video = f"{implementation.__module__}.{implementation.__qualname__}"
    else:
        video = pattern.choose(q, (t, h, w), lse=ring, implementation=implementation, target=target)
    return {"self": video, "cross": kernels.choose(q, k, k, implementation=_dense(implementation), target=target)}
