"""Image-to-video and first-last-frame against diffusers' WanImageToVideoPipeline: pictures and prompt in, frames out.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width.
"""

import logging

import numpy as np
import pytest
from PIL import Image

import jvdiff
from convert.from_diffusers import convert
from convert.to_diffusers import to_hf
from jvdiff.digits import tokenizer as digits_tokenizer
from jvdiff.errors import UsageError
from jvdiff.pipeline import repository
from jvdiff.weights import safetensors

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

WORDS = ["a", "red", "blue", "seven", "two", "moving", "left", "right", "up"]
SIZE = {"num_frames": 9, "height": 16, "width": 32}
TILES = (16, 16, 16, 16)  # height and width of a tile, then of the stride
SIDE, TOKENS = 30, 17  # of a picture for the image encoder, of whose patches of 7 a border is left


def picture(seed, height=75, width=53):
    """A picture of another shape than the clip, smooth enough that resizing it matters."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def randomised(model, seed):
    """The model with every parameter away from zero, so that no layer is idle."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.2 if p.ndim == 1 else 0.5 if "scale_shift" in name or "pos_embed" in name else p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * std)
            if p.ndim == 1 and "norm" in name and name.endswith("weight"):
                p.add_(1)
    return model.eval()


def components(root, last):
    """What a pipeline of diffusers is made of; `last`: the transformer takes two pictures."""
    digits_tokenizer.save(digits_tokenizer.build(WORDS), root / "words")
    tokenizer = transformers.T5TokenizerFast.from_pretrained(root / "words")
    tower = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=7,
        hidden_act="gelu", projection_dim=12,
    )  # fmt: skip
    encoder = transformers.CLIPVisionModel if last else transformers.CLIPVisionModelWithProjection
    dit = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=12, out_channels=4, text_dim=24,
        freq_dim=32, ffn_dim=48, num_layers=2, image_dim=16, added_kv_proj_dim=32,
        pos_embed_seq_len=2 * TOKENS if last else None,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=6,
        z_dim=4,
        dim_mult=[1, 2, 2],
        temperal_downsample=[True, True],
        num_res_blocks=1,
        scale_factor_spatial=4,
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.0, 0.9, 1.1, 1.2],
    )
    text = transformers.UMT5Config(
        vocab_size=len(tokenizer),
        d_model=24,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": randomised(transformers.UMT5EncoderModel(text), 1),
        "vae": randomised(vae, 2),
        "transformer": randomised(dit, 3),
        "image_encoder": randomised(encoder(tower), 4),
        "image_processor": transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


@pytest.fixture(scope="module", params=[False, True], ids=["first", "first and last"])
def both(request, tmp_path_factory):
    """(where the folders are, ours, theirs, which pictures a request has)."""
    root = tmp_path_factory.mktemp("image_to_video")
    theirs = diffusers.WanImageToVideoPipeline(**components(root, request.param))
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(root / "hf")
    convert(root / "hf", root / "orbax", dtype="float32")
    to_hf(root / "orbax", root / "back")
    names = ("image", "last_image") if request.param else ("image",)
    return root, jvdiff.load(root / "hf", precision="float32"), theirs, names


CASES = {
    "two clips, two pictures": {"prompts": ["a  red seven\nmoving &amp; LEFT", "up"], "guidance": 4.0},
    "one frame, in tiles": {"prompts": ["a blue two"], "guidance": 1.0, "num_frames": 1},
}
GIVEN = {"negative_prompt": "blue right", "steps": 4}


def diffusers_clip(
    pipe, noise, prompts, guidance, negative_prompt, steps, size, image, last_image=None, guidance_2=None
):
    """(latents [B,T,H,W,C], frames uint8 [B,F,Y,X,3]) of WanImageToVideoPipeline, one clip after another: lists of
    pictures are refused, and several prompts repeat picture tokens wrongly."""
    latents, frames = [], []
    of = lambda pictures, i: Image.fromarray(pictures[i] if isinstance(pictures, list) else pictures)  # noqa: E731
    for i, prompt in enumerate(prompts):
        with torch.inference_mode():
            out = pipe(
                image=of(image, i),
                last_image=None if last_image is None else of(last_image, i),
                prompt=prompt,
                negative_prompt=negative_prompt,
                guidance_scale=guidance,
                guidance_scale_2=guidance_2,
                num_inference_steps=steps,
                latents=torch.from_numpy(noise[i : i + 1].transpose(0, 4, 1, 2, 3).copy()),
                output_type="latent",
                **size,
            ).frames
            mean, std = (
                torch.tensor(v).view(1, -1, 1, 1, 1)
                for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
            )
            video = pipe.video_processor.postprocess_video(pipe.vae.decode(out * std + mean).sample, output_type="np")
        latents.append(out.numpy().transpose(0, 2, 3, 4, 1))
        frames.append(np.round(video * 255).astype(np.uint8))
    return np.concatenate(latents), np.concatenate(frames)


@pytest.mark.parametrize("case", CASES)
def test_same_noise_same_clip(both, case, caplog):
    """Two clips of one batch are those that diffusers makes of each alone."""
    root, ours, theirs, names = both
    given = {**GIVEN, **CASES[case]}
    size = SIZE | {name: given.pop(name) for name in ("num_frames",) if name in given}
    pictures = {name: [picture(10 * i + j) for j in range(len(given["prompts"]))] for i, name in enumerate(names)}
    tiles = {}
    if size["num_frames"] == 1:  # from the converted form, which the others need not show again
        ours = jvdiff.load(root / "orbax", precision="float32")
        theirs.vae.enable_tiling(*TILES)
        tiles["vae_tiles"] = "{}x{}:{}x{}".format(*TILES)
        if "last_image" in names:
            with pytest.raises(UsageError, match="one frame"):
                jvdiff.generate(ours, **given, **size, **pictures)
            return
    noise = np.random.default_rng(0).standard_normal((len(given["prompts"]), *ours.clip(**size).latents), np.float32)
    with caplog.at_level(logging.ERROR):
        latents, frames = diffusers_clip(theirs, noise, size=size, **given, **pictures)
    check_same(jvdiff.generate(ours, noise=noise, **given, **size, **tiles, **pictures), latents, frames)


def check_same(out, latents, frames):
    error = np.linalg.norm(out.latents - latents) / np.linalg.norm(latents)
    difference = out.video.astype(np.float64) - frames
    psnr = 10 * np.log10(255**2 / max(np.mean(difference**2), 1e-12))
    print(f"latents {error:.1e}, frames {psnr:.1f} dB")
    assert error <= 1e-4 and psnr >= 52
    assert latents.std() > 0.1 and frames.std() > 5  # there is something to compare


def test_conversion_back_gives_every_tensor_bit_for_bit(both):
    """Those that nobody uses too: norm_added_q, the tower's last layer, its last norm and its projection."""
    check_back(*both[:2])


def check_back(root, ours):
    for part in ours.models.configs:
        theirs, back = (
            safetensors.open_folder(root / name / part, ours.family.parts[part].stem) for name in ("hf", "back")
        )
        assert theirs.tensors.keys() == back.tensors.keys(), part
        for name in theirs.tensors:
            np.testing.assert_array_equal(theirs.read(name), back.read(name), err_msg=name)
    assert repository.inspect(root / "back").family is ours.family


# ------------------------------------------------------------------------------ Wan 2.2: two experts, no picture tokens


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """As `both`, with two transformers that see pictures in their channels alone."""
    root = tmp_path_factory.mktemp("experts")
    parts = components(root, False) | {"image_encoder": None, "image_processor": None}
    config = {**parts["transformer"].config, "image_dim": None, "added_kv_proj_dim": None}
    for seed, name in ((3, "transformer"), (5, "transformer_2")):
        parts[name] = randomised(diffusers.WanTransformer3DModel.from_config(config), seed)
    theirs = diffusers.WanImageToVideoPipeline(**parts, boundary_ratio=0.9)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(root / "hf")
    convert(root / "hf", root / "orbax", dtype="float32")
    to_hf(root / "orbax", root / "back")
    return root, jvdiff.load(root / "hf", precision="float32"), theirs


BOTH = {"guidance": 4.0, "guidance_2": 2.5, **GIVEN}  # timesteps 999, 900, 750, 500


def test_two_experts_with_two_pictures_in_one_batch(experts):
    """Each clip is that of diffusers alone; and converted it is the same clip."""
    root, ours, theirs = experts
    prompts, images = ["a red seven", "up"], [picture(0), picture(1)]
    noise = np.random.default_rng(0).standard_normal((2, *ours.clip(**SIZE).latents), np.float32)
    clips = diffusers_clip(theirs, noise, prompts, size=SIZE, image=images, **BOTH)
    assert [segment.part for segment in ours.clip(**SIZE, steps=4).segments] == ["transformer", "transformer_2"]
    out = jvdiff.generate(ours, prompts, noise=noise, image=images, **BOTH, **SIZE)
    check_same(out, *clips)
    converted = jvdiff.load(root / "orbax", precision="float32")
    again = jvdiff.generate(converted, prompts, noise=noise, image=images, **BOTH, **SIZE).latents
    np.testing.assert_array_equal(again, out.latents)
    check_back(root, ours)


def test_two_experts_between_a_first_and_a_last_frame(experts):
    _, ours, theirs = experts
    prompts, shown = ["a blue two", "up"], {"image": picture(0), "last_image": picture(1)}
    noise = np.random.default_rng(1).standard_normal((2, *ours.clip(**SIZE).latents), np.float32)
    clips = diffusers_clip(theirs, noise, prompts, size=SIZE, **BOTH, **shown)
    check_same(jvdiff.generate(ours, prompts, noise=noise, **BOTH, **SIZE, **shown), *clips)
