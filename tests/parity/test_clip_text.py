"""CLIP's text tower against transformers' CLIPTextModel, live, with random weights."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from jvdiff.models.text import clip_text, clip_text_names  # noqa: E402
from jvdiff.weights import naming  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SIZES = {"vocab_size": 53, "hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3}
encode = jax.jit(clip_text.encode, static_argnums=1)


def reference(seed, **sizes):
    """(torch model, configuration, weights in our tree) of which no layer is idle."""
    torch.manual_seed(seed)
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**SIZES, **sizes})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            narrow = 0.3 if p.ndim == 1 or "embedding" in name else p.shape[-1] ** -0.5
            p.normal_(float("norm" in name and name.endswith("weight")), narrow)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items() if "position_ids" not in name}
    cfg = clip_text.Config.from_json(model.config.to_dict())
    source = SimpleNamespace(tensors=tensors, read=tensors.__getitem__)
    params = naming.assemble(clip_text_names.RULES, clip_text.abstract_params(cfg), source)
    return model, cfg, jax.tree.map(jnp.asarray, params)


def texts(seed, lengths, end, pad):
    """Ids in front of `end`, and behind it `pad`: rows of 77."""
    ids = np.random.default_rng(seed).integers(3, 50, (len(lengths), 77), dtype=np.int32)
    at, length = np.arange(77)[None], np.asarray(lengths)[:, None]
    return np.where(at < length, ids, np.where(at == length, end, pad)).astype(np.int32)


def pooled(model, ids):
    with torch.inference_mode():
        return model(torch.from_numpy(ids).long()).pooler_output.float().numpy()


def error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
    ("seed", "sizes", "end", "pad"),
    [
        (0, {"num_hidden_layers": 3, "eos_token_id": 2}, 52, 52),  # as it is published: the highest id ends a text
        (1, {"num_hidden_layers": 2, "eos_token_id": 51}, 51, 52),  # the first of its id does, and a higher one may be
        (2, {"num_hidden_layers": 1, "hidden_act": "gelu", "eos_token_id": 2}, 52, 0),
    ],
)
def test_float32(seed, sizes, end, pad):
    model, cfg, params = reference(seed, **sizes)
    ids = texts(seed, (76, 0, 9), end, pad)
    want, ours = pooled(model, ids), np.asarray(encode(params, cfg, ids))
    assert ours.shape == want.shape == (3, 36) and error(ours, want) <= 1e-5
    for layer in range(cfg.num_hidden_layers):
        for part, leaf in (("attn", "out"), ("mlp", "down")):
            idle = jax.tree.map(lambda x: x, params)
            idle["layers"][part][leaf]["kernel"] = params["layers"][part][leaf]["kernel"].at[layer].set(0.0)
            assert error(np.asarray(encode(idle, cfg, ids)), want) > 0.02, (part, layer)


def test_bfloat16_is_no_further_from_float32_than_transformers_is():
    model, cfg, params = reference(3, num_hidden_layers=3, eos_token_id=2)
    ids = texts(3, (20, 76), 52, 52)
    exact = pooled(model, ids)
    ours = np.asarray(encode(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), cfg, ids)).astype(np.float32)
    assert error(ours, exact) <= error(pooled(model.to(torch.bfloat16), ids), exact)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_a_folder_is_read_by_transformers(tmp_path, prefix):
    """Under both spellings of the names; ours is the one with a prefix, as it is published."""
    from safetensors.numpy import save_file

    model, cfg, params = reference(4, num_hidden_layers=2, eos_token_id=2)
    tensors = dict(naming.disassemble(clip_text_names.RULES, params))
    assert all(name.startswith("text_model.") for name in tensors)
    tensors = {prefix + name.removeprefix("text_model."): x for name, x in tensors.items()}
    transformers.CLIPTextConfig(**cfg.to_json()).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = texts(4, (12,), 52, 52)
    again = transformers.CLIPTextModel.from_pretrained(tmp_path)
    assert clip_text.Config.from_json(again.config.to_dict()) == cfg
    np.testing.assert_array_equal(pooled(again, ids), pooled(model, ids))
    source = SimpleNamespace(tensors=tensors, read=tensors.__getitem__)
    read = naming.assemble(clip_text_names.RULES, clip_text.abstract_params(cfg), source)
    jax.tree.map(np.testing.assert_array_equal, read, jax.tree.map(np.asarray, params))
