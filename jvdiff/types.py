"""Axis letters and array aliases, the same in every file, einsum and comment.

B batch · T latent frames · H W latent grid · C latent channels · L video tokens · S text tokens · N heads ·
K head dim · D model width · F pixel frames · Y X pixel height, width.

Arrays are channels-last: latents [B,T,H,W,C], video [B,F,Y,X,3], attention operands [B,L,N,K].
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax

Array: TypeAlias = jax.Array
Params: TypeAlias = Mapping[str, Any]  # nested dict of arrays: the long-lived contract between all rooms
