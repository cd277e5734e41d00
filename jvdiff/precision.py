"""What is computed in which dtype, as one explicit table; nothing else in the package chooses a dtype.

Names are those of the `precision` argument. Everything without a field below is float32 in every entry: latents, noise,
timesteps, solver state, guidance, norms, rotary angles, and the frames that leave the decoder.
"""

import dataclasses

from jvdiff.errors import UsageError
from jvdiff.runtime.target import Target, here


@dataclasses.dataclass(frozen=True)
class Precision:
    """One entry of the table: the dtype of parameters, and of the products with them, for each kind of part.

    name: of the entry
    transformer: of the denoising network
    text_encoder: of the text encoder
    vae: of the encoder and the decoder of frames
    softmax: of attention weights; float32 everywhere: records say so, and no code asks
    """

    name: str
    transformer: str
    text_encoder: str
    vae: str
    softmax: str = "float32"


TABLE = {
    "float32": Precision("float32", transformer="float32", text_encoder="float32", vae="float32"),
    # The decoder stays in float32: it is a small part of the time, and banding in flat areas is what bfloat16 costs.
    "bfloat16": Precision("bfloat16", transformer="bfloat16", text_encoder="bfloat16", vae="float32"),
}


def choose(name: str | None = None, target: Target | None = None) -> Precision:
    """The entry called `name`; None takes bfloat16 on a GPU and float32 elsewhere.

    target: what programs are made for; None: the devices at hand.

    Raises:
        UsageError: `name` is not in the table.
    """
    if name is None:
        name = "bfloat16" if (target or here()).platform == "gpu" else "float32"
    if name not in TABLE:
        raise UsageError(f"precision is {name!r}; expected one of {', '.join(sorted(TABLE))}.")
    return TABLE[name]
