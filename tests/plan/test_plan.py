"""Planning without weights: operations counted, memory of the compiled programs, no LxL array."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jvdiff import pipeline, plan
from jvdiff.commands import sample
from jvdiff.errors import ResourceError, UsageError
from jvdiff.models import family
from jvdiff.plan import meshes
from jvdiff.runtime.target import Target
from jvdiff.sharding import MeshShape, make_mesh


def planned(checkpoint, **fields):
    """(Context, Clip) in float32."""
    config = sample.default_config()
    config.update({"checkpoint": str(checkpoint), "precision": "float32"} | fields)
    return plan.resolved(config)


def traced(context, clip):
    """Each program of a clip, by its stage."""
    abstract = pipeline.abstract_params(context.family, context.models, context.precision)
    calls = pipeline.trace(context, abstract, clip, context.family.longest(context.models, clip, 1))
    return {call.stage.name: call.traced for call in calls}


def test_flops_of_products_convolutions_loops_and_branches():
    def f(a, b, image, kernel):
        a = jax.lax.scan(lambda c, _: (c @ b, None), a, length=5)[0]  # 5 x 2*3*4*4
        a = jax.lax.cond(a[0, 0] > 0, lambda x: x @ b, lambda x: x, a)  # 2*3*4*4
        image = jax.jit(
            lambda x: jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )(image)  # 2 * 8*8*6 outputs * 3*3*5
        return a, image

    shapes = ((3, 4), (4, 4), (1, 8, 8, 5), (3, 3, 5, 6))
    jaxpr = jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    assert plan.count_flops(jaxpr.jaxpr) == 6 * 96 + 2 * 8 * 8 * 6 * 45


def test_the_largest_array_of_a_program():
    hlo = jax.jit(lambda x, y: jnp.tanh(x[:, None] * y[None]).sum()).lower(jnp.ones(300), jnp.ones(500)).compile()
    text = "  %a = f32[9999,9999] parameter(0)\n  ROOT %b = (bf16[300,500]{1,0}, s32[2]) fusion(f32[9999,9999] %a)\n"
    assert plan.largest_array(text) == ("bf16[300,500] 0.29 MiB", 150000)
    assert plan.largest_array(hlo.as_text())[1] <= 150000


def test_a_plan_reads_no_weights_and_says_what_a_run_takes(tiny_repository, tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiny.py"
    path.write_text("from jvdiff import sample\nget_config = sample.default_config\n")
    monkeypatch.setattr(family, "restore", None)
    argv = ["sample", f"--config={path}", f"--config.checkpoint={tiny_repository}", "--config.plan=true"]
    assert sample.main([*argv, "--config.num_frames=9"]) == 0
    said = capsys.readouterr().out
    for name in ("transformer", "text_encoder", "denoise", "decode first", "decode next", "one clip", "L: 3"):
        assert name in said
    assert sample.main([*argv, "--config.num_frames=8"]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [(480, 832), (720, 1280)])
@pytest.mark.parametrize("name", ["Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-T2V-14B-Diffusers"])
def test_no_array_has_l_x_l_elements(name, size):
    context, clip = planned(name, height=size[0], width=size[1])
    tokens = clip.tokens
    assert tokens == {480: 32760, 720: 75600}[size[0]]
    program = next(p for p in plan.programs(context, clip) if p.name == "denoise")
    transformer = context.models.configs["transformer"]
    # What there is grows with L times the feed-forward's width, and is far from one head's LxL.
    widest = tokens * transformer.ffn_dim
    assert 0 < program.largest_elements <= widest < tokens**2 / 2
    assert program.temporary < 6 * 4 * widest
    width, layers = transformer.width, transformer.num_layers
    attention = 2 * 4 * tokens**2 * width * layers  # both branches of guidance
    dense = 2 * 2 * tokens * layers * (6 * width**2 + 2 * width * transformer.ffn_dim)
    assert attention + dense < program.flops < 1.05 * (attention + dense)


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [("video_sparse:4x4x4:0.9", 63 * 64), ("sliding_tile:6x8x8:3x3x3", 27 * 384), ("dense", None)],
)
def test_operations_are_those_of_the_pattern(pattern, kept):
    """Of 32,760 tokens in a grid of 21x30x52, padded to whole tiles; the coarse branch and the rest come on top."""
    context, clip = planned("Wan2.1-T2V-1.3B-Diffusers", pattern=pattern)
    flops = plan.count_flops(traced(context, clip)["denoise"].jaxpr.jaxpr)
    transformer = context.models.configs["transformer"]
    width, layers = transformer.width, transformer.num_layers
    padded = {"v": 624 * 64, "s": 4 * 4 * 7 * 384, "d": 32760}[pattern[0]]
    attention = 2 * 4 * padded * (kept or 32760) * width * layers
    dense = 2 * 2 * 32760 * layers * (6 * width**2 + 2 * width * transformer.ffn_dim)
    assert attention + dense < flops < 1.08 * (attention + dense)


def test_operations_are_counted_whatever_computes_them(tiny_repository):
    fields = {"pattern": "video_sparse:1x1x1:0.5", "num_frames": 9, "height": 32, "width": 32}
    flops = []
    for attention in ("xla", "reference"):
        programs = plan.programs(*planned(tiny_repository, attention=attention, **fields))
        flops.append(next(p.flops for p in programs if p.name == "denoise"))
    assert flops[0] == flops[1] > 0


def test_decoding_is_the_same_program_for_21_and_81_frames():
    programs = {}
    for frames in (21, 81):
        every = traced(*planned("Wan2.1-T2V-1.3B-Diffusers", num_frames=frames))
        programs[frames] = [str(every[name].jaxpr) for name in ("decode first", "decode next")]
    assert programs[21] == programs[81]


def test_planning_for_a_gpu_needs_its_compiler(monkeypatch, capsys, tmp_path):
    path = tmp_path / "c.py"
    path.write_text("from jvdiff import sample\nget_config = sample.default_config\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    argv = ["sample", f"--config={path}", "--config.checkpoint=Wan2.1-T2V-1.3B-Diffusers", "--config.plan=true"]
    assert sample.main([*argv, "--config.plan_target=h200"]) == 7
    assert "-m jvdiff.commands.compiler --install" in capsys.readouterr().err
    assert sample.main([*argv, "--config.plan_target=tpu"]) == 2
    assert "h200" in capsys.readouterr().err


def test_a_checkpoint_that_nobody_knows_cannot_be_planned(capsys, tmp_path):
    path = tmp_path / "c.py"
    path.write_text("from jvdiff import sample\nget_config = sample.default_config\n")
    for name in ("nobody/knows", "digitz", "Wan2.1-T2V-1.3B-Diffuser"):
        assert sample.main(["sample", f"--config={path}", "--config.plan=true", f"--config.checkpoint={name}"]) == 2
        told = capsys.readouterr().err
        assert "there are plans of Wan2.1-T2V-1.3B-Diffusers" in told
        assert ("did you mean digits?" in told) == (name == "digitz")
    assert "(did you mean Wan2.1-T2V-1.3B-Diffusers?)" in told


def test_gpu_descriptions_are_data():
    found = {name: plan.described(name) for name in plan.known_targets()}
    hopper, ada, blackwell = (9, 0), (8, 9), ((10, 0), (12, 0))
    assert {name: target.capability for name, target in found.items()} == {
        "a100": (8, 0),
        "b200": blackwell[0],
        "h100": hopper,
        "h200": hopper,
        "rtx_4090": ada,
        "rtx_5090": blackwell[1],
    }
    assert all(name.upper().replace("_", " ") in target.kind for name, target in found.items())
    assert plan.described("h200", 8) == Target("gpu", "NVIDIA H200", hopper, 8, 91200)


@pytest.fixture
def tiny(tiny_repository):
    return planned(tiny_repository, num_frames=9, height=64, width=64)


def test_flops_of_a_shard_map_are_those_of_all_its_devices():
    mesh = make_mesh(MeshShape(sequence=2, tensor=2))
    body = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(P("sequence0"), P()), out_specs=P("sequence0"), check_vma=False
    )
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((6, 4), (4, 5))]
    jaxpr = jax.make_jaxpr(lambda a, b: body(a, b) @ b.T)(*shapes)
    # Four devices multiply 3 rows each: over `tensor` both halves of `sequence` are computed twice.
    assert plan.count_flops(jaxpr.jaxpr) == 4 * 2 * 3 * 4 * 5 + 2 * 6 * 5 * 4


def test_a_stage_is_compiled_by_its_name_and_its_attention_read_from_the_text(tiny):
    assert plan.attention_in(plan.stage_text(*tiny, "text")) == ("xla",)
    with pytest.raises(UsageError, match="stage is 'encode'; expected one of text, denoise, decode first, decode next"):
        plan.stage_text(*tiny, "encode")


def test_a_plan_under_a_mesh_is_of_one_device(tiny_repository, tmp_path, capsys):
    path = tmp_path / "tiny.py"
    path.write_text("from jvdiff import sample\nget_config = sample.default_config\n")
    argv = ["sample", f"--config={path}", f"--config.checkpoint={tiny_repository}", "--config.plan=true"]
    argv += ["--config.num_frames=9", "--config.height=64", "--config.width=64"]
    assert sample.main([*argv, "--config.mesh=sequence=2,tensor=2"]) == 0
    said = capsys.readouterr().out
    assert "mesh: sequence=2,tensor=2, 4 devices" in said
    # Each of the two heads is on one device, so that keys go round a ring. XLA:CPU has nothing asynchronous.
    assert "collective-permute" in said and "all-reduce" in said and "; 0 of" in said
    assert sample.main([*argv, "--config.mesh=tensor=3"]) == 2
    assert "tensor=3 does not divide the 2 attention heads" in capsys.readouterr().err
    assert sample.main([*argv, "--config.mesh=sequence=16"]) == 2
    assert "there are 8" in capsys.readouterr().err


def test_a_mesh_divides_operations_and_weights(tiny):
    alone, two, four = (
        next(plan.programs(*tiny, shape=shape, without=("text_encoder", "vae")))
        for shape in (None, MeshShape(sequence=2), MeshShape(sequence=2, tensor=2))
    )
    assert alone.name == two.name == four.name == "denoise" and not alone.sends
    assert 0.9 < 4 * four.flops / alone.flops < 1.1 and 0.9 < 2 * two.flops / alone.flops < 1.1
    assert alone.weights == two.weights
    assert alone.weights / 2 < four.weights < 0.75 * alone.weights  # biases and embeddings are on every device
    # Two layers, both branches at once: queries, keys and values there, the result back.
    assert two.sends["all-to-all"][0] == 2 * 4


def test_meshes_are_tried_from_the_smallest_and_quietest():
    found = list(map(str, plan.candidates(6)))
    assert found[:7] == ["data=1", "sequence=2", "fsdp=2", "tensor=2", "sequence=4", "fsdp=2,sequence=2", "fsdp=4"]
    assert len(found) == len(set(found)) and "fsdp=2,sequence=3" in found and "sequence=6" in found


def test_one_device_is_enough_where_everything_fits(tiny):
    context, clip = tiny
    abstract = pipeline.abstract_params(context.family, context.models, context.precision)
    resident = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    needs = max(p.needs for p in plan.programs(context, clip, shape=MeshShape()))
    shape, sentence = plan.smallest_mesh(context, clip, 8, resident + needs)
    assert shape == MeshShape() and sentence.startswith("mesh data=1: 1 of 8 devices")


def test_the_smallest_mesh_that_fits(monkeypatch):
    """Wan 14B on devices of 80 GiB, with what its programs need said instead of compiled."""
    wan = planned("Wan2.1-T2V-14B-Diffusers", precision="bfloat16")  # 38 GiB of weights
    compiled = []

    def programs(context, clip, target, shape, without):
        compiled.append((str(shape), bool(without)))
        for part, needs in (("transformer", 60 / shape.devices), ("vae", 30), ("vae", 50 / shape.devices)):
            if part not in without:
                yield plan.Program("", part, 1, 0.0, 0, 0, int(needs * 2**30), "", 0, 0.0, (), {}, 0, 0, "")

    monkeypatch.setattr(meshes, "programs", programs)
    find = lambda devices, gib: plan.smallest_mesh(*wan, devices, int(gib * 2**30))  # noqa: E731
    shape, sentence = find(8, 80)
    assert shape == MeshShape(sequence=2) and "fewer devices would need 98" in sentence and "\n" not in sentence
    compiled.clear()
    # Decoding needs 30 GiB on any number of devices: weights must shrink too. It is compiled once for each number,
    # and not at all where weights do not fit.
    assert find(8, 45)[0] == MeshShape(fsdp=4)
    assert compiled == [("data=1", False), ("sequence=2", False), ("sequence=4", False), ("fsdp=4", True)]
    # With weights in turn one device is enough for the VAE's 30 GiB; a step of 60 on four, beside half the weights.
    compiled.clear()
    shape, sentence = find(8, 33)
    assert shape == MeshShape(fsdp=2, sequence=2) and "the smallest split that fits with weights in turn" in sentence
    with pytest.raises(ResourceError, match=r"no mesh of 8 devices fits: the best, .*, needs at least 30\.\d+ GiB"):
        find(8, 20)


def test_whose_weights_are_on_a_device_together():
    """Wan 2.2 A14B with what its programs need said instead of measured, in GiB."""
    gib, held = 2**30, {"transformer": 27, "transformer_2": 27, "vae": 1, "text_encoder": 11, "image_encoder": 2}
    held = {part: size * gib for part, size in held.items()}
    _, clip = planned("Wan2.2-T2V-A14B-Diffusers")
    stages = ("text", "text_encoder", 1), ("one", "transformer", 8), ("two", "transformer_2", 8), ("frames", "vae", 20)
    works = [plan.Work(name, part, needs * gib) for name, part, needs in stages]
    every = list(plan.ways(clip, works, held))
    encoders, experts = ("text_encoder", "image_encoder"), ("transformer", "transformer_2")
    assert [set(way.in_turn) for way in every] == [set(), {*encoders}, {*encoders, *experts}, {*held}]
    peaks = [{name: peak // gib for name, peak in way.peaks.items()} for way in every]
    assert peaks[0] == {"text": 69, "one": 76, "two": 76, "frames": 88} and every[0].peak == 88 * gib
    assert peaks[1] == {"text": 67, "one": 63, "two": 63, "frames": 75}
    assert peaks[2] == {"text": 13, "one": 36, "two": 36, "frames": 21}
    assert peaks[3] == {"text": 12, "one": 35, "two": 35, "frames": 21}
    for limit, way in ((None, 0), (88, 0), (87, 1), (74, 2), (35, 3), (34, 3)):
        chosen, line = plan.choose(clip, works, held, limit and limit * gib)
        assert chosen == every[way]
        assert ("(all weights resident: 88.00 GiB)" in line) == (way > 0) and ("too little" in line) == (limit == 34)
    picture = [plan.Work("picture", "vae", gib), *works]  # a VAE that encodes, and decodes later
    assert {*next(way for way in plan.ways(clip, picture, held) if way.in_turn).in_turn} == {*encoders}


def test_tiles_are_taken_where_nothing_else_fits_and_they_do():
    """With what programs need said instead of measured, in GiB: whole pictures 20, tiles 3, a step 8."""
    _, clip = planned("Wan2.1-T2V-1.3B-Diffusers")
    held = {"transformer": 3, "vae": 1, "text_encoder": 11}
    held = {part: size * 2**30 for part, size in held.items()}

    def measured(clip):
        frames = 3 if clip.vae_tiles else 20
        works = ("text", "text_encoder", 1), ("denoise", "transformer", 8), ("frames", "vae", frames)
        return [plan.Work(name, part, needs * 2**30) for name, part, needs in works]

    def found(clip, limit):
        fitted, way, line = plan.fitted(clip, measured, lambda works: plan.choose(clip, works, held, limit), limit)
        return str(fitted.vae_tiles), way.peak // 2**30, "256x256:192x192" in line

    assert found(clip, None) == ("None", 35, False)
    assert found(clip, 21 * 2**30) == ("None", 21, False)  # all parts in turn
    assert found(clip, 20 * 2**30) == ("256x256:192x192", 16, True)
    assert found(clip, 12 * 2**30) == ("256x256:192x192", 12, True)
    assert found(clip, 10 * 2**30) == ("None", 21, False)  # the text encoder fits nowhere
    off = dataclasses.replace(clip, settings=dataclasses.replace(clip.settings, vae_tiles="off"))
    assert found(off, 20 * 2**30) == ("None", 21, False)


def test_memory_of_devices(monkeypatch):
    assert 2**28 < plan.memory_limit() < 2**50  # the host's, on a CPU
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)  # a command in this process has set it
    assert 120 * 2**30 < plan.target_memory("h200") < 130 * 2**30  # nine tenths
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert 65 * 2**30 < plan.target_memory("h200") < 72 * 2**30
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "half")
    with pytest.raises(UsageError, match="XLA_CLIENT_MEM_FRACTION is 'half'; expected a share"):
        plan.target_memory("h200")
