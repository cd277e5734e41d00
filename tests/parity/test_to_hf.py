"""Diffusers loads what `convert.to_hf` writes, with every weight equal."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.from_diffusers import convert
from convert.to_diffusers import to_hf
from jvdiff.models import wan
from jvdiff.models.family import read_weights
from jvdiff.models.wan.family import TRANSFORMER
from jvdiff.pipeline import repository
from jvdiff.weights.naming import disassemble

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def test_the_pipeline_loads_and_samples(tiny_repository, tmp_path):
    convert(tiny_repository, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "hf")
    theirs = diffusers.WanPipeline.from_pretrained(tmp_path / "hf")
    source = diffusers.WanPipeline.from_pretrained(tiny_repository)
    for name in ("transformer", "vae", "text_encoder"):
        ours, given = getattr(theirs, name).state_dict(), getattr(source, name).state_dict()
        assert ours.keys() == given.keys()
        assert all(torch.equal(ours[key], given[key]) for key in ours)
    assert theirs.text_encoder.encoder.embed_tokens.weight.abs().sum() > 0
    out = theirs("a red seven", num_frames=5, height=16, width=16, num_inference_steps=2, output_type="np")
    assert out.frames.shape == (1, 5, 16, 16, 3)
    assert np.isfinite(out.frames).all()


def test_a_gate_of_sparse_attention_is_passed_over(tiny_repository, tmp_path):
    """Diffusers has dense attention only: it takes the rest of the transformer."""
    cfg = repository.inspect(tiny_repository).models.configs["transformer"]
    gated = dataclasses.replace(cfg, gate_compress=True)
    params = read_weights(tiny_repository / "transformer", TRANSFORMER, cfg, np.float32)
    params["blocks"]["self_attn"]["gate"] = wan.init_params(jax.random.key(0), gated)["blocks"]["self_attn"]["gate"]
    shutil.copytree(tiny_repository, tmp_path / "hf")
    (tmp_path / "hf" / "transformer" / "config.json").write_text(json.dumps(gated.to_json()))
    file = tmp_path / "hf" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(dict(disassemble(TRANSFORMER.names(gated), jax.tree.map(np.asarray, params))), file)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "hf" / "transformer").state_dict()
    given = diffusers.WanTransformer3DModel.from_pretrained(tiny_repository / "transformer").state_dict()
    assert theirs.keys() == given.keys() and all(torch.equal(theirs[key], given[key]) for key in given)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(tiny_repository, tmp_path, dtype):
    convert(tiny_repository, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "hf", dtype)
    theirs = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "hf" / "vae", torch_dtype=getattr(torch, dtype))
    given = diffusers.AutoencoderKLWan.from_pretrained(tiny_repository / "vae", torch_dtype=getattr(torch, dtype))
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, given.state_dict()[key])
