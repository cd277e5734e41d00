"""Prompts to states and pooled vectors against diffusers' HunyuanVideoPipeline, live."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


from jvdiff.models.hunyuan_video import prompts  # noqa: E402
from jvdiff.models.text import byte_pairs, llama  # noqa: E402
from tests.models.text import tiny_tokenizers  # noqa: E402
from tests.parity import test_clip_text, test_llama  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

PROMPTS = [" a  red cat\n walks, realistic", "", "red " * 300, "<b>don't</b> &amp; <|eot_id|> \u201c日本語\u201d"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """(diffusers' pipeline without its networks for video, our tokenizers, our encoders)."""
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny_tokenizers.save_llama([prompts.TEMPLATE, "a red cat walks", "red red"], folder / "tokenizer")
    tiny_tokenizers.save_clip(["red", "cat", "walks"], folder / "tokenizer_2")
    ours = byte_pairs.load(folder / "tokenizer"), byte_pairs.load_clip(folder / "tokenizer_2")
    sizes = [tokenizer.get_vocab_size() for tokenizer in ours]
    cfg = llama.Config.from_json({**test_llama.CFG.to_json(), "vocab_size": sizes[0]})
    text, params = test_llama.reference(0, cfg)
    tower, tower_cfg, tower_params = test_clip_text.reference(
        0, num_hidden_layers=2, eos_token_id=2, vocab_size=sizes[1]
    )
    pipe = diffusers.HunyuanVideoPipeline(
        text, transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"), None, None, None, tower,
        transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
    )  # fmt: skip
    return pipe, ours, (cfg, params), (tower_cfg, tower_params)


@pytest.mark.parametrize("texts", [PROMPTS[:2], PROMPTS, PROMPTS[3:]])
def test_states_mask_and_pooled_vector(encoders, texts):
    pipe, tokenizers, (cfg, params), (tower_cfg, tower_params) = encoders
    with torch.inference_mode():
        states, pooled, mask = (each.numpy() for each in pipe.encode_prompt(texts, device="cpu"))
    tokens = prompts.tokenize(*tokenizers, texts)
    assert (tokens.ids.dtype == np.int32 and tokens.ids.shape[1] < 351) or texts is PROMPTS
    rows, seen = prompts.crop(test_llama.encode(params, cfg, tokens.ids, tokens.mask), tokens.mask)
    length = seen.shape[1]
    np.testing.assert_array_equal(seen, mask[:, :length].astype(bool))
    assert not mask[:, length:].any()
    assert test_llama.error(np.asarray(rows)[seen], states[:, :length][seen]) <= 1e-5
    assert test_llama.error(np.asarray(test_clip_text.encode(tower_params, tower_cfg, tokens.clip)), pooled) <= 1e-5
    # To crop before the forward pass, which is cheaper, is something else.
    early = test_llama.encode(params, cfg, tokens.ids[:, prompts.CROP :], seen)
    assert test_llama.error(np.asarray(early)[seen], states[:, :length][seen]) > 0.1


def test_the_template_is_theirs():
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    assert {"template": prompts.TEMPLATE, "crop_start": prompts.CROP} == DEFAULT_PROMPT_TEMPLATE
