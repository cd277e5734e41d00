"""Moving digits: the clips, a tokenizer for their prompts, a judge, and the runs that make the models that ship."""

from jvdiff.lazy import attach

__all__ = ["clips", "judge", "runs", "tokenizer"]

__getattr__ = attach(__name__, __all__)
