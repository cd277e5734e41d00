"""The kernels of `mosaic_gpu` and their launches, with TMA copies and wgmma products.

B batch · N heads · K head dim · L query tokens · S key tokens · R rows of one step.

Three kernels, each one launch for all heads and batch entries: the forward pass and dq, where a warpgroup owns 64
queries and walks over the keys of their block's row of `q2k`, and dk with dv, where it owns 64 keys and walks over the
queries that selected their block. Nothing is added across warpgroups, so results are the same bit by bit in every run.
Operands stay [B,L,N,K]: TMA reads the rows of one head with a stride.

What a warpgroup owns stays in shared memory; what it walks over comes R rows at a time through a ring of slots. There
are two ways to fill the ring. Small blocks have lists of their own: a CTA is one warpgroup that starts its own copies,
and several CTAs on an SM hide each other's waits. Larger blocks are shared: two or three warpgroups read the same slots
and one more does nothing but copy.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jvdiff.kernels.block_sparse import mosaic_gpu
from jvdiff.kernels.block_sparse.lists import Lists, padded_backward, parts_of, split, starts_of, transpose
from jvdiff.kernels.block_sparse.mosaic_gpu import ROWS, Shape

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2)
_MASKED = -1e30  # what a masked key's product with a query starts from
_FLOOR = -1e28  # the running maximum of a row that has seen no key: below all logits, above all masked ones
_SIZE_BITS = 9  # of a list entry: the valid tokens of a block, at most 256; above them stands its first row, in eighths
_EIGHT = 8  # rows that a copy cannot divide, since they lie together in shared memory


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, lists: Lists, *, block: int, scale: float, cuts: Mapping[str, Shape]
) -> tuple[jax.Array, jax.Array]:
    """out [B,L,N,K] in the dtype of q, and the natural log-sum-exp, float32 [B,N,L]."""
    (B, L, N, _), shape = q.shape, cuts["forward"]
    places = lists.q2k.shape[2] * block
    if lists.q_first is not None and mosaic_gpu.INTERPRET is not None:
        q, k, v = (jnp.pad(x, ((0, 0), (0, block), (0, 0), (0, 0))) for x in (q, k, v))  # a copy reads zeros there
    out, lse = _call(
        "forward",
        functools.partial(_forward_kernel, shape=shape, block=block, scale=scale * _LOG2_E),
        shape,
        grid=(B, N, places // (ROWS * shape.warpgroups)),
        out_type=(
            jax.ShapeDtypeStruct((B, L, *q.shape[2:]), q.dtype),
            jax.ShapeDtypeStruct((B, N, places), jnp.float32),
        ),
        scratch_types=dict(
            q_smem=_smem(shape.warpgroups, ROWS, q),
            lse_smem=plgpu.SMEM((shape.warpgroups, ROWS), jnp.float32),
            k_smem=_smem(shape.stages, shape.step, k),
            v_smem=_smem(shape.stages, shape.step, v),
            own=plgpu.Barrier(num_barriers=shape.warpgroups),
            k_signals=_signals(shape),
            v_signals=_signals(shape),
            turn=plgpu.Barrier(num_arrivals=2) if shape.producer and shape.warpgroups == 2 else None,
        ),
    )(q, k, v, *_entries(lists, block, shape), *_query_rows(lists, block, shape))
    return out, lse if lists.q_map is None else lists.q_map.packed(lse, axis=2)


def _forward_kernel(
    q_ref, k_ref, v_ref, entry_ref, count_ref, bias_ref, load_ref, store_ref, out_ref, lse_ref, *,
    q_smem, lse_smem, k_smem, v_smem, own, k_signals, v_signals, turn, shape, block, scale,
):  # fmt: skip
    b, n, i, wg = (lax.axis_index(name) for name in ("batch", "head", "block", "warpgroup"))
    K = q_ref.shape[-1]
    ring = _key_ring(shape, block, entry_ref, count_ref, b, n, i)
    keys = ring.stream(k_signals, (lambda rows: k_ref.at[b, rows, n], k_smem))
    values = ring.stream(v_signals, (lambda rows: v_ref.at[b, rows, n], v_smem))

    def swap():
        """Lets the other warpgroup have the tensor cores, and waits until it has done its products."""
        if turn is not None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

    def products(j, entry):
        if not shape.producer:  # from zero it would take 140 registers instead of 128, and an SM would hold a CTA less
            return _products((q_smem.at[wg], keys.wait(j)[0].T, _bias(entry, bias_ref)), issued=swap)[0]
        (logits,) = _products((q_smem.at[wg], keys.slots(j)[0].T, None), issued=swap)
        return _masked(logits, entry, bias_ref)

    def step(j, entry, carry):
        acc, top, total = carry
        logits = products(j, entry)
        keys.release(j)
        new = jnp.maximum(top, logits.max(axis=1) * scale)
        fade = jnp.exp2(top - new)
        weights = jnp.exp2(logits * scale - _columns(new, logits))
        acc = acc * _columns(fade, acc)
        total = total * fade + weights.sum(axis=1)
        weights = weights.astype(q_ref.dtype)
        if turn is not None:
            # Nothing of the softmax may sink below, where the other warpgroup is waiting for its turn.
            acc, new, total, weights = lax.optimization_barrier((acc, new, total, weights))
            plgpu.barrier_arrive(turn)
        (v_slot,) = values.wait(j)
        if turn is not None:
            plgpu.barrier_wait(turn)
        # Nothing stands between these products and the next ones but what they need: their keys are awaited behind.
        (acc,) = _products((weights, v_slot, acc), issued=lambda: keys.expect(j + 1) if shape.producer else None)
        values.release(j)
        return acc, new, total

    def compute():
        place = (i * shape.warpgroups + wg) * ROWS
        first = place if load_ref is None else pl.multiple_of(load_ref[i] + wg * ROWS, _EIGHT)
        plgpu.copy_gmem_to_smem(q_ref.at[b, pl.ds(first, ROWS), n], q_smem.at[wg], own.at[wg])
        ring.start()
        plgpu.barrier_wait(own.at[wg])
        if shape.producer:
            keys.expect(jnp.int32(0))
        pl.when(wg == 1)(swap)
        per_row = lambda x: plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), plgpu.Layout.WGMMA.reduce(1))  # noqa: E731
        acc, top, total = ring.walk(step, (_zeros(K), per_row(_FLOOR), per_row(0)))
        pl.when(wg == 0)(swap)
        seen = total > 0
        lse_smem[wg] = jnp.where(seen, (top + jnp.log2(total)) * _LN_2, -jnp.inf)
        q_smem[wg] = (acc * _columns(1 / jnp.where(seen, total, 1.0), acc)).astype(out_ref.dtype)
        plgpu.commit_smem()
        if store_ref is None:
            plgpu.copy_smem_to_gmem(q_smem.at[wg], out_ref.at[b, pl.ds(place, ROWS), n])
        else:
            first = pl.multiple_of(store_ref[0, i] + wg * ROWS, _EIGHT)
            _store_rows(q_smem.at[wg], out_ref.at[b, :, n], first, store_ref[1, i] - wg * ROWS)
        plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, n, pl.ds(place, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    ring.run(compute)


def _store_rows(smem: Any, ref: Any, first: Any, count: Any) -> None:
    """Copies the first `count` rows of smem [ROWS,K], if it has so many, to the rows of ref [L,K] from `first` on."""

    @pl.when(count >= ROWS)
    def _():
        plgpu.copy_smem_to_gmem(smem, ref.at[pl.ds(first, ROWS)])

    @pl.when(count < ROWS)
    def _():  # the rows behind them belong to another block
        @pl.loop(0, lax.div(jnp.maximum(count, 0), jnp.int32(_EIGHT)))
        def _(eighth):
            row = pl.multiple_of(eighth * _EIGHT, _EIGHT)
            plgpu.copy_smem_to_gmem(smem.at[pl.ds(row, _EIGHT)], ref.at[pl.ds(first + row, _EIGHT)])


@padded_backward
def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    lists: Lists,
    *,
    block: int,
    scale: float,
    cuts: Mapping[str, Shape],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv in the dtypes of q, k and v, from the cotangents of out and of the log-sum-exp."""
    B, L, N, _ = q.shape
    products = dout.astype(jnp.float32) * out.astype(jnp.float32)
    delta = jnp.swapaxes(jnp.sum(products, axis=-1), 1, 2) - dlse  # [B,L,N] -> [B,N,L]
    # A query without keys has no place in any list that is walked over; only its number must be finite.
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse * _LOG2_E)
    stats = jnp.stack([lse, delta], axis=2)  # [B,N,2,L]: one copy brings both

    shape = cuts["dq"]
    dq = _call(
        "dq",
        functools.partial(_dq_kernel, shape=shape, block=block, scale=scale),
        shape,
        grid=(B, N, L // (ROWS * shape.warpgroups)),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=dict(
            q_smem=_smem(shape.warpgroups, ROWS, q),
            do_smem=_smem(shape.warpgroups, ROWS, q),
            stats_smem=plgpu.SMEM((shape.warpgroups, 2, ROWS), jnp.float32),
            k_smem=_smem(shape.stages, shape.step, k),
            v_smem=_smem(shape.stages, shape.step, v),
            own=plgpu.Barrier(num_barriers=shape.warpgroups, num_arrivals=3),
            k_signals=_signals(shape),
            v_signals=_signals(shape),
        ),
    )(q, k, v, dout, stats, *_entries(lists, block, shape))

    shape = cuts["dkv"]
    parts = lists if shape.step == block else split(lists, block, shape.step, block)
    dk, dv = _call(
        "dkv",
        functools.partial(_dkv_kernel, shape=shape, block=block, scale=scale),
        shape,
        grid=(B, N, k.shape[1] // (ROWS * shape.warpgroups)),
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch_types=dict(
            k_smem=_smem(shape.warpgroups, ROWS, k),
            v_smem=_smem(shape.warpgroups, ROWS, v),
            q_smem=_smem(shape.stages, shape.step, q),
            do_smem=_smem(shape.stages, shape.step, q),
            stats_smem=plgpu.SMEM((shape.stages, 2, shape.step), jnp.float32),
            own=plgpu.Barrier(num_barriers=shape.warpgroups, num_arrivals=2),
            q_signals=_signals(shape, copies=2),
            do_signals=_signals(shape),
        ),
    )(q, k, v, dout, stats, *transpose(parts), jnp.asarray(lists.kv_sizes))
    return dq, dk, dv


def _dq_kernel(
    q_ref, k_ref, v_ref, do_ref, stats_ref, entry_ref, count_ref, bias_ref, dq_ref, *,
    q_smem, do_smem, stats_smem, k_smem, v_smem, own, k_signals, v_signals, shape, block, scale,
):  # fmt: skip
    b, n, i, wg = (lax.axis_index(name) for name in ("batch", "head", "block", "warpgroup"))
    K = q_ref.shape[-1]
    ring = _key_ring(shape, block, entry_ref, count_ref, b, n, i)
    keys = ring.stream(k_signals, (lambda rows: k_ref.at[b, rows, n], k_smem))
    values = ring.stream(v_signals, (lambda rows: v_ref.at[b, rows, n], v_smem))

    def compute():
        rows = pl.ds((i * shape.warpgroups + wg) * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], q_smem.at[wg], own.at[wg])
        plgpu.copy_gmem_to_smem(do_ref.at[b, rows, n], do_smem.at[wg], own.at[wg])
        plgpu.copy_gmem_to_smem(stats_ref.at[b, n, :, rows], stats_smem.at[wg], own.at[wg])
        ring.start()
        plgpu.barrier_wait(own.at[wg])
        lse, delta = (_load(stats_smem.at[wg, x], axis=1) for x in (0, 1))

        def step(j, entry, dq):
            (k_slot,), (v_slot,) = keys.wait(j), values.wait(j)
            logits, dweights = _products((q_smem.at[wg], k_slot.T, None), (do_smem.at[wg], v_slot.T, None))
            logits = _masked(logits, entry, bias_ref)
            values.release(j)
            weights = jnp.exp2(logits * (scale * _LOG2_E) - _columns(lse, logits))
            dlogits = weights * (dweights - _columns(delta, dweights))
            (dq,) = _products((dlogits.astype(q_ref.dtype), k_slot, dq))
            keys.release(j)
            return dq

        dq = ring.walk(step, _zeros(K))
        q_smem[wg] = (dq * scale).astype(dq_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[wg], dq_ref.at[b, rows, n])
        plgpu.wait_smem_to_gmem(0)

    ring.run(compute)


def _dkv_kernel(
    q_ref, k_ref, v_ref, do_ref, stats_ref, offset_ref, query_ref, size_ref, dk_ref, dv_ref, *,
    k_smem, v_smem, q_smem, do_smem, stats_smem, own, q_signals, do_signals, shape, block, scale,
):  # fmt: skip
    b, n, i, wg = (lax.axis_index(name) for name in ("batch", "head", "block", "warpgroup"))
    K = q_ref.shape[-1]
    first = i * (ROWS * shape.warpgroups)  # key of this CTA
    kv_block = lax.div(first, block)
    offset, query = _row(offset_ref, b, n), _row(query_ref, b, n)
    start = offset(kv_block)
    row = lambda j: query(jnp.minimum(start + j, query_ref.shape[-1] - 1)) * shape.step  # noqa: E731
    ring = _Ring(shape, offset(kv_block + 1) - start, row, lambda row: row)
    queries = ring.stream(
        q_signals,
        (lambda rows: q_ref.at[b, rows, n], q_smem),
        (lambda rows: stats_ref.at[b, n, :, rows], stats_smem),
    )
    douts = ring.stream(do_signals, (lambda rows: do_ref.at[b, rows, n], do_smem))

    def step(j, _, carry):
        dk, dv = carry
        (q_slot, stats), (do_slot,) = queries.wait(j), douts.wait(j)
        # Transposed: a row of these products is one key.
        logits, dweights = _products((k_smem.at[wg], q_slot.T, None), (v_smem.at[wg], do_slot.T, None))
        lse = _load(stats.at[0], axis=0)
        weights = jnp.exp2(logits * (scale * _LOG2_E) - lax.broadcast_in_dim(lse, logits.shape, [1]))
        delta = _load(stats.at[1], axis=0)
        dlogits = weights * (dweights - lax.broadcast_in_dim(delta, logits.shape, [1]))
        dv, dk = _products((weights.astype(q_ref.dtype), do_slot, dv), (dlogits.astype(q_ref.dtype), q_slot, dk))
        douts.release(j)
        queries.release(j)
        return dk, dv

    def compute():
        rows = pl.ds(first + wg * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(k_ref.at[b, rows, n], k_smem.at[wg], own.at[wg])
        plgpu.copy_gmem_to_smem(v_ref.at[b, rows, n], v_smem.at[wg], own.at[wg])
        ring.start()
        plgpu.barrier_wait(own.at[wg])
        dk, dv = ring.walk(step, (_zeros(K), _zeros(K)))
        # What was computed of padded keys stayed in their rows, and is dropped here.
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS, K), 0, layout=plgpu.Layout.WGMMA)
        valid = row < size_ref[kv_block] - (lax.rem(first, jnp.int32(block)) + wg * ROWS)
        k_smem[wg] = jnp.where(valid, dk * scale, 0.0).astype(dk_ref.dtype)
        v_smem[wg] = jnp.where(valid, dv, 0.0).astype(dv_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_smem.at[wg], dk_ref.at[b, rows, n])
        plgpu.copy_smem_to_gmem(v_smem.at[wg], dv_ref.at[b, rows, n])
        plgpu.wait_smem_to_gmem(0)

    ring.run(compute)


class _Ring:
    """What a CTA walks over in `count` steps: the number entry(j) describes step j, whose rows begin at row(entry)."""

    def __init__(self, shape: Shape, count: Any, entry: Callable[[Any], Any], row: Callable[[Any], Any]):
        self.shape, self.count, self.row = shape, count, row
        self.entry = lambda j: entry(jnp.maximum(jnp.minimum(j, count - 1), 0))
        self.streams: list[_Stream] = []
        self.ahead: Sequence[Any] = ()  # the entries of this step and the next ones

    def stream(self, signals: Any, *copies: tuple[Callable[[Any], Any], Any]) -> "_Stream":
        full, free = signals
        self.streams.append(_Stream(self, full, free, copies))
        return self.streams[-1]

    def run(self, compute: Callable[[], None]) -> None:
        """compute() in every computing warpgroup, beside the one that copies if there is one."""
        if not self.shape.producer:
            compute()
            return
        wg = lax.axis_index("warpgroup")
        more, fewer = {2: (240, 24), 3: (160, 32)}[self.shape.warpgroups]

        @pl.when(wg < self.shape.warpgroups)
        def _():
            plgpu.set_max_registers(more, action="increase")
            compute()

        @pl.when(wg == self.shape.warpgroups)
        def _():
            plgpu.set_max_registers(fewer, action="decrease")
            lax.fori_loop(0, self.count, self._produce, self.entry(jnp.int32(0)))

    def _produce(self, j: Any, entry: Any) -> Any:
        following = self.entry(j + 1)  # read one step before it is needed
        for stream in self.streams:
            pl.when(j >= self.shape.stages)(lambda stream=stream: plgpu.barrier_wait(stream.free.at[self.slot(j)]))
            stream.load(j, entry)
        return following

    def start(self) -> None:
        """Fills the slots for the first time, where no warpgroup does that alone."""
        if self.shape.producer:
            return
        for j in (jnp.int32(j) for j in range(self.shape.stages)):

            @pl.when(j < self.count)
            def _(j=j):
                for stream in self.streams:
                    stream.load(j, self.entry(j))

    def walk(self, step: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
        """Runs `carry = step(j, entry, carry)` for each entry j, and returns the last carry.

        Entries are read from global memory before they are needed.
        """
        depth = 1 if self.shape.producer else self.shape.stages + 1

        def body(j, carry):
            self.ahead, carry = carry
            entry, *others = self.ahead
            following = self.entry(j + depth)
            return (*others, following), step(j, entry, carry)

        start = tuple(self.entry(jnp.int32(j)) for j in range(depth))
        return lax.fori_loop(0, self.count, body, (start, carry))[1]

    def slot(self, j: Any) -> Any:
        return lax.rem(j, jnp.int32(self.shape.stages))


class _Stream(NamedTuple):
    """Arrays whose rows come together.

    ring: the steps that they come in.
    full: barriers that say that a slot is filled.
    free: barriers that say that all have read it.
    copies: (rows -> what is copied, its slots) of each array.
    """

    ring: _Ring
    full: Any
    free: Any
    copies: Sequence[tuple[Callable[[Any], Any], Any]]

    def load(self, j: Any, entry: Any) -> None:
        slot = self.ring.slot(j)
        rows = pl.ds(pl.multiple_of(self.ring.row(entry), _EIGHT), self.ring.shape.step)
        for source, slots in self.copies:
            plgpu.copy_gmem_to_smem(source(rows), slots.at[slot], self.full.at[slot])

    def slots(self, j: Any) -> list[Any]:
        """The slots of step j."""
        slot = self.ring.slot(j)
        return [slots.at[slot] for _, slots in self.copies]

    def wait(self, j: Any) -> list[Any]:
        """The slots of step j, once they are filled."""
        plgpu.barrier_wait(self.full.at[self.ring.slot(j)])
        return self.slots(j)

    def expect(self, j: Any) -> None:
        """Waits until the slots of step j are filled, if there is such a step."""
        pl.when(j < self.ring.count)(lambda: plgpu.barrier_wait(self.full.at[self.ring.slot(j)]))

    def release(self, j: Any) -> None:
        """This warpgroup has read the slots of step j."""
        if mosaic_gpu.INTERPRET is not None:
            plgpu.commit_smem()  # the interpreter's products are plain reads, which wait for no copy without a fence
        later = j + self.ring.shape.stages

        @pl.when(later < self.ring.count)
        def _():
            if self.ring.shape.producer:
                plgpu.barrier_arrive(self.free.at[self.ring.slot(j)])
            else:
                self.load(later, self.ring.ahead[-1])


def _key_ring(shape: Shape, block: int, entry_ref: Any, count_ref: Any, b: Any, n: Any, i: Any) -> _Ring:
    """What CTA i of a head, which has some of the queries of a block, walks over."""
    entries, query_block = _row(entry_ref, b, n), lax.div(i * (ROWS * shape.warpgroups), block)
    return _Ring(
        shape,
        _row(count_ref, b, n)(i),
        lambda j: entries(query_block, j),
        lambda entry: lax.shift_right_logical(entry, jnp.int32(_SIZE_BITS)) * _EIGHT,
    )


def _row(ref: Any, b: Any, n: Any) -> Callable[..., Any]:
    """Reads numbers of a list [B,N,...]; one that all share has 1 for B or N."""
    b, n = (0 if size == 1 else x for size, x in zip(ref.shape[:2], (b, n), strict=True))
    return lambda *place: ref[b, n, *place]


def _products(*terms: tuple[Any, Any, jax.Array | None], issued: Callable[[], None] = lambda: None) -> Any:
    """start + a b in float32 for every (a, b, start): a in registers or shared memory, b in shared memory.

    A start of None is zero, which costs nothing: a start in registers has to be put there, between two products.
    issued() is called between their start and their end.
    """
    if mosaic_gpu.INTERPRET is not None:  # which cannot do this
        issued()
        dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
        return [dot(a[...], b[...]) + (0.0 if start is None else start) for a, b, start in terms]

    def body(accumulators):
        for acc, (a, b, _) in zip(accumulators, terms, strict=True):
            plgpu.wgmma(acc, a, b)
        issued()

    if all(start is None for *_, start in terms):

        def scoped(*accumulators):
            body(accumulators)
            return [acc[...] for acc in accumulators]

        return pl.run_scoped(scoped, *(plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b, _ in terms))
    return pl.run_state(body)([plgpu.ACC.init(start) for *_, start in terms])


def _bias(entry: Any, bias_ref: Any) -> jax.Array:
    """float32 [ROWS,R], what the products with a block's keys start from: 0, and far below it for padded keys.

    A row of a table [R+1,R] is read only for blocks that are not full: made from numbers of columns it would cost
    registers in every step.
    """
    step = bias_ref.shape[1]
    size = lax.bitwise_and(entry, jnp.int32(2**_SIZE_BITS - 1))

    return lax.cond(size < step, lambda: _bias_rows(bias_ref, size), lambda: _zeros(step))


def _masked(logits: jax.Array, entry: Any, bias_ref: Any) -> jax.Array:
    """The products with a block's keys, those of padded keys far below zero: as `_bias`, but added afterwards."""
    size = lax.bitwise_and(entry, jnp.int32(2**_SIZE_BITS - 1))
    return lax.cond(size < bias_ref.shape[1], lambda: logits + _bias_rows(bias_ref, size), lambda: logits)


def _bias_rows(bias_ref: Any, size: Any) -> jax.Array:
    row = _load(bias_ref.at[size], axis=0, optimized=False)
    return lax.broadcast_in_dim(row, (ROWS, bias_ref.shape[1]), [1])


def _load(ref: Any, *, axis: int, optimized: bool = True) -> jax.Array:
    """The numbers of a vector that stand for the other axis of a product: 0 for its columns, 1 for its rows."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(axis), optimized=optimized)  # pyright: ignore[reportCallIssue]


def _zeros(columns: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)


def _columns(x: jax.Array, like: jax.Array) -> jax.Array:
    """A number for each row, in all columns."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def _entries(lists: Lists, block: int, shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    """entries int32 [B,N,Nq,M] of blocks of `step` keys, counts int32 [B,N,CTAs], and the table of `_bias`.

    A CTA whose queries nobody asks for has a count of 0.
    """
    step, rows = shape.step, ROWS * shape.warpgroups
    if step != block:
        lists = split(lists, block, block, step)
    q2k, count, sizes = map(jnp.asarray, lists[:3])
    count = jnp.repeat(count, block // rows, axis=2)
    if lists.q_sizes is not None:
        count = jnp.where(parts_of(lists.q_sizes, block, rows)[None, None] > 0, count, 0)
    first = jnp.arange(sizes.size, dtype=jnp.int32) * step if lists.kv_first is None else jnp.asarray(lists.kv_first)
    bias = np.where(np.arange(step) < np.arange(step + 1)[:, None], 0, _MASKED).astype(np.float32)
    return ((first // _EIGHT << _SIZE_BITS) | sizes)[q2k], count, jnp.asarray(bias)


def _query_rows(lists: Lists, block: int, shape: Shape) -> tuple[jax.Array | None, jax.Array | None]:
    """The first row of each CTA's queries, int32 [CTAs], and it with how many they are, int32 [2,CTAs].

    Both are None where blocks are padded. What a CTA reads at its end is an array of its own: the address of one that
    is used twice takes the registers that an SM would need for a fourth CTA of one warpgroup.
    """
    if lists.q_first is None:
        return None, None
    rows = ROWS * shape.warpgroups
    first = starts_of(lists.q_first, block, rows)
    return first, jnp.stack([first, parts_of(lists.q_sizes, block, rows)])


def _smem(slots: int, rows: int, like: jax.Array) -> Any:
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((slots, rows, like.shape[-1]), like.dtype, transforms=transforms)


def _signals(shape: Shape, copies: int = 1) -> Any:
    """The barriers of one stream: `full` and, with a warpgroup that copies, `free`."""
    free = plgpu.Barrier(num_barriers=shape.stages, num_arrivals=shape.warpgroups) if shape.producer else None
    return plgpu.Barrier(num_barriers=shape.stages, num_arrivals=copies), free


def _call(name: str, kernel: Any, shape: Shape, **arguments: Any) -> Any:
    return plgpu.kernel(
        kernel,
        kernel_name=f"block_sparse_{name}",
        grid_names=("batch", "head", "block"),
        num_threads=shape.warpgroups + shape.producer,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=mosaic_gpu.INTERPRET,
        **arguments,
    )
