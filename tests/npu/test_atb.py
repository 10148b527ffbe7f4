from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch_npu

_SPEC = importlib.util.spec_from_file_location("dense", Path(__file__).with_name("dense.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
dense = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(dense)

HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 64, 128
SCALE = SIZE**-0.5
KEYS = [37, 130, 16]
NZ = 29


@pytest.fixture(autouse=True)
def _internal_formats() -> Iterator[None]:
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = False


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).half()


def on_device(cache: torch.Tensor, *, nz: bool) -> torch.Tensor:
    """A cache [nb, bs, Nk, D] on the device, also as NZ [nb, Nk*D/16, bs, 16] of that storage format."""
    if not nz:
        return cache.npu()
    fractals = cache.flatten(2).unflatten(-1, (-1, 16)).transpose(1, 2).contiguous()
    return torch_npu.npu_format_cast(fractals.npu(), NZ)


@pytest.mark.parametrize("nz", [True, pytest.param(False, marks=pytest.mark.chip("ascend910b"))])
def test_decode_over_pages(nz: bool) -> None:
    query = draw(3, HEADS, SIZE)
    keys, values = [draw(n, KV_HEADS, SIZE) for n in KEYS], [draw(n, KV_HEADS, SIZE) + 0.3 for n in KEYS]
    (key, table), (value, _) = (dense.scattered(rows, BLOCK, 6) for rows in (keys, values))
    out = torch.empty(3, HEADS, SIZE).half().npu()
    torch_npu._npu_paged_attention(
        query=query.npu(), key_cache=on_device(key, nz=nz), value_cache=on_device(value, nz=nz),
        num_kv_heads=KV_HEADS, num_heads=HEADS, scale_value=SCALE, block_table=table.npu(),
        context_lens=torch.tensor(KEYS, dtype=torch.int32), out=out,
    )  # fmt: skip
    for number in range(3):
        reference = dense.dense_attention(query[number : number + 1], keys[number], values[number], SCALE, causal=True)
        torch.testing.assert_close(out[number : number + 1].cpu().double(), reference[0], atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize("compressed", [False, True])
def test_whole_prompts(compressed: bool) -> None:
    lengths = [16, 5, 27]
    query, key = draw(sum(lengths), HEADS, SIZE), draw(sum(lengths), KV_HEADS, SIZE)
    out = torch.empty(sum(lengths), HEADS, SIZE).half().npu()
    size = 2048 if compressed else 32
    hidden = torch.ones(size, size).triu(1).half() * (-10000 if compressed else float("-inf"))
    hidden = hidden.nan_to_num(nan=0.0, neginf=float("-inf"))
    mask = on_device(hidden[None, :, None], nz=True)
    work = torch_npu._npu_flash_attention_v3 if compressed else torch_npu._npu_flash_attention
    work(
        query=query.npu(), key=key.npu(), value=key.npu(), mask=mask, seq_len=torch.tensor(lengths, dtype=torch.int32),
        scale_value=SCALE, num_heads=HEADS, num_kv_heads=KV_HEADS, out=out,
    )  # fmt: skip
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        reference = dense.dense_attention(query[rows], key[rows], key[rows], SCALE, causal=True)[0]
        torch.testing.assert_close(out[rows].cpu().double(), reference, atol=3e-3, rtol=3e-3)
        start += length


@pytest.mark.parametrize("compressed", [False, True])
def test_pieces_of_prompts_over_pages(compressed: bool) -> None:
    lengths = [5, 1, 16]
    query = draw(sum(lengths), HEADS, SIZE)
    keys, values = [draw(n, KV_HEADS, SIZE) for n in KEYS], [draw(n, KV_HEADS, SIZE) - 0.3 for n in KEYS]
    (key, table), (value, _) = (dense.scattered(rows, BLOCK, 6) for rows in (keys, values))
    out = torch.empty(sum(lengths), HEADS, SIZE).half().npu()
    size = 2048 if compressed else 144
    hidden = torch.ones(size, size).triu(1).half() * -10000
    mask = hidden.npu() if compressed else on_device(hidden[None, :, None], nz=True)
    work = torch_npu._npu_paged_attention_splitfuse_v2 if compressed else torch_npu._npu_paged_attention_splitfuse
    work(
        query=query.npu(), key_cache=on_device(key, nz=True), value_cache=on_device(value, nz=True),
        block_table=table.npu(), context_lens=torch.tensor(KEYS, dtype=torch.int32), mask=mask,
        seq_len=torch.tensor(lengths, dtype=torch.int32), num_kv_heads=KV_HEADS, num_heads=HEADS, scale_value=SCALE,
        out=out,
    )  # fmt: skip
    start = 0
    for number, length in enumerate(lengths):
        rows = slice(start, start + length)
        reference = dense.dense_attention(query[rows], keys[number], values[number], SCALE, causal=True)[0]
        torch.testing.assert_close(out[rows].cpu().double(), reference, atol=3e-3, rtol=3e-3)
        start += length


@pytest.mark.chip("ascend910b")
def test_latents_written_and_read() -> None:
    rows, width, rank = [draw(n, 1, 96) for n in KEYS], 96, 64
    _, table = dense.scattered(rows, BLOCK, 6)
    cache = torch.zeros(6, BLOCK, 1, width).half().npu()
    for sequence, blocks in zip(rows, table, strict=True):
        slots = [int(blocks[i // BLOCK]) * BLOCK + i % BLOCK for i in range(len(sequence))]
        torch_npu._npu_reshape_and_cache_siso(sequence.npu(), cache, torch.tensor(slots, dtype=torch.int32).npu())
    query, out = draw(3, HEADS, width), torch.empty(3, HEADS, rank).half().npu()
    torch_npu._npu_paged_attention_mla(
        query.npu(), cache, 1, HEADS, SCALE, table.npu(), torch.tensor(KEYS, dtype=torch.int32), rank, out
    )
    for number, sequence in enumerate(rows):
        reference = dense.dense_attention(
            query[number : number + 1], sequence, sequence[..., :rank], SCALE, causal=True
        )[0]
        torch.testing.assert_close(out[number : number + 1].cpu().double(), reference, atol=3e-3, rtol=3e-3)


def test_no_workspace_is_asked_for() -> None:
    query, cache = draw(1, HEADS, SIZE).npu(), on_device(torch.zeros(2, BLOCK, KV_HEADS, SIZE).half(), nz=True)
    found = torch_npu._npu_paged_attention_get_workspace(
        query, cache, cache, KV_HEADS, HEADS, SCALE, torch.zeros(1, 1, dtype=torch.int32).npu(),
        torch.tensor([1], dtype=torch.int32), torch.empty_like(query),
    )  # fmt: skip
    assert found.numel() == 0
