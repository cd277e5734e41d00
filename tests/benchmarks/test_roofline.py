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


def test_seconds_add_up(roofline):
    rates = roofline.Rates(products=100.0, attention=50.0, float32=10.0, memory=1000.0, link=200.0, latency=0.5)
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
