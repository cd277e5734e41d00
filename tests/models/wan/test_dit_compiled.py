"""The step of the pipeline compiled for an H200 that is not there: what its kernels join, read from the text.

Needs the CUDA compiler (`make kernels`), no GPU.
"""

import dataclasses
import re
from importlib.util import find_spec

import jax
import pytest

from jvdiff import plan, sample
from jvdiff.sharding.collectives import size, walk

pytestmark = pytest.mark.skipif(
    not (find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13")), reason="the CUDA compiler is not installed"
)
LAYERS, WIDTH, FFN, ROWS = 2, 256, 512, 64
TOKENS = 3 * 8 * 8


@pytest.fixture(scope="module")
def kernels(tiny_repository):
    """What a layer runs of the denoising program: 64 rows of text, which stand for 512."""
    config = sample.default_config()
    config.update({"checkpoint": str(tiny_repository), "precision": "bfloat16", "plan_target": "h200", "guidance": 1.0})
    config.update({"num_frames": 9, "height": 128, "width": 128})
    plan.check_target("h200")
    context, clip = plan.resolved(config)
    dit = context.models.configs["transformer"]
    dit = dataclasses.replace(dit, num_layers=LAYERS, attention_head_dim=WIDTH // 2, ffn_dim=FFN)
    models = dataclasses.replace(context.models, configs={**context.models.configs, "transformer": dit})

    def longest(*request):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0], ROWS), x.dtype), before(*request))

    before = context.family.longest
    family = dataclasses.replace(context.family, longest=longest)
    text = plan.stage_text(dataclasses.replace(context, family=family, models=models), clip, "denoise", "h200")
    layer = [run.instruction for run in walk(text) if run.runs == LAYERS and not run.fused]
    return layer


def test_gelu_is_cublaslts(kernels):
    """In the epilogue of the first product of the feed-forward layers; biases likewise."""
    epilogues = re.findall(r'"epilogue":"(\w+)"', "".join(each.attributes for each in kernels))
    assert epilogues.count("BIAS_GELU") == 1 and epilogues.count("BIAS") >= 4
    assert not [each for each in kernels if "tanh" in each.source]


def test_norms_leave_no_float32_to_the_rotation(kernels):
    written = [each for each in kernels if "self_attn" in each.source and each.opcode == "fusion"]
    assert written and all(size(each.type) <= 2 * TOKENS * WIDTH for each in written)


def test_attention_to_text_is_to_the_rows_that_there_are(kernels):
    found = [each.type for each in kernels if "__cudnn$fmha" in each.attributes and "cross_attn" in each.source]
    assert len(found) == 1 and f"f32[1,2,{TOKENS}]" in found[0]
    assert not [each for each in kernels if "[1,512,2," in each.type]
