"""The decoder compiled for eight H200s that are not there: how it multiplies, and what is sent between them.

Needs the CUDA compiler (`make kernels`), no GPU.
"""

import re
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest

from jvdiff import plan
from jvdiff.models.hunyuan_video import vae
from jvdiff.models.hunyuan_video.vae_config import VAEConfig
from jvdiff.sharding import MeshShape

pytestmark = pytest.mark.skipif(
    not (find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13")), reason="the CUDA compiler is not installed"
)
CFG = VAEConfig(block_out_channels=(32, 32, 32), latent_channels=4, layers_per_block=1, norm_num_groups=8)
T, H, W = 2, 8, 16


def test_exact_is_never_tf32_and_neighbours_send_lines_alone():
    placement = plan.target_placement("h200", MeshShape(sequence=8))
    put = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement.everywhere))
    params, latents = put((vae.abstract_params(CFG), jax.ShapeDtypeStruct((1, T, H, W, 4), jnp.float32)))
    run = jax.jit(lambda p, z: vae.decode_piece(p, CFG, z, placement=placement, arithmetic="exact"))
    text = plan.compile_for(placement, run, params, latents).as_text()
    convolutions = [line for line in text.splitlines() if "__cudnn$conv" in line]
    assert len(convolutions) > 20 and all("operand_precision={highest,highest" in line for line in convolutions)
    sent = dict[str, set[str]]()
    for line in text.splitlines():
        if found := re.search(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", line):
            sent.setdefault(found[2], set()).update(re.findall(r"f32\[([0-9,]+)\]", found[1]))
    assert set(sent) == {"all-gather", "all-reduce", "collective-permute"}
    columns = {f"1,{1 + 4 * (T - 1) // cell},{H * 4 // cell + 2},1,32" for cell in (4, 2, 1)}
    assert sent["collective-permute"] <= columns | {f"1,{T},{H + 2},1,4"}  # strips: a column with its corners
    assert sent["all-reduce"] == {"1,32"}  # a sum for each channel
    assert sent["all-gather"] == {f"{T},{H},{W // 8},32", f"{T},{H},{W},32"}  # keys and values of attention
