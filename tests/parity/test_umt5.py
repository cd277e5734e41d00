"""UMT5 against transformers' UMT5EncoderModel, live, with weights scaled so that no layer is idle."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.models.text import umt5
from jvdiff.models.text.umt5_names import RULES
from jvdiff.weights import naming as rules

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

CFG = umt5.Config(vocab_size=97, d_model=48, d_kv=16, d_ff=80, num_layers=3, num_heads=5)
LENGTH = 181  # odd, and beyond relative_attention_max_distance, so that every bucket is used


def reference(seed):
    """A torch model whose every layer changes the result, and its weights in our tree."""
    torch.manual_seed(seed)
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**CFG.to_json())).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "layer_norm" in name:
                tensor.copy_(1 + 0.2 * torch.randn_like(tensor))
            elif "relative_attention_bias" in name:
                tensor.copy_(torch.randn_like(tensor))
            elif ".q." in name:  # scores of unit size
                tensor.copy_(torch.randn_like(tensor) * (CFG.d_model * CFG.d_kv) ** -0.5)
            elif "shared" not in name:
                tensor.copy_(torch.randn_like(tensor) * tensor.shape[1] ** -0.5)
            else:
                tensor.copy_(torch.randn_like(tensor))
    tensors = {k: v.numpy() for k, v in model.state_dict().items() if k != "encoder.embed_tokens.weight"}
    source = SimpleNamespace(tensors=tensors, read=tensors.__getitem__)
    params = rules.assemble(RULES, umt5.abstract_params(CFG), source)
    return model, jax.tree.map(jnp.asarray, params)


def batch(seed, length, lengths):
    ids = np.random.default_rng(seed).integers(2, CFG.vocab_size, (len(lengths), length), dtype=np.int32)
    mask = np.arange(length)[None, :] < np.asarray(lengths)[:, None]
    ids = np.where(mask, ids, 0)
    ids[np.arange(len(lengths)), np.asarray(lengths) - 1] = 1
    return ids, mask


def theirs(model, ids, mask):
    with torch.no_grad():
        out = model(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long())
    return out.last_hidden_state.float().numpy()


def error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


encode = jax.jit(umt5.encode, static_argnums=1)


@pytest.mark.parametrize(
    ("seed", "length", "lengths"),
    [(0, 7, (7, 3)), (1, LENGTH, (LENGTH, 100, 1)), (2, 33, (33,)), (3, 129, (5, 129))],
)
def test_float32(seed, length, lengths):
    model, params = reference(seed)
    ids, mask = batch(seed, length, lengths)
    want, got = theirs(model, ids, mask), np.asarray(encode(params, CFG, ids, mask))
    assert error(got[mask], want[mask]) <= 1e-5
    # The test means something only where each layer matters: leaving one out must be visible.
    for layer in range(CFG.num_layers):
        idle = jax.tree.map(lambda x: x, params)
        for part, leaf in (("attn", "out"), ("ffn", "down")):
            kernel = params["layers"][part][leaf]["kernel"]
            idle["layers"][part][leaf]["kernel"] = kernel.at[layer].set(0.0)
        assert error(np.asarray(encode(idle, CFG, ids, mask))[mask], want[mask]) > 0.1


def test_every_bucket_matches_torch():
    model, _ = reference(0)
    attention = model.encoder.block[0].layer[0].SelfAttention
    for buckets, farthest in ((32, 128), (32, 64), (8, 20), (64, 1000)):
        attention.relative_attention_num_buckets = buckets
        attention.relative_attention_max_distance = farthest
        positions = torch.arange(2048)
        want = attention._relative_position_bucket(positions[None, :] - positions[:, None]).numpy()
        cfg = umt5.Config(relative_attention_num_buckets=buckets, relative_attention_max_distance=farthest)
        np.testing.assert_array_equal(umt5._buckets(cfg, 2048), want)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_bfloat16_is_no_further_from_float32_than_transformers_is(seed):
    model, params = reference(seed)
    ids, mask = batch(seed, 65, (65, 21))
    exact = theirs(model, ids, mask)[mask]
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    ours = np.asarray(encode(rounded, CFG, ids, mask)).astype(np.float32)[mask]
    assert error(ours, exact) <= error(theirs(model.to(torch.bfloat16), ids, mask)[mask], exact)


def test_config_json_is_read_by_transformers_and_back(tmp_path):
    config = transformers.UMT5Config(**CFG.to_json())
    for field in vars(CFG):
        assert getattr(config, field) == getattr(CFG, field)
    assert umt5.Config.from_json(config.to_dict()) == CFG
    assert umt5.Config() == umt5.Config.from_json(transformers.UMT5Config().to_dict())
    assert umt5.Config.from_json({}) == umt5.Config()
