"""One attention layer on the fused operators, with a defect of each kind planted: the simulated device catches it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch_npu

from npu_zoo.simulator.errors import RuleBroken

_SPEC = importlib.util.spec_from_file_location("dense", Path(__file__).with_name("dense.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
dense = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(dense)

DUO = "310" in torch.npu.get_device_name(0)
HEADS, KV_HEADS, SIZE, BLOCK, WIDTH = 4, 2, 128, 128, 96
PREFILL, STEPS = 5, 3
EPSILON = 1e-6
NZ = 29


@pytest.fixture(autouse=True)
def _internal_formats() -> Iterator[None]:
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = False
    torch.npu.set_stream(torch.npu.default_stream())


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


INPUTS = draw(PREFILL + STEPS, WIDTH).half()
GAMMA = (draw(WIDTH).abs() + 0.5).half()
PROJECTIONS = [(draw(WIDTH, heads * SIZE) / WIDTH**0.5).half() for heads in (HEADS, KV_HEADS, KV_HEADS)]
ANGLES = torch.arange(PREFILL + STEPS)[:, None] / 10000 ** (torch.arange(0, SIZE, 2) / SIZE)


def reference() -> torch.Tensor:
    """The layer's outputs [tokens, HEADS, SIZE] in float64, position by position."""
    x = INPUTS.double()
    x = x / (x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * GAMMA.double()
    query, key, value = ((x @ w.double()).view(len(x), -1, SIZE) for w in PROJECTIONS)

    def turned(t: torch.Tensor) -> torch.Tensor:
        product = torch.complex(t[..., : SIZE // 2], t[..., SIZE // 2 :]) * torch.exp(1j * ANGLES.double())[:, None]
        return torch.cat([product.real, product.imag], -1)

    output: torch.Tensor = dense.dense_attention(turned(query), turned(key), value, SIZE**-0.5, causal=True)[0]
    return output


class Layer:
    """The layer as it would be written for the device: one prefill, then single tokens from the cache.

    Attributes:
        scale, swap, shift: right as they are; a planted defect changes one.
    """

    def __init__(self, *, scale: float = SIZE**-0.5, swap: bool = False, shift: int = 0) -> None:
        self.scale, self.swap, self.shift = scale, swap, shift
        self.weights = [w.npu() for w in PROJECTIONS]
        self.table = torch.zeros(1, 1, dtype=torch.int32).npu()
        cos, sin = (f(ANGLES).repeat(1, 2).half().npu() for f in (torch.cos, torch.sin))
        self.tables = (sin, cos) if swap else (cos, sin)
        shape = (2, KV_HEADS * SIZE // 16, BLOCK, 16) if DUO else (2, BLOCK, KV_HEADS, SIZE)
        empty = [torch.zeros(shape).half().npu() for _ in range(2)]
        self.caches = [torch_npu.npu_format_cast(cache, NZ) for cache in empty] if DUO else empty

    def forward(self, rows: slice) -> torch.Tensor:
        normed = torch_npu.npu_rms_norm(INPUTS[rows].npu(), GAMMA.npu(), EPSILON)[0]
        query, key, value = ((normed @ w).view(-1, w.shape[1] // SIZE, SIZE) for w in self.weights)
        cos, sin = (t[rows][None, :, None] for t in self.tables)
        query, key = (torch_npu.npu_rotary_mul(t[None], cos, sin)[0] for t in (query, key))
        slots = torch.arange(rows.start, rows.stop, dtype=torch.int32).npu() + self.shift
        if DUO:
            torch_npu._npu_reshape_and_cache(key, value, *self.caches, slots)
            return self.attention_on_310p(query, key, value, rows)
        torch_npu.npu_scatter_pa_kv_cache(key, value, *self.caches, slots, cache_mode="Norm")
        return self.attention(query, rows)

    def attention(self, query: torch.Tensor, rows: slice) -> torch.Tensor:
        mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu()
        output: torch.Tensor = torch_npu.npu_fused_infer_attention_score(
            query, *(cache.view(2, BLOCK, -1) for cache in self.caches), atten_mask=mask, block_table=self.table,
            input_layout="TND", block_size=BLOCK, actual_seq_lengths=[len(query)], actual_seq_lengths_kv=[rows.stop],
            num_key_value_heads=KV_HEADS, num_heads=HEADS, scale=self.scale, sparse_mode=3,
        )[0]  # fmt: skip
        return output

    def attention_on_310p(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: slice
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        lengths = torch.tensor([rows.stop], dtype=torch.int32)
        if len(query) == 1:
            torch_npu._npu_paged_attention(query, *self.caches, KV_HEADS, HEADS, self.scale, self.table, lengths, out)
            return out
        hidden = torch.ones(16, 16).triu(1).half() * -10000
        mask = torch_npu.npu_format_cast(hidden[None, None].npu(), NZ)
        torch_npu._npu_flash_attention(query, key, value, mask, lengths, self.scale, HEADS, KV_HEADS, out)
        return out


def outputs(layer: Layer) -> torch.Tensor:
    parts = [layer.forward(slice(0, PREFILL))]
    parts += [layer.forward(slice(step, step + 1)) for step in range(PREFILL, PREFILL + STEPS)]
    return torch.cat(parts).cpu().double()


def error(layer: Layer) -> float:
    expected = reference()
    return float((outputs(layer) - expected).abs().max() / expected.abs().max())


def test_the_layer_is_right() -> None:
    assert error(Layer()) < 5e-3


@pytest.mark.parametrize(
    "planted",
    [{"scale": SIZE**-0.5 * 1.05}, {"swap": True}, {"shift": 1}],
    ids=["wrong scale", "cosine and sine swapped", "slots off by one"],
)
def test_a_planted_defect_shows_in_the_values(planted: dict[str, float]) -> None:
    assert error(Layer(**planted)) > 2e-2  # type: ignore[arg-type]


@pytest.mark.chip("ascend310p")
def test_bfloat16_on_310p_is_refused() -> None:
    with pytest.raises(RuleBroken, match="bfloat16"):
        torch_npu.npu_rms_norm(INPUTS.npu().bfloat16(), GAMMA.npu().bfloat16(), EPSILON)
    with pytest.raises(RuleBroken, match="bfloat16"):
        torch.ones(4, 4, dtype=torch.bfloat16, device="npu") @ torch.ones(4, 4, dtype=torch.bfloat16, device="npu")


def test_the_host_waiting_inside_a_graph_is_refused() -> None:
    layer = Layer()
    layer.forward(slice(0, PREFILL))

    def step(*, waits: bool) -> None:
        normed = torch_npu.npu_rms_norm(inputs, gamma, EPSILON)[0]
        if waits and float(normed.abs().max()) > 1e3:
            raise OverflowError

    inputs, gamma = INPUTS[:1].npu(), GAMMA.npu()
    with torch.npu.graph(torch.npu.NPUGraph()):
        step(waits=False)
    with pytest.raises(RuntimeError, match="captured"), torch.npu.graph(torch.npu.NPUGraph()):
        step(waits=True)


@pytest.mark.chip("ascend910b")
def test_a_sequence_that_grows_inside_a_graph_needs_its_task_updated() -> None:
    """Lengths are host values: a replay keeps those of the capture until its task group is updated."""
    layer = Layer()
    outputs(layer)  # fills the cache
    query = draw(1, HEADS, SIZE).half()
    caches = [cache.view(2, BLOCK, -1) for cache in layer.caches]
    found = torch.empty(1, HEADS, SIZE).half().npu()
    lse = torch.empty(1).npu()
    moved, stream, graph = query.npu(), torch.npu.Stream(), torch.npu.NPUGraph()
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu()

    def attention(length: int) -> None:
        torch_npu.npu_fused_infer_attention_score.out(
            moved, *caches, atten_mask=mask, block_table=layer.table, input_layout="TND", block_size=BLOCK,
            actual_seq_lengths=[1], actual_seq_lengths_kv=[length], num_key_value_heads=KV_HEADS, num_heads=HEADS,
            scale=layer.scale, sparse_mode=3, out=[found, lse],
        )  # fmt: skip

    with torch.npu.graph(graph, stream=stream):
        torch.npu.graph_task_group_begin(stream)
        attention(PREFILL)
        handle = torch.npu.graph_task_group_end(stream)
    keys, values = (cache.cpu()[0].view(BLOCK, KV_HEADS, SIZE) for cache in caches)
    for length in (PREFILL, PREFILL + STEPS):
        with torch.npu.stream(torch.npu.Stream()) as _:
            current = torch.npu.current_stream()
            torch.npu.graph_task_update_begin(current, handle)
            attention(length)
            torch.npu.graph_task_update_end(current)
        graph.replay()
        expected = dense.dense_attention(query, keys[:length], values[:length], layer.scale, causal=True)[0]
        torch.testing.assert_close(found.cpu().double(), expected, atol=3e-3, rtol=3e-3)
