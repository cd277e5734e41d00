"""The converters; no torch.

from_diffusers: a Hugging Face repository becomes an Orbax directory.
to_diffusers: and back.
"""
