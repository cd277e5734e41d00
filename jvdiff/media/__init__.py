"""Pictures and videos as files, and folders of clips to train on."""

from jvdiff.lazy import attach

__all__ = ["clips", "fragmented_mp4", "pictures", "video"]

__getattr__ = attach(__name__, __all__)
