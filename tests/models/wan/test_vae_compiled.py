"""The decoder compiled for an H200 that is not there: what it reads and writes between its convolutions.

Needs the CUDA compiler (`make kernels`), no GPU.
"""

import re
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest

from jvdiff import plan
from jvdiff.models import wan
from jvdiff.sharding import Placement

pytestmark = pytest.mark.skipif(
    not (find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13")), reason="the CUDA compiler is not installed"
)
C, H, W = 64, 16, 24
CFG = wan.VAEConfig(
    base_dim=C, dim_mult=(1, 1, 1), num_res_blocks=1, temperal_downsample=(True, True), z_dim=4,
    latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4,
)  # fmt: skip


def compiled(arithmetic):
    """The program of a latent frame behind the first, whose cache is donated."""
    everywhere = Placement(plan.target_mesh("h200")).everywhere
    put = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere))
    params, latents = put((wan.abstract_params(CFG), jax.ShapeDtypeStruct((1, 1, H, W, 4), jnp.float32)))
    step = partial(wan.decode_chunk, cfg=CFG, arithmetic=arithmetic)
    cache = put(jax.eval_shape(lambda p, z: step(p, latents=z, cache=None)[1], params, latents))
    run = jax.jit(lambda params, latents, cache: step(params, latents=latents, cache=cache), donate_argnums=2)
    return run.trace(params, latents, cache).lower(lowering_platforms=("cuda",)).compile().as_text()


def test_frames_are_stacked_in_one_pass_and_no_cache_is_copied():
    """Each convolution of four large frames reads three in channels. They are written once, from the two that are
    remembered and the new ones; these joined are no array. What is remembered goes where it was before."""
    text = compiled("bf16")
    entry = text[text.index("\nENTRY") :]
    frames = f"{4 * H},{4 * W}"
    stacked = re.findall(rf"= bf16\[1,4,{frames},{3 * C}\]\S* fusion\(%[\w.]+, %cache__", entry)
    assert len(stacked) == 4  # all large and wide convolutions, from what is remembered itself
    assert not re.findall(rf"= bf16\[1,6,{frames},", entry)
    assert not re.findall(rf"= bf16\[1,2,{frames},{C}\]\S* copy\(", entry)
    convolutions = re.findall(r"= \((\w+)\[.*__cudnn\$conv", entry)
    assert len(convolutions) > 20 and set(convolutions) == {"bf16"}


def test_exact_is_never_tf32():
    text = compiled("exact")
    convolutions = [line for line in text.splitlines() if "__cudnn$conv" in line]
    assert len(convolutions) > 20 and all("operand_precision={highest,highest" in line for line in convolutions)
