"""Latent attention in plain torch: what it holds in memory at once, and dtypes of its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from npu_zoo.core.attention import SequenceSlice
from npu_zoo.nn.attention import latent as latent_module
from npu_zoo.nn.attention import latent_pool
from npu_zoo.nn.attention import prefill as prefill_module
from npu_zoo.nn.attention.latent import PagedLatentAttention
from npu_zoo.nn.attention.workspace import Workspace

from .latent_driver import HEADS, SMALL, Driver


@pytest.mark.usefixtures("form")
def test_long_rows_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores for a few queries at a time, of prompts and of chunks that continue them."""
    monkeypatch.setattr(latent_module, "_SCORES", 3 * HEADS * 50)
    monkeypatch.setattr(prefill_module, "_SCORES", 1)
    driver = Driver(PagedLatentAttention, SMALL)
    driver.step(("a", SequenceSlice(0, 50, list(range(13)))), ("b", SequenceSlice(0, 2, [30])))
    driver.step(("b", SequenceSlice(2, 1, [30])), ("a", SequenceSlice(50, 38, list(range(22)))))


@pytest.mark.parametrize(
    ("absorbed", "buffer", "limit"), [(True, "scores", 2 * HEADS * 88), (False, "keys", HEADS * 20 * 8)]
)
def test_long_contexts_take_little_memory(
    absorbed: bool, buffer: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Absorbed, scores of as many queries as fit; expanded, keys of as many tokens as are expanded at a time."""
    sizes: list[int] = []
    take = Workspace.buffer

    def recorded(self: Workspace, name: str, *shape: int) -> Tensor:
        sizes.extend([math.prod(shape)] * (name == buffer))
        return take(self, name, *shape)

    driver = Driver(PagedLatentAttention, SMALL)
    driver.step(("a", SequenceSlice(0, 80, list(range(20)))))
    monkeypatch.setattr(latent_pool, "prefers_absorbed", lambda *_: absorbed)
    monkeypatch.setattr(latent_module, "_SCORES", 2 * HEADS * 88)
    monkeypatch.setattr(latent_module, "_EXPANDED_TOKENS", 8)
    monkeypatch.setattr(Workspace, "buffer", recorded)
    driver.step(("a", SequenceSlice(80, 8, list(range(22)))))
    assert len(sizes) > 1
    assert max(sizes) <= limit


@pytest.mark.usefixtures("form")
def test_large_values_do_not_overflow_float16() -> None:
    """Queries are scaled before they meet the cache: no score is beyond the dtype that its softmax is within."""
    driver = Driver(PagedLatentAttention, SMALL, torch.float16)
    driver.scale = driver.backend.scale = 1 / 4096
    plain = driver.random
    driver.random = lambda *shape: plain(*shape) * 300  # type: ignore[method-assign]
    rows = [SequenceSlice(0, 3, [0]), SequenceSlice(0, 1, [1])]
    out = driver.backend.forward(0, *driver.draw(4), driver.projection, driver.backend.prepare(rows))
    assert out.isfinite().all()
