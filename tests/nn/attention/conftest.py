"""A dense oracle in float64, a driver that runs steps through a backend with random keys and values, and fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from npu_zoo.core.attention import AttentionBackend, SequenceSlice
from npu_zoo.nn.attention import compiled_latent, latent, latent_pool


@dataclass
class History:
    """All keys and values of one sequence, as the oracle sees them."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


def dense_attention(query: Tensor, history: History, position: int, scale: float) -> Tensor:
    """softmax(QK^T)V of one token, head by head, in float64."""
    keys = torch.stack(history.keys[: position + 1]).double()
    values = torch.stack(history.values[: position + 1]).double()
    group = query.shape[0] // keys.shape[1]
    heads = []
    for head in range(query.shape[0]):
        scores = keys[:, head // group] @ query[head].double() * scale
        heads.append(torch.softmax(scores, 0) @ values[:, head // group])
    return torch.stack(heads)


class Driver:
    """Runs steps on every layer of a backend and compares each with the oracle."""

    def __init__(self, backend: AttentionBackend, heads: tuple[int, int, int], dtype: torch.dtype, layers: int = 1):
        self.backend = backend
        self.num_heads, self.num_kv_heads, self.head_dim = heads
        self.dtype = dtype
        self.layers = layers
        self.scale = self.head_dim**-0.5
        self.histories: dict[object, History] = {}
        self.generator = torch.Generator().manual_seed(7)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def step(self, rows: list[tuple[object, SequenceSlice]]) -> None:
        """Run (sequence name, row) pairs; the row's new tokens are drawn here."""
        total = sum(row.num_tokens for _, row in rows)
        query = self.random(total, self.num_heads, self.head_dim)
        key, value = (self.random(total, self.num_kv_heads, self.head_dim) for _ in range(2))
        metadata = self.backend.prepare([row for _, row in rows])
        outs = [self.backend.forward(layer, query, key, value, metadata) for layer in range(self.layers)]
        self.record(rows, key, value)
        expected = self.expect(rows, query)
        for out in outs:
            assert out.shape == query.shape
            assert out.dtype == self.dtype
            torch.testing.assert_close(out.double(), expected, **TOLERANCE[self.dtype])

    def record(self, rows: list[tuple[object, SequenceSlice]], key: Tensor, value: Tensor) -> None:
        first = 0
        for name, row in rows:
            history = self.histories.setdefault(name, History())
            assert len(history.keys) == row.start, "the test's own rows are out of order"
            history.keys.extend(key[first : first + row.num_tokens])
            history.values.extend(value[first : first + row.num_tokens])
            first += row.num_tokens

    def expect(self, rows: list[tuple[object, SequenceSlice]], query: Tensor) -> Tensor:
        outs, first = [], 0
        for name, row in rows:
            for token in range(row.num_tokens):
                history = self.histories[name]
                outs.append(dense_attention(query[first + token], history, row.start + token, self.scale))
            first += row.num_tokens
        return torch.stack(outs)

    def fork(self, source: object, name: object, length: int) -> None:
        """A new sequence that shares the first tokens of another."""
        old = self.histories[source]
        self.histories[name] = History(old.keys[:length], old.values[:length])


TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 1e-2, "atol": 5e-3},
    torch.bfloat16: {"rtol": 5e-2, "atol": 3e-2},
}


@pytest.fixture(params=[True, False, None], ids=["absorbed", "expanded", "as chosen"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool | None:
    """Forces one form of latent attention on every row of several tokens."""
    if request.param is not None:
        monkeypatch.setattr(latent_pool, "prefers_absorbed", lambda *_: request.param)
    for module in (latent, compiled_latent):
        monkeypatch.setattr(module, "_EXPANDED_TOKENS", 5)
    value: bool | None = request.param
    return value


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
