"""FastWan against a few lines of torch around diffusers' networks: FastVideo's sampler, and its sparse attention.

B batch · L tokens · N heads · K head dim · T H W latent grid · C latent channels
"""

import json
import math
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import jvdiff
from convert.from_diffusers import convert as convert_checkpoint

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
MODULE = pytest.importorskip("diffusers.models.transformers.transformer_wan")
SIZE = {"num_frames": 9, "height": 48, "width": 80}
GRID, TILE = (3, 3, 5), (2, 2, 2)  # of tokens; no axis is a multiple of its tile


@pytest.fixture(scope="module")
def folders(tiny_few_step_repository, tmp_path_factory):
    """A FastWan repository, published and converted, and the published one as diffusers can load it."""
    root = tmp_path_factory.mktemp("fast")
    shutil.copytree(tiny_few_step_repository, root / "hf")
    convert_checkpoint(root / "hf", root / "orbax")
    shutil.copytree(root / "hf", root / "diffusers")
    index = json.loads((root / "hf" / "model_index.json").read_text())
    (root / "diffusers" / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanPipeline"}))
    return root


@pytest.fixture(scope="module")
def theirs(folders):
    pipe = diffusers.WanPipeline.from_pretrained(folders / "diffusers", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiles():
    """[tiles] lists of the tokens of each tile, by their places in the grid."""
    place = np.arange(math.prod(GRID)).reshape(GRID)
    starts = [range(0, n, a) for n, a in zip(GRID, TILE, strict=True)]
    return [
        place[t : t + TILE[0], h : h + TILE[1], w : w + TILE[2]].ravel()
        for t in starts[0] for h in starts[1] for w in starts[2]
    ]  # fmt: skip


class SparseAttention:
    """Video sparse attention of a layer, tile by tile: q, k, v as diffusers' own processor makes them."""

    def __init__(self, weight, bias, sparsity):
        self.weight, self.bias, self.sparsity = weight, bias, sparsity

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        B, L, _ = hidden_states.shape
        gate = torch.nn.functional.linear(hidden_states, self.weight, self.bias)
        seen = {}

        def attend(query, key, value, **_):  # in place of dense attention
            seen["qkv"] = query, key, value
            return query

        dense, MODULE.dispatch_attention_fn = MODULE.dispatch_attention_fn, attend
        try:
            MODULE.WanAttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        finally:
            MODULE.dispatch_attention_fn = dense
        q, k, v = seen["qkv"]  # [B,L,N,K]
        out = self._sparse(q, k, v) + self._coarse(q, k, v) * gate.view(q.shape)
        return attn.to_out[0](out.reshape(B, L, -1))

    def _means(self, x):
        return torch.stack([x[:, tile].mean(dim=1) for tile in tiles()], dim=1)  # [B,tiles,N,K]

    def _scores(self, q, k):
        return torch.einsum("bink,bjnk->bnij", q, k) * q.shape[-1] ** -0.5

    def _coarse(self, q, k, v):
        q, k, v = map(self._means, (q, k, v))
        means = torch.einsum("bnij,bjnk->bink", self._scores(q, k).softmax(-1), v)
        out = torch.empty(v.shape[0], math.prod(GRID), *v.shape[2:])
        for i, tile in enumerate(tiles()):
            out[:, tile] = means[:, i : i + 1]
        return out

    def _sparse(self, q, k, v):
        every = tiles()
        kept = max(1, math.ceil((1 - self.sparsity) * len(every)))
        best = self._scores(self._means(q), self._means(k)).topk(kept, dim=-1).indices  # [B,N,tiles,kept]
        out = torch.empty_like(q)
        for b in range(q.shape[0]):
            for n in range(q.shape[2]):
                for i, tile in enumerate(every):
                    keys = np.concatenate([every[j] for j in best[b, n, i].tolist()])
                    weights = (q[b, tile, n] @ k[b, keys, n].T * q.shape[-1] ** -0.5).softmax(-1)
                    out[b, tile, n] = weights @ v[b, keys, n]
        return out


def fastvideo_clip(pipe, prompts, noises):
    """Latents [B,T,H,W,C] of FastVideo's DMD stage: noises are the start and what is added, [3,B,T,H,W,C]."""
    start, *added = (torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy()) for noise in noises)
    grid = torch.arange(1000, 0, -1, dtype=torch.float32) / 1000
    sigmas = 8 * grid / (1 + 7 * grid)

    def sigma(t):
        return sigmas[torch.argmin((1000 * sigmas - t).abs())].double()

    with torch.inference_mode():
        text, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
        x, steps = start, (1000, 757, 522)
        for i, t in enumerate(steps):
            v = pipe.transformer(x, torch.full((len(prompts),), t), text, return_dict=False)[0]
            x = (x.double() - sigma(t) * v.double()).to(v.dtype)
            if i < 2:
                then = sigma(steps[i + 1])
                x = ((1 - then) * x + then * added[i].double()).to(v.dtype)
        mean, std = (
            torch.tensor(pipe.vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
        )
        frames = pipe.vae.decode(x * std + mean, return_dict=False)[0]
        frames = pipe.video_processor.postprocess_video(frames, output_type="np")
    return x.numpy().transpose(0, 2, 3, 4, 1), np.round(frames * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def ours(folders):
    return [jvdiff.load(folders / layout, precision="float32") for layout in ("hf", "orbax")]


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_three_steps(folders, ours, theirs, sparsity):
    """From a folder and from its converted form; at sparsity 0 every tile is seen, and the gate still adds its
    branch."""
    noises = np.random.default_rng(5).standard_normal((3, 1, 3, 6, 10, 4), np.float32)
    state = load_file(folders / "hf" / "transformer" / "diffusion_pytorch_model.safetensors")
    for layer, block in enumerate(theirs.transformer.blocks):
        gate = [torch.from_numpy(state[f"blocks.{layer}.to_gate_compress.{name}"]) for name in ("weight", "bias")]
        block.attn1.set_processor(SparseAttention(*gate, sparsity))
    latents, frames = fastvideo_clip(theirs, ["a red seven moving left"], noises)
    given = dict(pattern=f"video_sparse:2x2x2:{sparsity}", noise=noises[0], renoise=noises[1:], **SIZE)
    made, again = (jvdiff.generate(pipe, "a red seven moving left", **given) for pipe in ours)
    np.testing.assert_array_equal(made.latents, again.latents)
    error = np.linalg.norm(made.latents - latents) / np.linalg.norm(latents)
    psnr = 10 * np.log10(255**2 / max(np.mean((made.video.astype(np.float64) - frames) ** 2), 1e-12))
    print(f"sparsity {sparsity}: latents {error:.1e}, frames {psnr:.1f} dB")
    assert error <= 1e-4 and psnr >= 52
    assert latents.std() > 0.1 and frames.std() > 5  # there is something to compare
