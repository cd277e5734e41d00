"""Training a transformer that makes a video chunk by chunk, by flow matching behind a clean past.

    B batch · T latent frames · H W latent grid · C latent channels · P chunks · S text tokens · D text width

Source: teacher forcing, as CausVid (arXiv 2412.07772) and Self-Forcing (arXiv 2506.08009) describe it. Every chunk is
noised to a level of its own and sees the chunks before it clean, all in one forward pass over two copies of the clip
(`kernels.BlockCausal`). A rollout's past is not clean but the model's own: so the copy that is looked at is noised a
little too, to a level that is drawn for each chunk and told to the network, and a rollout may do the same
(`context_noise`). Or it is the model's own here too, noised far and denoised by it in two steps (`resample`, after
Resampling Forcing, arXiv 2512.15702), so that it makes its mistakes where the right continuation is known.

What slows the drift is a sink, the first chunk, seen by all later ones: there it is long ago, so clips may leave chunks
out behind it, and the chunk behind the gap, which nothing foretells, has no weight in the loss (`Batch.weight`).
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from jvdiff.kernels import BlockCausal
from jvdiff.models import wan
from jvdiff.models.text import umt5
from jvdiff.models.wan import places
from jvdiff.models.wan.flow_matching import Batch, encode_text, init_both, noise_levels
from jvdiff.sharding import Placement
from jvdiff.training.loop import Task, each
from jvdiff.types import Array, Params

RESAMPLED = 0.9  # the highest noise level from which the model denoises a past of its own


def teacher_forcing_task(
    transformer: wan.DiTConfig,
    text_encoder: umt5.Config,
    batches: Callable[[int], Batch],
    pattern: BlockCausal,
    *,
    shift: float = 3.0,
    context_noise: float = 0.0,
    resample: float = 0.0,
    text_length: int = 512,
    remat: bool = False,
    placement: Placement | None = None,
) -> Task:
    """Parameters {"transformer", "text_encoder"}, trained together on latents [B,T,H,W,C] of P whole chunks, with token
    ids [B,P,S] and masks: a prompt for each chunk. `pattern` says how far a chunk sees.

    context_noise: the highest noise level 0..1 of the past; levels are drawn towards 0.
    resample: the share of clips whose past is the model's own, each chunk made by itself; two more forward passes. The
      sink stays clean: it is the shape to come back to.
    """
    doubled = BlockCausal(pattern.chunk, pattern.window, pattern.sink, teacher_forcing=True)
    alone = BlockCausal(pattern.chunk, pattern.chunk, 0, teacher_forcing=True)

    def loss(params: Params, batch: Batch, key: Array) -> tuple[Array, Mapping[str, Array]]:
        keys = jax.random.split(key, 6)
        clean = jnp.asarray(batch.latents, jnp.float32)
        B, T = clean.shape[:2]
        P = T // pattern.chunk

        predict = _predictor(transformer, text_encoder, batch, text_length, remat, placement)

        def mixed(clean: Array, noise: Array, level: Array) -> Array:
            level = jnp.repeat(level, pattern.chunk, axis=1)[:, :, None, None, None]  # [B,P] -> [B,T,1,1,1]
            return (1.0 - level) * clean + level * noise

        sigma = noise_levels(keys[0], (B, P), shift)
        context = context_noise * jax.random.uniform(keys[1], (B, P)) ** 2
        # [B,2T,H,W,C] -> [B,T,H,W,C] each
        past_noise, noise = jnp.split(jax.random.normal(keys[2], (B, 2 * T, *clean.shape[2:])), 2, axis=1)
        past = clean
        if resample and P > 1:  # a lone chunk has no past
            frozen, far = jax.lax.stop_gradient(params), RESAMPLED * jax.random.uniform(keys[3], (B, P))
            own, none = mixed(clean, jax.random.normal(keys[4], clean.shape), far), jnp.zeros((B, P))
            for step in range(2):
                v = predict(frozen, alone, clean, own, none, far * (1 - step / 2))
                # [B,P] -> [B,T,1,1,1]
                own = own - jnp.repeat(far / 2, pattern.chunk, axis=1)[:, :, None, None, None] * v
            taken = jax.random.uniform(keys[5], (B, 1, 1, 1, 1)) < resample
            own = jnp.concatenate([clean[:, : pattern.sink], own[:, pattern.sink :]], axis=1)  # [B,T,H,W,C]
            past = jnp.where(taken, jax.lax.stop_gradient(own), clean)
        seen, shown = mixed(past, past_noise, context), mixed(clean, noise, sigma)
        predicted = predict(params, doubled, seen, shown, context, sigma)
        wanted = noise - clean
        error = jnp.mean((predicted - wanted).reshape(B, P, -1) ** 2, axis=2)  # [B,T,H,W,C] -> [B,P]
        weight = jnp.ones((B, P)) if batch.weight is None else jnp.asarray(batch.weight)
        noisy = jnp.where(sigma > 0.75, weight, 0.0)
        return _mean(error, weight), {"loss_noisy": _mean(error, noisy)}

    init = partial(init_both, transformer, text_encoder)
    return Task(init=init, loss=loss, batches=each(batches), rules=(*places.DIT, *umt5.PLACES))


def _predictor(
    transformer: wan.DiTConfig,
    text_encoder: umt5.Config,
    batch: Batch,
    text_length: int,
    remat: bool,
    placement: Placement | None,
) -> Callable[..., Array]:
    """(params, pattern, past, now, past_level, level) -> the velocity at frames `now` [B,T,...] of chunk levels [B,P],
    which look at another copy of them, `past` of levels `past_level`."""
    B, P = batch.ids.shape[:2]

    def predict(
        params: Params, pattern: BlockCausal, past: Array, now: Array, past_level: Array, level: Array
    ) -> Array:
        ids, mask = (jnp.asarray(x).reshape(B * P, -1) for x in (batch.ids, batch.mask))  # [B,P,S] -> [BP,S]
        text = encode_text(params["text_encoder"], text_encoder, ids, mask, placement)
        predicted = wan.velocity(
            params["transformer"],
            transformer,
            jnp.concatenate([past, now], axis=1),  # [B,2T,H,W,C]
            1000.0 * jnp.repeat(jnp.concatenate([past_level, level], axis=1), pattern.chunk, axis=1),  # [B,2T]
            jnp.tile(text.reshape(B, P, *text.shape[1:]), (1, 2, 1, 1)),  # [BP,S,D] -> [B,2P,S,D]
            pattern=pattern,
            text_length=text_length,
            remat=remat,
            placement=placement,
        )
        return predicted[:, now.shape[1] :]

    return predict


def _mean(error: Array, weight: Array) -> Array:
    return jnp.sum(error * weight) / jnp.maximum(jnp.sum(weight), 1.0)
