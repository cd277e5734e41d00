"""Diffusers loads what `convert.to_hf` writes, with every weight equal."""

import numpy as np
import pytest

from convert.__main__ import convert
from convert.to_hf import to_hf

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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(tiny_repository, tmp_path, dtype):
    convert(tiny_repository, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "hf", dtype)
    theirs = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "hf" / "vae", torch_dtype=getattr(torch, dtype))
    given = diffusers.AutoencoderKLWan.from_pretrained(tiny_repository / "vae", torch_dtype=getattr(torch, dtype))
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, given.state_dict()[key])
