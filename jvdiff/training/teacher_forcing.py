"""Training a transformer that makes a video chunk by chunk, by flow matching behind a clean past.

    B batch · T latent frames · H W latent grid · C latent channels · P chunks · S text tokens · D text width

Source: teacher forcing, as CausVid (arXiv 2412.07772) and Self-Forcing (arXiv 2506.08009) describe it. Every chunk is
noised to a level of its own and sees the chunks before it clean, all in one forward pass over two copies of the clip
(`kernels.BlockCausal`). A rollout's past is not clean but the model's own: so the copy that is looked at is noised a
little too, to a level that is drawn for each chunk and told to the network, and a rollout may do the same
(`context_noise`).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jvdiff.kernels import BlockCausal
from jvdiff.models import umt5, wan
from jvdiff.sharding import Placement
from jvdiff.sharding.rules import UMT5, WAN_DIT
from jvdiff.training.flow_matching import Batch, encode_text, noise_levels
from jvdiff.training.loop import Task, each
from jvdiff.types import Array, Params


def teacher_forcing_task(
    transformer: wan.DiTConfig,
    text_encoder: umt5.Config,
    batches: Callable[[int], Batch],
    pattern: BlockCausal,
    *,
    shift: float = 3.0,
    context_noise: float = 0.0,
    text_length: int = 512,
    remat: bool = False,
    placement: Placement | None = None,
) -> Task:
    """Parameters {"transformer", "text_encoder"}, trained together on latents [B,T,H,W,C] of P whole chunks, with token
    ids [B,P,S] and masks: a prompt for each chunk. `pattern` says how far a chunk sees.

    context_noise: the highest noise level 0..1 of the past; levels are drawn towards 0.
    """
    doubled = BlockCausal(pattern.chunk, pattern.window, pattern.sink, teacher_forcing=True)

    def init(key: Array) -> Params:
        one, two = jax.random.split(key)
        return {
            "transformer": wan.init_params(one, transformer),
            "text_encoder": umt5.init_params(two, text_encoder),
        }

    def loss(params: Params, batch: Batch, key: Array) -> tuple[Array, Mapping[str, Array]]:
        keys = jax.random.split(key, 4)
        clean = batch.latents.astype(jnp.float32)
        B, T = clean.shape[:2]
        P = T // pattern.chunk
        sigma = noise_levels(keys[0], (B, P), shift)
        context = context_noise * jax.random.uniform(keys[1], (B, P)) ** 2
        level = jnp.repeat(jnp.concatenate([context, sigma], axis=1), pattern.chunk, axis=1)  # [B,2T]
        noise = jax.random.normal(keys[2], (B, 2 * T, *clean.shape[2:]))
        mix = level[:, :, None, None, None]
        latents = (1.0 - mix) * jnp.concatenate([clean, clean], axis=1) + mix * noise

        ids, mask = (jnp.asarray(x).reshape(B * P, -1) for x in (batch.ids, batch.mask))
        text = encode_text(params["text_encoder"], text_encoder, ids, mask, placement)
        text = jnp.tile(text.reshape(B, P, *text.shape[1:]), (1, 2, 1, 1))
        predicted = wan.velocity(
            params["transformer"],
            transformer,
            latents,
            1000.0 * level,
            text,
            pattern=doubled,
            text_length=text_length,
            remat=remat,
            placement=placement,
        )
        wanted = noise[:, T:] - clean
        error = jnp.mean((predicted[:, T:] - wanted).reshape(B, P, -1) ** 2, axis=2)
        noisy = (sigma > 0.75).astype(jnp.float32)
        return jnp.mean(error), {"loss_noisy": jnp.sum(error * noisy) / jnp.maximum(jnp.sum(noisy), 1.0)}

    return Task(init=init, loss=loss, batches=each(batches), rules=(*WAN_DIT, *UMT5))
