"""Picture encoders, and how pictures are made ready for networks."""

from jvdiff.lazy import attach

__all__ = ["clip", "clip_names", "pictures"]

__getattr__ = attach(__name__, __all__)
