"""Training a text-to-video transformer, with its text encoder, by flow matching in latent space.

    B batch · T latent frames · H W latent grid · C latent channels · S text tokens · D text width

Source: rectified flow as Wan trains it (Wan technical report, 2025): x_t = (1 - sigma) x_0 + sigma noise, the network
predicts noise - x_0; sigma is logit-normal, shifted towards noise (Esser et al., 2024).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.kernels import Dense
from jvdiff.models import wan
from jvdiff.models.text import umt5
from jvdiff.models.wan import places
from jvdiff.sharding import Placement
from jvdiff.training.loop import Task, each
from jvdiff.types import Array, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What a training step sees.

    latents: [B,T,H,W,C] of any float dtype, normalised
    ids: tokens int32 [B,S], or [B,P,S] with a prompt for each of P parts of a clip
    mask: bool, as ids; true where there is a token
    pattern: of the self-attention; not an array but a part of the program: each that occurs in a training is compiled
    weight: float32 [B,P], of each part in the loss; None: all the same
    """

    latents: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    pattern: wan.Pattern = field(default=Dense(), metadata={"static": True})
    weight: np.ndarray | None = None


def text_to_video_task(
    transformer: wan.DiTConfig,
    text_encoder: umt5.Config,
    batches: Callable[[int], Batch],
    *,
    shift: float = 3.0,
    text_length: int = 512,
    remat: bool = False,
    pictures: float = 0.0,
    placement: Placement | None = None,
) -> Task:
    """Parameters {"transformer", "text_encoder"}, trained together; unconditional batches come from `batches`, and so
    does the pattern of each step.

    Args:
        pictures: the share of clips whose first latent frame is given, as a picture is: clean, at timestep 0, and
            without a part in the loss (Wan 2.2 TI2V). Above 0 each frame has a timestep.
        placement: the mesh that `fit` is given.
    """

    def loss(params: Params, batch: Batch, key: Array) -> tuple[Array, Mapping[str, Array]]:
        sigma_key, noise_key = jax.random.split(key)
        clean = batch.latents.astype(jnp.float32)
        sigma = noise_levels(sigma_key, clean.shape[:1], shift)
        noise = jax.random.normal(noise_key, clean.shape)
        levels = jnp.broadcast_to(sigma[:, None], clean.shape[:2])  # [B,T]
        if pictures:
            given = jax.random.bernoulli(jax.random.fold_in(key, 1), pictures, sigma.shape)
            levels = levels.at[:, 0].set(jnp.where(given, 0.0, sigma))
        level = levels[:, :, None, None, None]  # [B,T,1,1,1]
        ids, mask = jnp.asarray(batch.ids), jnp.asarray(batch.mask)
        text = encode_text(params["text_encoder"], text_encoder, ids, mask, placement)
        predicted = wan.velocity(
            params["transformer"],
            transformer,
            (1.0 - level) * clean + level * noise,
            1000.0 * (levels if pictures else sigma),
            text,
            pattern=batch.pattern,
            text_length=text_length,
            remat=remat,
            placement=placement,
        )
        error = jnp.mean((predicted - (noise - clean)) ** 2, axis=(2, 3, 4))  # [B,T]
        error = jnp.mean(error, axis=1, where=levels > 0)  # [B]
        noisy = (sigma > 0.75).astype(jnp.float32)
        return jnp.mean(error), {"loss_noisy": jnp.sum(error * noisy) / jnp.maximum(jnp.sum(noisy), 1.0)}

    init = partial(init_both, transformer, text_encoder)
    return Task(init=init, loss=loss, batches=each(batches), rules=(*places.DIT, *umt5.PLACES))


def init_both(transformer: wan.DiTConfig, text_encoder: umt5.Config, key: Array) -> Params:
    """Float32 parameters {"transformer", "text_encoder"} to train from."""
    one, two = jax.random.split(key)
    return {"transformer": wan.init_params(one, transformer), "text_encoder": umt5.init_params(two, text_encoder)}


def noise_levels(key: Array, shape: tuple[int, ...], shift: float) -> Array:
    """Random sigmas in 0..1, float32 of this shape: logit-normal, bent towards noise by the shift."""
    sigma = jax.nn.sigmoid(jax.random.normal(key, shape))
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def encode_text(params: Params, cfg: umt5.Config, ids: Array, mask: Array, placement: Placement | None = None) -> Array:
    """Text rows [B,S+1,D] as the pipeline makes them: zero beyond each prompt's end, and one zero row more at the end,
    which stands for all the padding up to `text_length`."""
    states = umt5.encode(params, cfg, ids, mask, placement=placement)
    return jnp.pad(jnp.where(mask[:, :, None], states, 0), ((0, 0), (0, 1), (0, 0)))
