"""Llama against transformers' LlamaModel, live, with weights scaled so that no layer is idle."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from jvdiff.models.text import llama, llama_names  # noqa: E402
from jvdiff.weights import naming  # noqa: E402

pytestmark = pytest.mark.parity

CFG = llama.Config(
    rms_norm_eps=3e-3, rope_theta=500000.0, vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=5,
    num_attention_heads=6, num_key_value_heads=2, head_dim=10,
)  # fmt: skip
encode = jax.jit(llama.encode, static_argnums=1, static_argnames="dtype")


def reference(seed, cfg=CFG):
    """A torch model whose every layer changes the result, and its weights in our tree."""
    torch.manual_seed(seed)
    model = transformers.LlamaModel(transformers.LlamaConfig(**cfg.to_json())).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            wide = tensor.ndim > 1 and "embed" not in name
            tensor.normal_(float("norm" in name), 0.2 if "norm" in name else tensor.shape[1] ** -0.5 if wide else 1.0)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    unused = llama_names.ignored(cfg)
    kept = {name: x for name, x in tensors.items() if not naming.is_ignored(name, unused)}
    source = SimpleNamespace(tensors=tensors, read=kept.__getitem__)  # what is ignored cannot be read
    leaves = naming.stream(llama_names.RULES, llama.abstract_params(cfg), source, ignored=unused)
    return model, jax.tree.map(jnp.asarray, naming.unflatten(dict(leaves)))


def batch(seed, lengths):
    ids = np.random.default_rng(seed).integers(0, CFG.vocab_size, (len(lengths), max(lengths)), dtype=np.int32)
    return ids, np.arange(max(lengths))[None, :] < np.asarray(lengths)[:, None]


def theirs(model, ids, mask):
    with torch.inference_mode():
        out = model(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask), output_hidden_states=True)
    return [states.float().numpy() for states in out.hidden_states]


def error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(("seed", "lengths"), [(0, (7, 3)), (1, (351, 97, 1)), (2, (33,))])
def test_float32(seed, lengths):
    model, params = reference(seed)
    ids, mask = batch(seed, lengths)
    states, ours = theirs(model, ids, mask), np.asarray(encode(params, CFG, ids, mask))
    assert error(ours[mask], states[-3][mask]) <= 1e-5
    assert len(states) == 6 and min(error(ours[mask], other[mask]) for other in (*states[:3], *states[4:])) > 0.1


def test_what_does_not_depend_on_padding():
    """The text may be cut to the longest prompt, padding may be any id, and every layer works."""
    model, params = reference(3)
    ids, mask = batch(3, (40, 21))
    want = theirs(model, ids, mask)[-3][:, :30]
    short = np.where(mask, ids, 17)[:, :30], mask[:, :30]
    assert error(np.asarray(encode(params, CFG, *short))[short[1]], want[short[1]]) <= 1e-5
    for layer in range(CFG.layers):
        for part, leaf in (("attn", "out"), ("ffn", "down")):
            idle = jax.tree.map(lambda x: x, params)
            idle["layers"][part][leaf]["kernel"] = params["layers"][part][leaf]["kernel"].at[layer].set(0.0)
            assert error(np.asarray(encode(idle, CFG, *short))[short[1]], want[short[1]]) > 0.05, (part, layer)


def test_rates_are_rounded_as_torch_rounds_them():
    """At position 350, a rate that is off by one unit in the last place makes an angle that is off by 4e-5."""
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    for theta, head_dim in ((500000.0, 128), (10000.0, 128), (10000.0, 64), (500000.0, 10)):
        cfg = llama.Config.from_json({**CFG.to_json(), "rope_theta": theta, "head_dim": head_dim})
        theirs = rotary(transformers.LlamaConfig(**cfg.to_json()))
        np.testing.assert_array_equal(llama._rates(cfg), theirs.inv_freq.numpy())


@pytest.mark.parametrize("seed", [0, 1])
def test_bfloat16_is_no_further_from_float32_than_transformers_is(seed):
    model, params = reference(seed)
    ids, mask = batch(seed, (65, 21))
    exact = theirs(model, ids, mask)[-3][mask]
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    ours = np.asarray(encode(rounded, CFG, ids, mask)).astype(np.float32)[mask]
    assert error(ours, exact) <= error(theirs(model.to(torch.bfloat16), ids, mask)[-3][mask], exact)


def test_a_folder_is_read_by_transformers_and_back(tmp_path):
    """What is written lacks the layers that are not used; transformers' state before them is the same."""
    from safetensors.numpy import save_file

    model, params = reference(4)
    ids, mask = batch(4, (9,))
    model.save_pretrained(tmp_path / "theirs")
    assert llama.Config.from_json(model.config.to_dict()) == llama.Config.from_json(CFG.to_json()) == CFG
    (tmp_path / "ours").mkdir()
    model.config.save_pretrained(tmp_path / "ours")
    tensors = dict(naming.disassemble(llama_names.RULES, params))
    assert not any(re.match(r"norm|layers\.[34]", name) for name in tensors)
    save_file(tensors, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    again = transformers.LlamaModel.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(theirs(again, ids, mask)[-3], theirs(model, ids, mask)[-3])
