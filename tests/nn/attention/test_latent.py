"""Latent attention against its definition: every head's keys and values expanded, softmax over all of them."""

from __future__ import annotations

import itertools
import mmap
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from npu_zoo.core.attention import AttentionMetadata, LatentLayout, SequenceSlice
from npu_zoo.core.errors import EngineError, HardwareError
from npu_zoo.core.model_config import MLAConfig
from npu_zoo.nn.attention import latent_pool
from npu_zoo.nn.attention.latent import PagedLatentAttention
from npu_zoo.nn.attention.latent_pool import prefers_absorbed

from .latent_driver import CPU, HEADS, KINDS, KINDS_AND_DTYPES, SMALL, STEPS, TOLERANCE, V3, Driver, shapes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
def test_prompts_chunks_and_single_tokens(kind: type[Any], dtype: torch.dtype, block_size: int) -> None:
    driver = Driver(kind, SMALL, dtype, block_size)
    far = list(range(39, 9, -1))
    driver.step(("a", SequenceSlice(0, 9, list(range(9)))), ("b", SequenceSlice(0, 1, far)))
    driver.step(("b", SequenceSlice(1, 8, far)), ("a", SequenceSlice(9, 1, list(range(10)))))
    driver.step(("a", SequenceSlice(10, 1, [*range(9), 9, 10])), ("b", SequenceSlice(9, 17, far)))
    driver.step(("b", SequenceSlice(26, 1, far)), ("a", SequenceSlice(11, 2, [*range(13)])))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
def test_the_sizes_of_the_large_models(kind: type[Any], dtype: torch.dtype, block_size: int) -> None:
    driver = Driver(kind, V3, dtype, block_size, -(-128 // block_size))
    numbers = list(range(driver.num_blocks - 1, -1, -1))
    a, b = numbers[: -(-40 // block_size)], numbers[-(-40 // block_size) :]
    driver.step(("a", SequenceSlice(0, 30, a)))
    driver.step(("a", SequenceSlice(30, 1, a)), ("b", SequenceSlice(0, 12, b)))
    driver.step(("a", SequenceSlice(31, 4, a)))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("delta", [-1, 0, 1])
@pytest.mark.parametrize("block_size", [2, 3, 8, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_contexts_at_block_borders(kind: type[Any], block_size: int, delta: int) -> None:
    length = 2 * block_size + delta
    driver = Driver(kind, SMALL, block_size=block_size, num_blocks=6)
    driver.step(("a", SequenceSlice(0, length, (3, 1, 4)[: -(-length // block_size)])))
    driver.step(("a", SequenceSlice(length, 1, (3, 1, 4)[: -(-(length + 1) // block_size)])))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("in_a_row", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_share_the_blocks_of_a_prefix(kind: type[Any], same_step: bool, in_a_row: bool) -> None:
    """In the same step too, where what they read is written by a row that may come after them."""
    driver = Driver(kind, SMALL)
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


@pytest.mark.usefixtures("form")
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(shapes(), st.sampled_from([1, 2, 3, 4, 8]), STEPS, st.randoms(use_true_random=False))
@pytest.mark.parametrize("kind", KINDS)
def test_any_sizes_and_any_mix_of_rows(
    kind: type[Any], shape: tuple[MLAConfig, int], block_size: int, steps: list[dict[str, int]], random: Random
) -> None:
    totals = {name: sum(step.get(name, 0) for step in steps) for name in "abcd"}
    needed = {name: -(-total // block_size) for name, total in totals.items()}
    numbers = list(range(sum(needed.values()) + 2))
    random.shuffle(numbers)
    tables = {name: [numbers.pop() for _ in range(count)] for name, count in needed.items()}
    driver = Driver(kind, shape[0], block_size=block_size, num_blocks=sum(needed.values()) + 2, heads=shape[1])
    starts = dict.fromkeys(totals, 0)
    for step in steps:
        order = random.sample(sorted(step), len(step))
        driver.step(*((name, SequenceSlice(starts[name], step[name], tables[name])) for name in order))
        starts |= {name: starts[name] + length for name, length in step.items()}


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
def test_both_forms_and_any_chunks_give_the_same(
    kind: type[Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last query of a text: whole, in chunks and token by token, absorbed and expanded."""
    table, found = [3, 1, 4, 0, 5, 9], []
    chunks = [[23], [5, 1, 17], [22, 1], [7, 16], [1] * 23]
    for absorbed, lengths in itertools.product((True, False), chunks):
        monkeypatch.setattr(latent_pool, "prefers_absorbed", lambda *_, absorbed=absorbed: absorbed)
        driver = Driver(kind, SMALL, dtype)
        whole, outs, start = driver.draw(23), [], 0
        for length in lengths:
            metadata = driver.backend.prepare([SequenceSlice(start, length, table)])
            part = [argument[start : start + length] for argument in whole]
            outs.append(driver.backend.forward(0, *part, driver.projection, metadata))
            start += length
        found.append(torch.cat(outs))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **TOLERANCE[dtype])


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
def test_layers_keep_their_latents_apart(kind: type[Any], dtype: torch.dtype) -> None:
    driver = Driver(kind, SMALL, dtype)
    driver.backend.pool.fill_(0)
    metadata = driver.backend.prepare([SequenceSlice(0, 5, [2, 0])])
    for layer in (1, 0):
        _, _, latent, key_rope = arguments = driver.draw(5)
        driver.backend.forward(layer, *arguments, driver.projection, metadata)
        stored = driver.backend.pool[layer, [2, 0]].flatten(0, 1)
        assert torch.equal(stored[:5], torch.cat((latent, key_rope), dim=-1))
        assert not stored[5:].any()
        assert not driver.backend.pool[:, [1, *range(3, 40)]].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_alone_and_in_a_batch(kind: type[Any]) -> None:
    def rising(*shape: int) -> Tensor:
        """Each token's values are the same, whatever tokens follow."""
        per_token = torch.sin(torch.arange(torch.Size(shape[1:]).numel())).view(shape[1:])
        return torch.stack([per_token * (token + 1) for token in range(shape[0])])

    outs = []
    for others in (0, 3):
        driver = Driver(kind, SMALL)
        driver.random = rising  # type: ignore[method-assign]
        rows = [("a", SequenceSlice(0, 6, [0, 1]))]
        rows += [(str(number), SequenceSlice(0, 3, [4 + number])) for number in range(others)]
        outs.append(driver.step(*rows)[:6])
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_one_projection_are_taken_as_they_are(kind: type[Any]) -> None:
    driver = Driver(kind)
    query, rope, latent, key_rope = driver.draw(9)
    joined, cached = torch.cat((query, rope), -1), torch.cat((latent, key_rope), -1)
    parts = *joined.split([12, 8], -1), *cached.split([24, 8], -1)
    metadata = driver.backend.prepare([SequenceSlice(0, 9, [5, 6, 7])])
    found, due = (
        driver.backend.forward(0, *arguments, driver.projection, metadata)
        for arguments in (parts, (query, rope, latent, key_rope))
    )
    torch.testing.assert_close(found, due, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
def test_a_token_takes_as_many_values_as_a_latent_and_its_key(kind: type[Any], dtype: torch.dtype) -> None:
    assert kind.bytes_per_token(V3, dtype.itemsize) == 576 * dtype.itemsize
    backend = kind(LatentLayout(3, V3, 5, 16), dtype, CPU, 128, 1.0)
    assert backend.pool.untyped_storage().nbytes() == 3 * 5 * 16 * 576 * dtype.itemsize
    tensors = [value for value in vars(backend).values() if isinstance(value, Tensor)]
    assert [tensor is backend.pool for tensor in tensors] == [True]


def test_few_queries_are_absorbed_and_many_expanded() -> None:
    assert prefers_absorbed(V3, 4, 4096)
    assert not prefers_absorbed(V3, 512, 512)
    # Expanding pays from 512 * 256 / (1088 - 320) queries on, whatever the context, once it is long.
    assert prefers_absorbed(V3, 170, 10**6)
    assert not prefers_absorbed(V3, 171, 10**6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_expanded_and_a_single_token_absorbed(kind: type[Any]) -> None:
    rows = [
        SequenceSlice(0, 600, range(38)),  # a prompt
        SequenceSlice(599, 1, range(38)),  # a token
        SequenceSlice(560, 40, range(38)),  # a short chunk after a long context
        SequenceSlice(0, 1, [0]),  # a prompt of one token, though products alone would have it expanded
    ]
    backend = kind(LatentLayout(1, V3, 38, 16), torch.bfloat16, CPU, 1, 1.0)
    metadata = backend.prepare(rows)
    absorbed = metadata.absorbed if kind is PagedLatentAttention else metadata.chosen
    assert absorbed.tolist() == list(range(600, 642))
    assert not prefers_absorbed(V3, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_in_and_out_of_inference_mode(kind: type[Any]) -> None:
    driver = Driver(kind, SMALL)
    with torch.inference_mode():
        driver.step(("a", SequenceSlice(0, 5, [0, 1])), ("b", SequenceSlice(0, 1, [2])))
    driver.step(("a", SequenceSlice(5, 2, [0, 1])), ("b", SequenceSlice(1, 1, [2])))
    arguments = [argument.requires_grad_() for argument in driver.draw(1)]
    metadata = driver.backend.prepare([SequenceSlice(7, 1, [0, 1])])
    assert not driver.backend.forward(1, *arguments, driver.projection, metadata).requires_grad
    driver.step(("b", SequenceSlice(2, 1, [2])))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_rows(kind: type[Any]) -> None:
    driver = Driver(kind, SMALL)
    out = driver.backend.forward(0, *driver.draw(0), driver.projection, driver.backend.prepare([]))
    assert out.shape == (0, HEADS, SMALL.v_head_dim)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_the_pool_takes_memory_only_when_written(kind: type[Any]) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    backend = kind(LatentLayout(60, V3, 1024, 64), torch.bfloat16, CPU, 128, 1.0)
    assert backend.pool.nbytes > 2**32
    assert not backend.pool[59, 1023].any()
    assert resident() - before < 2**26


@pytest.mark.parametrize("kind", KINDS)
def test_more_memory_than_there_is_is_refused(kind: type[Any]) -> None:
    with pytest.raises(HardwareError, match=r"GiB on cpu .* lower kv_cache_memory"):
        kind(LatentLayout(64, V3, 2**40, 64), torch.float32, CPU, 1, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_its_blocks_is_refused(kind: type[Any]) -> None:
    backend = Driver(kind, SMALL).backend
    with pytest.raises(EngineError, match="needs 3 blocks, it has 2"):
        backend.prepare([SequenceSlice(0, 1, [3]), SequenceSlice(4, 5, [0, 1])])
    with pytest.raises(EngineError, match="a row of 0 tokens"):
        backend.prepare([SequenceSlice(4, 0, [0, 1])])


@pytest.mark.parametrize("metadata", [None, AttentionMetadata([SequenceSlice(0, 1, [0])], 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_another_backend_prepared_is_refused(kind: type[Any], metadata: AttentionMetadata | None) -> None:
    driver = Driver(kind, SMALL)
    with pytest.raises(EngineError, match=f"{kind.__name__} takes what its prepare"):
        driver.backend.forward(0, *driver.draw(1), driver.projection, metadata)  # type: ignore[arg-type]
    assert driver.backend.pool.isnan().all(), "something was written before the refusal"
