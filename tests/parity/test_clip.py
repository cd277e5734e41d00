"""CLIP's picture tower against transformers', live: the stream before the last layer, with random weights."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.models.vision import clip, clip_names
from jvdiff.weights import naming

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

TINY = {"hidden_size": 24, "intermediate_size": 50, "num_attention_heads": 3, "image_size": 17, "patch_size": 5}


@pytest.mark.parametrize(
    ("projected", "sizes"),
    [
        (True, TINY | {"num_hidden_layers": 4, "hidden_act": "gelu"}),
        (False, TINY | {"num_hidden_layers": 2}),  # the class's quick_gelu, and names without their prefix
        (True, TINY | {"num_hidden_layers": 1, "hidden_size": 160, "num_attention_heads": 2}),  # heads of 80, no layer
    ],
)
def test_float32(projected, sizes):
    torch.manual_seed(0)
    kind = transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel
    model = kind(transformers.CLIPVisionConfig(**sizes, projection_dim=8)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(float("norm" in name and name.endswith("weight")), 0.3 if p.ndim == 1 else p.shape[-1] ** -0.5)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items() if "position_ids" not in name}
    config = {**model.config.to_diff_dict(), "_attn_implementation": None}
    cfg = clip.Config.from_json(clip.complete(config, tensors))
    source = SimpleNamespace(tensors=tensors, read=tensors.__getitem__)
    params = naming.assemble(clip_names.rules(cfg), clip.abstract_params(cfg), source)
    pixels = np.random.default_rng(0).standard_normal((2, 17, 17, 3), np.float32)
    ours = jax.jit(clip.encode, static_argnums=1)(jax.tree.map(jnp.asarray, params), cfg, pixels)
    with torch.inference_mode():
        theirs = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), output_hidden_states=True).hidden_states
    assert ours.shape == (2, cfg.tokens, cfg.hidden_size) == tuple(theirs[-2].shape)
    error = lambda a: float(np.linalg.norm(np.asarray(ours) - a.numpy()) / np.linalg.norm(a.numpy()))  # noqa: E731
    assert error(theirs[-2]) <= 1e-5 and error(theirs[-1]) > 0.05, (error(theirs[-2]), error(theirs[-1]))
