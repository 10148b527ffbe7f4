"""The compiled latent backend against the definition, by the driver of the one in plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from npu_zoo.compiled.library import obstacle
from npu_zoo.core.attention import AttentionMetadata, LatentLayout, SequenceSlice
from npu_zoo.core.errors import ConfigError, EngineError, HardwareError
from npu_zoo.core.model_config import MLAConfig
from npu_zoo.nn.attention import compiled_latent as module
from npu_zoo.nn.attention.compiled_latent import CompiledLatentAttention

from .test_latent import HEADS, SMALL, STEPS, V3, Driver, shapes
from .test_latent import TOLERANCE as _TOLERANCE

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=f"the compiled kernels cannot serve: {obstacle()}")

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {dtype: _TOLERANCE[dtype] for dtype in DTYPES}


def driver_of(mla: MLAConfig = SMALL, dtype: torch.dtype = torch.float32, **more: int) -> Driver:
    return Driver(mla, dtype, kind=CompiledLatentAttention, **more)  # type: ignore[arg-type]


@pytest.fixture(params=[True, False, None], ids=["absorbed", "expanded", "as chosen"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool | None:
    """Forces one form of the computation on every row of several tokens."""
    if request.param is not None:
        monkeypatch.setattr(module, "prefers_absorbed", lambda *_: request.param)
    monkeypatch.setattr(module, "_EXPANDED_TOKENS", 5)
    value: bool | None = request.param
    return value


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompts_chunks_and_single_tokens(block_size: int, dtype: torch.dtype) -> None:
    driver = driver_of(SMALL, dtype, block_size=block_size)
    far = list(range(39, 9, -1))
    driver.step(("a", SequenceSlice(0, 9, list(range(9)))), ("b", SequenceSlice(0, 1, far)))
    driver.step(("b", SequenceSlice(1, 8, far)), ("a", SequenceSlice(9, 1, list(range(10)))))
    driver.step(("a", SequenceSlice(10, 1, [*range(9), 9, 10])), ("b", SequenceSlice(9, 17, far)))
    driver.step(("b", SequenceSlice(26, 1, far)), ("a", SequenceSlice(11, 2, [*range(13)])))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 4, 40])
def test_longer_texts_of_many_heads(heads: int, dtype: torch.dtype) -> None:
    """Queries of more than a tile and a task, contexts of more than a chunk."""
    driver = driver_of(SMALL, dtype, block_size=64, num_blocks=14, heads=heads)
    driver.step(("a", SequenceSlice(0, 33, [1])), ("b", SequenceSlice(0, 300, [9, 3, 4, 11, 6])))
    driver.step(("b", SequenceSlice(300, 4, [9, 3, 4, 11, 6])), ("a", SequenceSlice(33, 1, [1])))
    driver.step(("b", SequenceSlice(304, 1, [9, 3, 4, 11, 6])), ("a", SequenceSlice(34, 70, [1, 13])))


@pytest.mark.parametrize("absorbed", [True, False])
def test_threads_share_the_work(absorbed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "prefers_absorbed", lambda *_: absorbed)
    torch.set_num_threads(2)
    driver = driver_of(SMALL, torch.bfloat16, block_size=64, num_blocks=14, heads=3)
    driver.step(("a", SequenceSlice(0, 300, [9, 3, 4, 11, 6])))
    driver.step(("a", SequenceSlice(300, 1, [9, 3, 4, 11, 6])))
    driver.step(("a", SequenceSlice(301, 4, [9, 3, 4, 11, 6])), ("b", SequenceSlice(0, 1, [1])))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_the_sizes_of_the_large_models(block_size: int, dtype: torch.dtype) -> None:
    driver = driver_of(V3, dtype, block_size=block_size, num_blocks=-(-128 // block_size))
    numbers = list(range(driver.num_blocks - 1, -1, -1))
    a, b = numbers[: -(-40 // block_size)], numbers[-(-40 // block_size) :]
    driver.step(("a", SequenceSlice(0, 30, a)))
    driver.step(("a", SequenceSlice(30, 1, a)), ("b", SequenceSlice(0, 12, b)))
    driver.step(("a", SequenceSlice(31, 4, a)))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("delta", [-1, 0, 1])
@pytest.mark.parametrize("block_size", [2, 3, 32])
def test_contexts_at_block_borders(block_size: int, delta: int) -> None:
    length = 2 * block_size + delta
    driver = driver_of(block_size=block_size, num_blocks=6)
    driver.step(("a", SequenceSlice(0, length, (3, 1, 4)[: -(-length // block_size)])))
    driver.step(("a", SequenceSlice(length, 1, (3, 1, 4)[: -(-(length + 1) // block_size)])))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("in_a_row", [False, True])
def test_rows_share_the_blocks_of_a_prefix(same_step: bool, in_a_row: bool) -> None:
    """In the same step too, where what they read is written by a row that may come after them."""
    driver = driver_of()
    prefix = [4, 5, 6] if in_a_row else [9, 2, 6]
    owner = ("owner", SequenceSlice(0, 12, prefix))
    more = ("more", SequenceSlice(12, 7, [*prefix, 20, 21]))
    single, shorter = (
        ("single", SequenceSlice(12, 1, [*prefix, 30])),
        ("shorter", SequenceSlice(8, 3, [*prefix[:2], 7])),
    )
    forks = {"more": ("owner", 12), "single": ("owner", 12), "shorter": ("owner", 8)}
    if same_step:
        driver.step(single, more, owner, shorter, forks=forks)
    else:
        driver.step(owner)
        driver.step(single, more, shorter, forks=forks)
    driver.step(("single", SequenceSlice(13, 2, [*prefix, 30])), ("owner", SequenceSlice(12, 1, [*prefix, 8])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prefix_that_many_share_is_attended_to_once(dtype: torch.dtype) -> None:
    driver = driver_of(SMALL, dtype, block_size=64, num_blocks=40)
    prefix = list(range(16, -1, -1))
    driver.step(("owner", SequenceSlice(0, 17 * 64, prefix)))
    rows = [(str(n), SequenceSlice(17 * 64, length, [*prefix, 20 + n])) for n, length in enumerate((1, 3, 1, 1, 60))]
    forks = {name: ("owner", 17 * 64) for name, _ in rows}
    metadata = driver.backend.prepare([row for _, row in rows])
    assert metadata.absorbed.shared == 1
    driver.step(*rows, forks=forks)


@pytest.mark.usefixtures("form")
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(shapes(), STEPS)
def test_any_sizes_and_any_mix_of_rows(shape: tuple[MLAConfig, int], steps: list[dict[str, int]]) -> None:
    random = Random(len(steps))
    for block_size in (1, 3, 8):
        totals = {name: sum(step.get(name, 0) for step in steps) for name in "abcd"}
        needed = {name: -(-total // block_size) for name, total in totals.items()}
        numbers = list(range(sum(needed.values()) + 2))
        random.shuffle(numbers)
        tables = {name: [numbers.pop() for _ in range(count)] for name, count in needed.items()}
        more = {"block_size": block_size, "num_blocks": sum(needed.values()) + 2, "heads": shape[1]}
        driver, starts = driver_of(shape[0], torch.float32, **more), dict.fromkeys(totals, 0)
        for step in steps:
            order = random.sample(sorted(step), len(step))
            driver.step(*((name, SequenceSlice(starts[name], step[name], tables[name])) for name in order))
            starts |= {name: starts[name] + length for name, length in step.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_forms_and_any_chunks_give_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last query of a text: whole, in chunks and token by token, absorbed and expanded."""
    table, found = [3, 1, 4, 0, 5, 9], []
    chunks = [[23], [5, 1, 17], [22, 1], [7, 16], [1] * 23]
    for absorbed, lengths in itertools.product((True, False), chunks):
        monkeypatch.setattr(module, "prefers_absorbed", lambda *_, absorbed=absorbed: absorbed)
        driver = driver_of(SMALL, dtype)
        whole, outs, start = driver.draw(23), [], 0
        for length in lengths:
            metadata = driver.backend.prepare([SequenceSlice(start, length, table)])
            part = [argument[start : start + length] for argument in whole]
            outs.append(driver.backend.forward(0, *part, driver.projection, metadata))
            start += length
        found.append(torch.cat(outs))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_keep_their_latents_apart(dtype: torch.dtype) -> None:
    driver = driver_of(SMALL, dtype)
    driver.backend.pool.fill_(0)
    metadata = driver.backend.prepare([SequenceSlice(0, 5, [2, 0])])
    for layer in (1, 0):
        _, _, latent, key_rope = arguments = driver.draw(5)
        driver.backend.forward(layer, *arguments, driver.projection, metadata)
        stored = driver.backend.pool[layer, [2, 0]].flatten(0, 1)
        assert torch.equal(stored[:5], torch.cat((latent, key_rope), dim=-1))
        assert not stored[5:].any()
        assert not driver.backend.pool[:, [1, *range(3, 40)]].any()


@pytest.mark.usefixtures("form")
def test_parts_of_one_projection_are_taken_as_they_are() -> None:
    driver = driver_of()
    query, rope, latent, key_rope = driver.draw(9)
    joined, cached = torch.cat((query, rope), -1), torch.cat((latent, key_rope), -1)
    parts = *joined.split([12, 8], -1), *cached.split([24, 8], -1)
    metadata = driver.backend.prepare([SequenceSlice(0, 9, [5, 6, 7])])
    found, due = (
        driver.backend.forward(0, *arguments, driver.projection, metadata)
        for arguments in (parts, (query, rope, latent, key_rope))
    )
    torch.testing.assert_close(found, due, rtol=1e-6, atol=1e-6)


def test_a_prompt_is_expanded_and_a_single_token_absorbed() -> None:
    rows = [
        SequenceSlice(0, 600, range(38)),
        SequenceSlice(599, 1, range(38)),
        SequenceSlice(560, 40, range(38)),
        SequenceSlice(0, 1, [0]),
    ]
    backend = CompiledLatentAttention(LatentLayout(1, V3, 38, 16), torch.bfloat16, CPU, 1, 1.0)
    metadata = backend.prepare(rows)
    assert [row.tokens for row in metadata.expanded] == [slice(0, 600)]
    assert metadata.chosen is not None
    assert metadata.chosen.tolist() == list(range(600, 642))


def test_in_and_out_of_inference_mode() -> None:
    driver = driver_of()
    with torch.inference_mode():
        driver.step(("a", SequenceSlice(0, 9, [0, 1, 3])), ("b", SequenceSlice(0, 1, [2])))
    driver.step(("a", SequenceSlice(9, 2, [0, 1, 3])), ("b", SequenceSlice(1, 1, [2])))
    arguments = [argument.requires_grad_() for argument in driver.draw(1)]
    metadata = driver.backend.prepare([SequenceSlice(11, 1, [0, 1, 3])])
    assert not driver.backend.forward(1, *arguments, driver.projection, metadata).requires_grad


def test_a_step_without_rows() -> None:
    driver = driver_of()
    out = driver.backend.forward(0, *driver.draw(0), driver.projection, driver.backend.prepare([]))
    assert out.shape == (0, HEADS, SMALL.v_head_dim)


def test_what_it_cannot_do_is_refused() -> None:
    driver = driver_of()
    with pytest.raises(ConfigError, match=r"not torch.float16 and 32"):
        driver_of(dtype=torch.float16)
    with pytest.raises(HardwareError, match=r"GiB on cpu .* lower kv_cache_memory"):
        CompiledLatentAttention(LatentLayout(64, V3, 2**40, 64), torch.float32, CPU, 1, 1.0)
    with pytest.raises(EngineError, match="needs 3 blocks, it has 2"):
        driver.backend.prepare([SequenceSlice(0, 1, [3]), SequenceSlice(4, 5, [0, 1])])
    with pytest.raises(EngineError, match="CompiledLatentAttention takes what its prepare"):
        driver.backend.forward(0, *driver.draw(1), driver.projection, AttentionMetadata([], 1))
    metadata = driver.backend.prepare([SequenceSlice(0, 1, [0])])
    with pytest.raises(EngineError, match=r"made for torch.float32, not torch.bfloat16"):
        driver.backend.forward(0, *(x.bfloat16() for x in driver.draw(1)), driver.projection, metadata)
    assert driver.backend.pool.isnan().all(), "something was written before the refusal"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_takes_as_many_values_as_a_latent_and_its_key(dtype: torch.dtype) -> None:
    assert CompiledLatentAttention.bytes_per_token(V3, dtype.itemsize) == 576 * dtype.itemsize
    backend = CompiledLatentAttention(LatentLayout(3, V3, 5, 16), dtype, CPU, 128, 1.0)
    assert backend.pool.nbytes == 3 * 5 * 16 * 576 * dtype.itemsize
