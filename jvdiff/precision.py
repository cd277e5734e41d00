"""What is computed in which dtype, as one explicit table; nothing else in the package chooses a dtype.

Names are those of the `precision` argument. Everything without a field below is float32 in every entry: latents, noise,
timesteps, solver state, guidance, norms, rotary angles, and the frames that leave the decoder.

"float32" says what arrays are. Products of them are a GPU's TF32 there, which rounds their operands to 10 bits of
mantissa, unless JAX_DEFAULT_MATMUL_PRECISION=highest; elsewhere they are exact. Frames are decoded as `vae_decode`
says, whatever that variable is.
"""

import dataclasses
from typing import NamedTuple

from jvdiff.errors import UsageError
from jvdiff.runtime.target import Target, here


@dataclasses.dataclass(frozen=True)
class Precision:
    """One entry of the table: the dtype of parameters, and of the products with them, for each kind of part.

    name: of the entry
    transformer: of the denoising network
    text_encoder: of the text encoder
    image_encoder: of what encodes pictures for the transformer to attend to; diffusers keeps it in float32 too
    vae: of the weights of the encoder and the decoder of frames, and of what the encoder computes
    vae_decode: how frames are decoded, a name of DECODING
    softmax: of attention weights; float32 everywhere: records say so, and no code asks
    """

    name: str
    transformer: str
    text_encoder: str
    image_encoder: str
    vae: str
    vae_decode: str
    softmax: str = "float32"


TABLE = {  # as on a GPU; elsewhere frames are decoded exactly
    "float32": Precision(
        "float32",
        transformer="float32",
        text_encoder="float32",
        image_encoder="float32",
        vae="float32",
        vae_decode="tf32",
    ),
    # Encoding stays in float32: a rollout that begins with a picture drifts from what bfloat16 rounds.
    "bfloat16": Precision(
        "bfloat16",
        transformer="bfloat16",
        text_encoder="bfloat16",
        image_encoder="float32",
        vae="float32",
        vae_decode="bf16",
    ),
}


class Arithmetic(NamedTuple):
    """How a decoder computes; norms and sums are float32 in all of them.

    dtype: of the operands of products, of the stream between them, and of what is remembered
    products: `jax_default_matmul_precision` of those
    """

    dtype: str
    products: str


DECODING = {
    "exact": Arithmetic("float32", "highest"),  # true float32
    "tf32": Arithmetic("float32", "default"),  # as a GPU multiplies float32; elsewhere that is emulated
    "bf16": Arithmetic("bfloat16", "default"),
}


def choose(name: str | None = None, vae_decode: str | None = None, target: Target | None = None) -> Precision:
    """The entry called `name`; None takes bfloat16 on a GPU and float32 elsewhere.

    vae_decode: in place of the entry's. None: on a GPU the entry's, elsewhere exact.
    target: what programs are made for; None: the devices at hand.

    Raises:
        UsageError: `name` is not in the table, or `vae_decode` not in DECODING.
    """
    gpu = (target or here()).platform == "gpu"
    if name is None:
        name = "bfloat16" if gpu else "float32"
    if name not in TABLE:
        raise UsageError(f"precision is {name!r}; expected one of {', '.join(sorted(TABLE))}.")
    if vae_decode is None:
        vae_decode = TABLE[name].vae_decode if gpu else "exact"
    if vae_decode not in DECODING:
        raise UsageError(f"vae_decode is {vae_decode!r}; expected one of {', '.join(DECODING)}.")
    return dataclasses.replace(TABLE[name], vae_decode=vae_decode)


def told(dtypes: Precision) -> dict[str, str]:
    """An entry as a record has it: TF32 is called emulated where no GPU computes it."""
    emulated = dtypes.vae_decode == "tf32" and here().platform != "gpu"
    return dataclasses.asdict(dtypes) | ({"vae_decode": "tf32, emulated"} if emulated else {})
