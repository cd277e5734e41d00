"""A whole HunyuanVideo repository in Hugging Face layout, random and tiny; no leaf is zero, so that nothing is idle."""

import json

import numpy as np
from safetensors.numpy import save_file

from jvdiff.models.hunyuan_video import prompts, vae_config
from jvdiff.models.hunyuan_video.config import DiTConfig
from jvdiff.models.hunyuan_video.family import TEXT_TO_VIDEO
from jvdiff.models.text import byte_pairs, clip_text, llama
from jvdiff.weights.naming import disassemble, flatten, unflatten
from tests.models.text import tiny_tokenizers

WORDS = ["a", "red", "blue", "seven", "two", "moving", "left", "right"]
CLASSES = {
    "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
    "text_encoder": ["transformers", "LlamaModel"],
    "text_encoder_2": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "LlamaTokenizerFast"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 7.0}


def configs(folder, **transformer):
    """Of a repository whose tokenizers are there; transformer: fields of its configuration."""
    sizes = [byte_pairs.load(folder / "tokenizer"), byte_pairs.load_clip(folder / "tokenizer_2")]
    words, pieces = (tokenizer.get_vocab_size() for tokenizer in sizes)
    dit = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
        "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 12,
        "rope_axes_dim": (4, 6, 6),
    }  # fmt: skip
    return {
        "transformer": DiTConfig(**{**dit, **transformer}),
        "vae": vae_config.VAEConfig(
            latent_channels=4, block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=2
        ),
        "text_encoder": llama.Config(
            rms_norm_eps=1e-5, rope_theta=500000.0, vocab_size=words, hidden_size=16, intermediate_size=24,
            num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        ),
        "text_encoder_2": clip_text.Config(
            vocab_size=pieces, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            eos_token_id=2,
        ),
    }  # fmt: skip


def write(root, seed=0, **transformer):
    """The repository in `root`, a folder that is made; transformer: fields of its configuration."""
    tiny_tokenizers.save_llama([prompts.TEMPLATE, " ".join(WORDS), *(f" {word}" for word in WORDS)], root / "tokenizer")
    tiny_tokenizers.save_clip(WORDS, root / "tokenizer_2")
    random = np.random.default_rng(seed)
    for name, cfg in configs(root, **transformer).items():
        part, leaves = TEXT_TO_VIDEO.parts[name], {}
        for path, leaf in flatten(part.abstract(cfg, np.float32)).items():
            kernel = path.endswith(("kernel", "embedding"))
            size = max(int(np.prod(leaf.shape[-2:-1])), 1) ** -0.5 if kernel else 0.2
            values = np.float32(size) * random.standard_normal(leaf.shape, np.float32)
            leaves[path] = values + np.float32(path.endswith("scale"))
        tensors = dict(disassemble(part.names(cfg), unflatten(leaves)))
        if name == "text_encoder":
            tensors |= _last_layers(cfg, tensors, random)
        put(root / name / "config.json", cfg.to_json())
        save_file(tensors, root / name / f"{part.stem}.safetensors")
    put(root / "scheduler" / "scheduler_config.json", SCHEDULER)
    put(root / "model_index.json", {"_class_name": "HunyuanVideoPipeline", **CLASSES})
    return root


def _last_layers(cfg, tensors, random):
    """What is published of the encoder, and not used."""
    last = {}
    for name, x in tensors.items():
        for layer in range(cfg.layers, cfg.num_hidden_layers):
            if name.startswith("layers.0."):
                last[name.replace("layers.0.", f"layers.{layer}.")] = random.standard_normal(x.shape, np.float32)
    return last | {"norm.weight": np.ones(cfg.hidden_size, np.float32)}


def put(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
