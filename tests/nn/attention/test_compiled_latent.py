"""What the compiled latent backend does of its own: threads, tiles and tasks, prefixes read once, and its refusals."""

from __future__ import annotations

import pytest
import torch

from npu_zoo.core.attention import SequenceSlice
from npu_zoo.core.errors import ConfigError, EngineError
from npu_zoo.core.model_config import MLAConfig
from npu_zoo.nn.attention import latent_pool
from npu_zoo.nn.attention.compiled_latent import CompiledLatentAttention

from .latent_driver import DTYPES as _DTYPES
from .latent_driver import REQUIRES_LIBRARY, SMALL, Driver

pytestmark = [REQUIRES_LIBRARY, pytest.mark.usefixtures("one_thread")]

DTYPES = _DTYPES[CompiledLatentAttention]


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 4, 40])
def test_longer_texts_of_many_heads(heads: int, dtype: torch.dtype) -> None:
    """Queries of more than a tile and a task, contexts of more than a chunk."""
    driver = Driver(CompiledLatentAttention, SMALL, dtype, block_size=64, num_blocks=14, heads=heads)
    driver.step(("a", SequenceSlice(0, 33, [1])), ("b", SequenceSlice(0, 300, [9, 3, 4, 11, 6])))
    driver.step(("b", SequenceSlice(300, 4, [9, 3, 4, 11, 6])), ("a", SequenceSlice(33, 1, [1])))
    driver.step(("b", SequenceSlice(304, 1, [9, 3, 4, 11, 6])), ("a", SequenceSlice(34, 70, [1, 13])))


@pytest.mark.parametrize("rank", [16, 32, 40, 80])
@pytest.mark.parametrize("rope", [8, 16])
@pytest.mark.parametrize("heads", [8, 40])
def test_chunks_of_latents_of_any_width(rank: int, rope: int, heads: int) -> None:
    """Those whose pairs of columns come out even, and those where one is left or is not whole."""
    mla = MLAConfig(kv_lora_rank=rank, qk_rope_head_dim=rope, qk_nope_head_dim=12, v_head_dim=20)
    driver = Driver(CompiledLatentAttention, mla, torch.bfloat16, block_size=64, num_blocks=14, heads=heads)
    blocks = [9, 3, 4, 11, 6]
    driver.step(("a", SequenceSlice(0, 300, blocks)), ("b", SequenceSlice(0, 40, [1])))
    driver.step(("a", SequenceSlice(300, 1, blocks)), ("b", SequenceSlice(40, 1, [1])))


@pytest.mark.parametrize("absorbed", [True, False])
def test_threads_share_the_work(absorbed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_pool, "prefers_absorbed", lambda *_: absorbed)
    torch.set_num_threads(2)
    driver = Driver(CompiledLatentAttention, SMALL, torch.bfloat16, block_size=64, num_blocks=14, heads=3)
    driver.step(("a", SequenceSlice(0, 300, [9, 3, 4, 11, 6])))
    driver.step(("a", SequenceSlice(300, 1, [9, 3, 4, 11, 6])))
    driver.step(("a", SequenceSlice(301, 4, [9, 3, 4, 11, 6])), ("b", SequenceSlice(0, 1, [1])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prefix_that_many_share_is_attended_to_once(dtype: torch.dtype) -> None:
    driver = Driver(CompiledLatentAttention, SMALL, dtype, block_size=64, num_blocks=40)
    prefix = list(range(16, -1, -1))
    driver.step(("owner", SequenceSlice(0, 17 * 64, prefix)))
    rows = [(str(n), SequenceSlice(17 * 64, length, [*prefix, 20 + n])) for n, length in enumerate((1, 3, 1, 1, 60))]
    forks = {name: ("owner", 17 * 64) for name, _ in rows}
    metadata = driver.backend.prepare([row for _, row in rows])
    assert metadata.absorbed.shared == 1
    driver.step(*rows, forks=forks)


def test_a_strip_is_all_written_when_it_begins() -> None:
    """For the same reason as with keys and values."""
    driver = Driver(CompiledLatentAttention, SMALL, torch.bfloat16, block_size=64, num_blocks=2)
    for start, tokens, written in ((0, 1, 32), (1, 31, 32), (32, 40, 96)):
        driver.step(("a", SequenceSlice(start, tokens, [0, 1])))
        assert driver.backend.pool[1].flatten(0, 1).isnan().any(-1).logical_not().sum() == written


def test_another_dtype_is_refused() -> None:
    driver = Driver(CompiledLatentAttention)
    with pytest.raises(ConfigError, match=r"not torch.float16 and 32"):
        Driver(CompiledLatentAttention, dtype=torch.float16)
    metadata = driver.backend.prepare([SequenceSlice(0, 1, [0])])
    with pytest.raises(EngineError, match=r"made for torch.float32, not torch.bfloat16"):
        driver.backend.forward(0, *(x.bfloat16() for x in driver.draw(1)), driver.projection, metadata)
    assert driver.backend.pool.isnan().all(), "something was written before the refusal"
