"""The transformer's file in its authors' layout; which tensor is which there stands in tests/data/tensors."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jvdiff.errors import CheckpointError
from jvdiff.models.family import read_weights
from jvdiff.models.hunyuan_video import dit, names, original
from jvdiff.models.hunyuan_video.config import HUNYUAN_VIDEO, DiTConfig
from jvdiff.models.hunyuan_video.family import TRANSFORMER
from jvdiff.sharding import Placement, make_mesh, read_mesh
from jvdiff.weights import naming
from jvdiff.weights.safetensors import Tensor
from tests.goldens import make_hunyuan_dit as golden

CFG = DiTConfig.from_json(golden.CONFIG)
TABLE = Path(__file__).parents[2] / "data" / "tensors" / "hunyuan_video_original.tsv"


def table(cfg):
    """(name there, shape in the published file, names here in the order of their rows, whether halves change places)"""
    layers = {"double": cfg.num_layers, "single": cfg.num_single_layers, "txt_in": cfg.num_refiner_layers}
    for line in TABLE.read_text().splitlines()[1:]:
        name, shape, _, published, halves = line.split("\t")
        for layer in range(next((n for word, n in layers.items() if name.startswith(word) and "{" in name), 1)):
            here = [each.format(layer=layer) for each in published.split()]
            yield name.format(layer=layer), tuple(json.loads(shape)), here, bool(halves)


def tensors(cfg, prefix=""):
    """A tiny file in that layout, and its tensors by the names of Diffusers."""
    abstract = dit.abstract_params(cfg)
    shapes = {name: entry.shape for name, entry in naming.expected(names.transformer(cfg), abstract).items()}
    ours = {name: golden.tensor(name, shape) for name, shape in shapes.items()}
    theirs = {}
    for name, _, here, halves in table(cfg):
        whole = np.concatenate([ours[each] for each in here])
        theirs[prefix + name] = np.concatenate(np.split(whole, 2)[::-1]) if halves else whole
    return theirs, ours


def written(folder, made):
    (folder / "config.json").write_text(json.dumps(CFG.to_json()))
    save_file(made, folder / "diffusion_pytorch_model.safetensors")
    return folder


def test_the_published_layout():
    """856 tensors there are 1,264 here; rows lie where they lay, and none is left over."""
    begin, found, order = 0, {}, {}
    for name, shape, here, halves in table(HUNYUAN_VIDEO):
        end = begin + 2 * math.prod(shape)
        found[name], begin = Tensor(Path("x"), "BF16", shape, begin, end), end
        order[found[name].begin] = [name] if halves else here
    parts = original.renamed(HUNYUAN_VIDEO, found)
    entries = naming.expected(names.transformer(HUNYUAN_VIDEO), dit.abstract_params(HUNYUAN_VIDEO), parts)
    assert len(found) == 856 and len(parts) == 1264
    assert {name: tensor.shape for name, tensor in parts.items()} == {n: e.shape for n, e in entries.items()}
    expected = [name for start in sorted(order) for name in order[start]]
    assert [name for name, _ in sorted(parts.items(), key=lambda part: part[1].begin)] == expected
    assert sum(tensor.end - tensor.begin for tensor in parts.values()) == begin


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_in_that_layout_gives_the_same_weights(tmp_path, prefix):
    theirs, ours = tensors(CFG, prefix)
    read = read_weights(written(tmp_path, theirs), TRANSFORMER, CFG, jnp.float32)
    back = dict(naming.disassemble(names.transformer(CFG), jax.tree.map(np.asarray, read)))
    assert back.keys() == ours.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_so_it_does_in_parts_on_a_mesh(tmp_path):
    """Each device reads its own rows; the head's halves change places all the same."""
    theirs, ours = tensors(CFG)
    placement = Placement(make_mesh(read_mesh("tensor=2")))
    source = type("Source", (), {"tensors": ours, "read": lambda _, name, index=None: ours[name][tuple(index or ())]})()
    expected = naming.assemble(names.transformer(CFG), dit.abstract_params(CFG), source)
    read = read_weights(written(tmp_path, theirs), TRANSFORMER, CFG, jnp.float32, placement)
    assert jax.tree.all(jax.tree.map(np.array_equal, read, expected))
    swapped = next(rule for rule in names.transformer(CFG) if "adaLN" in rule.pattern).transform
    whole, kernel = theirs["final_layer.adaLN_modulation.1.weight"], expected["head"]["modulation"]["kernel"]
    get, keep = swapped.cut([slice(4, 8), slice(20, 40)])
    np.testing.assert_array_equal(swapped.forward(whole[get])[keep], kernel[4:8, 20:40])


def test_other_sizes_keep_their_names(tmp_path):
    """So that the message says what is in the file."""
    theirs, _ = tensors(CFG)
    theirs["double_blocks.0.img_attn_qkv.weight"] = np.zeros((95, 32), np.float32)
    with pytest.raises(CheckpointError, match=r"double_blocks\.0\.img_attn_qkv\.weight") as error:
        read_weights(written(tmp_path, theirs), TRANSFORMER, CFG, jnp.float32)
    assert "transformer_blocks.0.attn.to_q.weight" in str(error.value)
