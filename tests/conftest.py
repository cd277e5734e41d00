"""Strict by default: 8 fake CPU devices, no implicit promotion, full float32 products, warnings are errors.

The environment says so, and child processes inherit it."""

import atexit
import gc
import os
import shlex
import shutil
import signal
import tempfile
from pathlib import Path

for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # under nohup or behind &; commands would ignore them too
        signal.signal(number, handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # what one process has compiled serves the others of this run
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jvdiff_compiled_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax  # noqa: E402

gc.freeze()  # tracing makes millions of small objects; to look through them all each time is a tenth of the time
gc.set_threshold(50_000, 20, 50)

import json  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from jvdiff.runtime import interrupts  # noqa: E402


@pytest.hookimpl(optionalhook=True)  # xdist may not be there
def pytest_xdist_auto_num_workers():
    """One more than there are cores, since tests wait for processes a fifth of the time."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else None


def pytest_collection_modifyitems(items):
    """The files at the root first: they take longest, and none of them should be the last to run."""
    items.sort(key=lambda item: item.path.parent != ROOT)


ROOT = Path(__file__).parent
interrupts.GRACE = 60.0  # tests send signals to their own process, which a slow machine must not end meanwhile


@pytest.fixture(scope="session")
def random_params():
    """abstract tree -> float32 arrays, of which none is zero, so that nothing is idle; compiles nothing."""

    def make(abstract, seed=0):
        rng = np.random.default_rng(seed)

        def leaf(path, x):
            values = rng.standard_normal(x.shape, np.float32)
            wide = path[-1].key in ("kernel", "embedding")
            return values * (x.shape[-2:-1] or (1,))[0] ** -0.5 if wide else 0.1 * values + (path[-1].key == "scale")

        return jax.tree_util.tree_map_with_path(leaf, abstract)

    return make


@pytest.fixture(scope="session")
def tiny_repository(tmp_path_factory):
    """A whole text-to-video repository in Hugging Face layout, random and tiny; by default 16x16 pixels, 5 frames."""
    from safetensors.numpy import save_file

    from jvdiff.digits import tokenizer as digits_tokenizer
    from jvdiff.models import wan
    from jvdiff.models.text import umt5
    from jvdiff.models.wan.family import TEXT_TO_VIDEO
    from jvdiff.weights.naming import disassemble, flatten, unflatten

    root = tmp_path_factory.mktemp("tiny") / "repository"
    tokenizer = digits_tokenizer.build(["a", "red", "blue", "seven", "two", "moving", "left", "right"])
    digits_tokenizer.save(tokenizer, root / "tokenizer")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
    normalisation = {"latents_mean": (0.1, -0.2, 0.0, 0.3), "latents_std": (1.0, 0.9, 1.1, 1.2)}
    configs = {
        "transformer": wan.DiTConfig(in_channels=4, out_channels=4, text_dim=16, **sizes),
        "vae": wan.VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1, **normalisation),
        "text_encoder": umt5.Config(
            vocab_size=tokenizer.get_vocab_size(), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
        ),
    }
    random = np.random.default_rng(0)
    for name, cfg in configs.items():
        part = TEXT_TO_VIDEO.parts[name]
        leaves = {}
        for path, leaf in flatten(part.abstract(cfg, np.float32)).items():  # no leaf zero, so that no layer is idle
            values = random.standard_normal(leaf.shape, np.float32) * max(leaf.shape[-2:-1] or (4,)) ** -0.5
            leaves[path] = values + np.float32(path.endswith("scale"))
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps(cfg.to_json()))
        save_file(dict(disassemble(part.names(cfg), unflatten(leaves))), root / name / f"{part.stem}.safetensors")
    (root / "scheduler").mkdir()
    scheduler = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    (root / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "UniPCMultistepScheduler", **scheduler})
    )
    index = {
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    }
    (root / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **index}))
    defaults = {"num_frames": 5, "height": 16, "width": 16, "steps": 4, "guidance": 3.0, "fps": 8}
    (root / "jvdiff_defaults.json").write_text(json.dumps(defaults))
    return root


@pytest.fixture(scope="session")
def tiny_causal_repository(tiny_repository, tmp_path_factory):
    """The same weights under the class names of a Self-Forcing repository (SFWan2.1-T2V-1.3B-Diffusers)."""
    import shutil

    root = shutil.copytree(tiny_repository, tmp_path_factory.mktemp("causal") / "repository")
    names = {"_class_name": "WanCausalDMDPipeline", "transformer": ["diffusers", "CausalWanTransformer3DModel"]}
    names["scheduler"] = ["diffusers", "SelfForcingFlowMatchScheduler"]
    scheduler = {"num_inference_steps": 1000, "shift": 5.0, "sigma_min": 0.0, "extra_one_step": True, "training": True}
    small = {"height": 2, "width": 2, "len_t": 1, "window_size_t": 3, "text_rows": 32}
    for file, content in {
        "model_index.json": json.loads((root / "model_index.json").read_text()) | names,
        "transformer/config.json": json.loads((root / "transformer" / "config.json").read_text())
        | {"_class_name": "CausalWanTransformer3DModel"},
        "scheduler/scheduler_config.json": {"_class_name": "SelfForcingFlowMatchScheduler", **scheduler},
        "jvdiff_defaults.json": {
            "num_frames": 5,
            "height": 16,
            "width": 16,
            "fps": 8,
            "stream": {"transformer": small},
        },
    }.items():
        (root / file).write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def tiny_few_step_repository(tiny_repository, tmp_path_factory):
    """The same weights as a FastWan repository: with a gate, which only its tensors show."""
    import shutil

    from safetensors.numpy import load_file, save_file

    root = shutil.copytree(tiny_repository, tmp_path_factory.mktemp("few") / "repository")
    index = json.loads((root / "model_index.json").read_text()) | {"_class_name": "WanDMDPipeline"}
    (root / "model_index.json").write_text(json.dumps(index))
    (root / "jvdiff_defaults.json").unlink()
    file = root / "transformer" / "diffusion_pytorch_model.safetensors"
    random, tensors = np.random.default_rng(2), load_file(file)
    for layer in range(2):
        gate = f"blocks.{layer}.to_gate_compress"
        tensors[f"{gate}.weight"] = random.standard_normal((24, 24), np.float32) * 24**-0.5
        tensors[f"{gate}.bias"] = random.standard_normal(24, np.float32)
    save_file(tensors, file)
    return root


@pytest.fixture(scope="session")
def same_files():
    """same_files(one, other): asserts that every file of the folder `one` is in `other`, byte for byte.

    Apart: times, memory, and where a run was resumed, which only records tell.
    """

    def told(path):
        if path.suffix == ".json":
            apart = ("seconds", "speed", "resumed_at_step", "resumed_at_chunk", "sha256")
            record = {name: value for name, value in json.loads(path.read_text()).items() if name not in apart}
            record["files"].pop(".jsonl", None)  # lines with times
            return record
        if path.suffix == ".jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            return [{name: line[name] for name in ("chunk", "prompt", "frames")} for line in lines]
        return path.read_bytes()

    def same(one, other):
        names = sorted(path.name for path in one.iterdir() if path.is_file())
        assert any(name.endswith(".mp4") for name in names)
        for name in names:
            assert told(one / name) == told(other / name), name

    return same


@pytest.fixture
def printed(capsys):
    """printed(): the command to go on that was printed last, as argv of the command's `main`."""

    def command():
        words = shlex.split(capsys.readouterr().err.rsplit("with:\n", 1)[1].splitlines()[0])
        program = 3 if words[:2] == ["python", "-m"] else 2  # python -m jvdiff.sample, or jvdiff sample
        return [" ".join(words[:program]).removeprefix("python -m jvdiff."), *words[program:]]

    return command
