"""Text encoders and their tokenizers."""

from jvdiff.lazy import attach

__all__ = ["byte_pairs", "clip_text", "llama", "spiece", "tokenizer", "umt5"]

__getattr__ = attach(__name__, __all__)
