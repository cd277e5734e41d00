"""The arithmetic of predicted times: operations and traffic read from compiled programs, and what is made of them."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jvdiff.sharding.collectives import Collective

ROOT = Path(__file__).parents[2]
LAYERS, ROWS, WIDTH, BLOCKS = 3, 64, 32, 4


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("roofline")


def work_of(roofline, f, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return roofline.work(jax.jit(f).lower(*args).compile().as_text() or "")


def layers(x, weights):
    """A product, and in a loop over blocks of rows another two, in a loop over layers."""

    def block(rows):
        return jnp.tanh(rows @ rows.T) @ rows

    def layer(x, w):
        x = jnp.tanh(x @ w)
        return lax.map(block, x.reshape(BLOCKS, -1, WIDTH)).reshape(x.shape), None

    return lax.scan(layer, x, weights)[0]


def test_products_and_attention_are_told_apart_by_their_loops(roofline):
    work = work_of(roofline, layers, (ROWS, WIDTH), (LAYERS, WIDTH, WIDTH))
    assert work.float32 == LAYERS * 2 * ROWS * WIDTH * WIDTH
    assert work.attention == LAYERS * BLOCKS * 2 * 2 * (ROWS // BLOCKS) ** 2 * WIDTH
    assert work.products == 0 and work.flops == work.float32 + work.attention


FUSED = """HloModule jit_f

ENTRY %main (q: bf16[1,64,2,16], k: bf16[1,48,2,16]) -> bf16[1,64,2,16] {
  %q = bf16[1,64,2,16]{3,2,1,0} parameter(0)
  %k = bf16[1,48,2,16]{3,2,1,0} parameter(1)
  ROOT %call = RESULT custom-call(%q, %k, %k), custom_call_target="NAME"
}
"""


@pytest.mark.parametrize(
    ("name", "result", "products"),
    [
        ("__cudnn$fmhaSoftmax", "(bf16[1,2,64,16]{3,1,2,0}, u8[0]{0})", 2),
        ("__cudnn$fmhaSoftmaxBackward", "(bf16[1,2,64,16]{3,1,2,0}, u8[0]{0})", 5),
        ("mosaic_gpu_v2", "(bf16[1,64,2,16]{3,2,1,0}, f32[1,2,64]{2,1,0})", 2),
        ("mosaic_gpu_v2", "bf16[1,64,2,16]{3,2,1,0}", 3),
        ("mosaic_gpu_v2", "(bf16[1,48,2,16]{3,2,1,0}, bf16[1,48,2,16]{3,2,1,0})", 4),
    ],
)
def test_fused_attention_is_counted_by_its_operands(roofline, name, result, products):
    work = roofline.work(FUSED.replace("NAME", name).replace("RESULT", result))
    assert work == (0.0, products * 2 * 64 * 48 * 2 * 16, 0.0, 0.0)


def test_traffic_is_what_kernels_read_and_write(roofline):
    size = 1024 * 1024
    assert work_of(roofline, lambda x: jnp.tanh(x) * 2, (1024, 1024)).traffic == 2 * 4 * size
    assert work_of(roofline, lambda x, y: x + y, (1024, 1024), (1024, 1024)).traffic == 3 * 4 * size
    sliced = work_of(roofline, lambda x: jnp.tanh(x[3]), (9, 1024, 1024)).traffic
    assert sliced == 2 * 4 * size  # of what is sliced, only the slice


def test_products_have_no_traffic_of_their_own(roofline):
    assert work_of(roofline, jnp.matmul, (256, 256), (256, 256)).traffic == 0


GPU = """HloModule jit_f

%inner (p: f32[8,32]) -> f32[8,32] {
  %p = f32[8,32]{1,0} parameter(0)
  ROOT %r = f32[8,32]{1,0} tanh(%p), metadata={op_name="jit(f)/Net/while/body/blocks/norm/tanh"}
}

ENTRY %main (x: f32[8,16], w: f32[16,32], y: bf16[8,16], z: bf16[16,32], a: bf16[1,6,6,3], b: bf16[5,3,3,3]) -> f32[] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = f32[16,32]{1,0} parameter(1)
  %y = bf16[8,16]{1,0} parameter(2)
  %z = bf16[16,32]{1,0} parameter(3)
  %a = bf16[1,6,6,3]{3,2,1,0} parameter(4)
  %b = bf16[5,3,3,3]{3,2,1,0} parameter(5)
  %one = (f32[8,32]{1,0}, s8[99]{0}) custom-call(%x, %w), PRODUCT
  %two = (bf16[8,32]{1,0}, s8[99]{0}) custom-call(%y, %z), PRODUCT
  %three = (bf16[1,4,4,5]{3,2,1,0}, u8[0]{0}) custom-call(%a, %b), CONVOLUTION
  %got = f32[8,32]{1,0} get-tuple-element(%one), index=0
  ROOT %norm = f32[8,32]{1,0} fusion(%got), kind=kLoop, calls=%inner
}
"""
_DIMENSIONS = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
_WHERE = 'metadata={op_name="jit(f)/Net/while/body/blocks/ffn/up/dot_general"}'
GPU = GPU.replace("PRODUCT", f'custom_call_target="__cublas$lt$matmul", {_WHERE}, backend_config={_DIMENSIONS}')
GPU = GPU.replace(
    "CONVOLUTION",
    f'window={{size=3x3}}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", {_WHERE}',
)


def test_a_table_has_operations_bytes_and_the_longer_of_their_times(roofline):
    """Of a GPU's text: workspaces are no result, float32 is TF32, a fusion comes from where its last operation does."""
    rates = roofline.Rates(8192.0, 1.0, 1.0, memory=1.0, link=1.0, latency=1.0, convolutions=1e3, tf32=1e-3)
    tf32, bf16 = 4 * (8 * 16 + 16 * 32 + 8 * 32), 2 * (8 * 16 + 16 * 32 + 8 * 32)
    product, convolution, pictures = 2.0 * 8 * 16 * 32, 2.0 * 16 * 5 * 27, 2 * (108 + 135 + 80)
    assert roofline.table(roofline.kernels(GPU), [], rates) == [
        ("products and convolutions, TF32: blocks/ffn", 1, product, tf32, product / 1e-3),
        ("other kernels: blocks/norm", 1, 0.0, 2 * 4 * 8 * 32, 2048.0),
        ("products: blocks/ffn", 1, product, bf16, float(bf16)),
        ("convolutions: blocks/ffn", 1, convolution, pictures, float(pictures)),
    ]
    assert roofline.work(GPU).flops == 2 * product + convolution and roofline.work(GPU).traffic == 2048
    assert list(roofline.printed(roofline.table(roofline.kernels(GPU), [], rates)))[-1].startswith("sum")


def test_sparse_attention_is_a_share_of_all_pairs(roofline):
    text = FUSED.replace("NAME", "mosaic_gpu_v2").replace("RESULT", "(bf16[1,64,2,16]{3,2,1,0}, f32[1,2,64]{2,1,0})")
    (whole,), (part,) = (list(roofline.kernels(text, share=share)) for share in (1.0, 0.25))
    assert part.flops == whole.flops / 4 and part.bytes == whole.bytes


def test_seconds_add_up(roofline):
    rates = roofline.Rates(100.0, 50.0, 10.0, memory=1000.0, link=200.0, latency=0.5, convolutions=1.0, tf32=1.0)
    work = roofline.Work(products=1000.0, attention=500.0, float32=10.0, traffic=3000.0)
    kind = dict(result="", group=8, source="")
    hidden = Collective("all-gather", bytes=100, asynchronous=True, behind=2, runs=6, **kind)
    alone = Collective("all-reduce", bytes=400, asynchronous=True, behind=0, runs=2, **kind)
    waiting = Collective("all-to-all", bytes=200, asynchronous=False, behind=0, runs=1, **kind)
    found = roofline.seconds(work, [hidden, alone, waiting], rates)
    assert found == (10 + 10 + 1 + 3, 6 * (0.5 + 0.5), 2 * (2 + 0.5) + (1 + 0.5))
    assert found.longest == 24 + 6 + 6.5 and found.shortest == 24 + 6.5
    assert found._replace(hidden=30.0).shortest == 30 + 6.5


def test_the_rates_are_below_the_published_peaks(roofline):
    rates = roofline.RATES["h200"]
    assert rates.attention < rates.products < 989e12 and rates.float32 < 67e12
    assert rates.memory < 4.8e12 and rates.link < 450e9
