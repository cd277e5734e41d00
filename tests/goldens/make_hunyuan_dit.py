"""Writes hunyuan_dit.json beside this file: what diffusers' HunyuanVideo transformer makes of small numbers.

    python tests/goldens/make_hunyuan_dit.py        needs torch and diffusers (`pip install -e .[parity]`)

Weights and inputs follow from a seed, and from the names and shapes of the tensors, by `tensor` and `inputs`: the test
makes the same.
"""

import json
import pathlib
import zlib

import numpy as np

CONFIG = dict(
    num_attention_heads=4, attention_head_dim=8, rope_axes_dim=[2, 4, 2], num_layers=1, num_single_layers=2,
    num_refiner_layers=1, mlp_ratio=2.5, text_embed_dim=6, pooled_projection_dim=5, in_channels=2, out_channels=2,
)  # fmt: skip


def tensor(name, shape):
    """A tensor of the file: none is idle, and norms stay near one."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    draw = random.uniform(-1, 1, shape)
    if len(shape) > 1:
        sharp = any(word in name for word in ("to_q", "to_k", "add_q", "add_k"))
        return (draw * (4 if sharp else 1.7) * np.prod(shape[1:]) ** -0.5).astype(np.float32)
    return (draw * 0.4 + ("norm" in name and name.endswith("weight"))).astype(np.float32)


def inputs():
    """latents [2,3,4,6,2], timestep, states, mask, pooled, guidance: two clips with texts of 5 rows and of 2."""
    random = np.random.default_rng(0)
    latents, states, pooled = (
        random.uniform(-2, 2, n).astype(np.float32) for n in ((2, 3, 4, 6, 2), (2, 5, 6), (2, 5))
    )
    mask = np.arange(5)[None] < np.array([[5], [2]])
    return latents, np.float32([882.3529, 30]), states, mask, pooled, np.float32([6000, 1000])


def main():
    import diffusers
    import torch

    model = diffusers.HunyuanVideoTransformer3DModel(**CONFIG).eval().double()
    model.load_state_dict({k: torch.from_numpy(tensor(k, v.shape)).double() for k, v in model.state_dict().items()})
    latents, timestep, states, mask, pooled, guidance = map(torch.from_numpy, inputs())
    text = states.double(), mask.long(), pooled.double()
    with torch.inference_mode():
        out = model(latents.permute(0, 4, 1, 2, 3).double(), timestep, *text, guidance, return_dict=False)[0]
    out = out.permute(0, 2, 3, 4, 1)
    values = [float(f"{x:.8g}") for x in out.flatten().tolist()]
    path = pathlib.Path(__file__).with_name("hunyuan_dit.json")
    versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
    path.write_text(json.dumps({"versions": versions, "velocity": values}) + "\n")


def expected():
    """The velocity [2,3,4,6,2] in the file."""
    path = pathlib.Path(__file__).with_name("hunyuan_dit.json")
    return np.array(json.loads(path.read_text())["velocity"]).reshape(inputs()[0].shape)


if __name__ == "__main__":
    main()
