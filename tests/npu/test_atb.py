from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch_npu

from npu_zoo.simulator.errors import NoSemantics

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
    positions = [keys - count + i for count, keys in zip(lengths, KEYS, strict=True) for i in range(count)]
    if compressed:
        mask = (torch.ones(2048, 2048).triu(1).half() * -10000).npu()
    else:  # a row for each query
        hidden = (torch.arange(144)[None] > torch.tensor(positions)[:, None]).half() * -10000
        mask = on_device(torch.nn.functional.pad(hidden, (0, 0, 0, 10))[None, :, None], nz=True)
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


def test_pieces_need_a_mask_row_for_each_query() -> None:
    query, cache = draw(20, HEADS, SIZE).npu(), on_device(torch.zeros(2, BLOCK, KV_HEADS, SIZE).half(), nz=True)
    with pytest.raises(NoSemantics, match="mask of 16 rows for 20 queries"):
        torch_npu._npu_paged_attention_splitfuse(
            query=query, key_cache=cache, value_cache=cache, block_table=torch.zeros(1, 1, dtype=torch.int32).npu(),
            context_lens=torch.tensor([20], dtype=torch.int32), seq_len=torch.tensor([20], dtype=torch.int32),
            mask=on_device(torch.zeros(1, 16, 1, 144).half(), nz=True), num_kv_heads=KV_HEADS, num_heads=HEADS,
            scale_value=SCALE, out=torch.empty_like(query),
        )  # fmt: skip


def test_a_compressed_mask_is_read() -> None:
    query, key = draw(7, HEADS, SIZE), draw(7, KV_HEADS, SIZE)
    out = torch.empty_like(query).npu()
    torch_npu._npu_flash_attention_v3(
        query=query.npu(), key=key.npu(), value=key.npu(),
        mask=on_device(torch.zeros(1, 2048, 1, 2048).half(), nz=True), seq_len=torch.tensor([7], dtype=torch.int32),
        scale_value=SCALE, num_heads=HEADS, num_kv_heads=KV_HEADS, out=out,
    )  # fmt: skip
    reference = dense.dense_attention(query, key, key, SCALE, causal=False)[0]
    torch.testing.assert_close(out.cpu().double(), reference, atol=3e-3, rtol=3e-3)


@pytest.mark.chip("ascend910b")
def test_latent_decode_over_pages() -> None:
    keys, width, latent = [draw(n, 1, 576) for n in KEYS], 576, 512
    cache, table = dense.scattered(keys, BLOCK, 6)
    query = draw(3, HEADS, width)
    out = torch.empty(3, HEADS, latent).half().npu()
    torch_npu._npu_paged_attention_mla(
        query=query.npu(), key_cache=cache.npu(), num_kv_heads=1, num_heads=HEADS, scale_value=width**-0.5,
        block_table=table.npu(), context_lens=torch.tensor(KEYS, dtype=torch.int32), mla_vheadsize=latent, out=out,
    )  # fmt: skip
    for number, key in enumerate(keys):
        reference = dense.dense_attention(query[number][None], key, key[..., :latent], width**-0.5, causal=False)[0]
        torch.testing.assert_close(out[number].cpu().double(), reference[0], atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize("neox", [True, False])
def test_rotation_in_place(neox: bool) -> None:
    positions = torch.tensor([4, 0, 17])
    angle = torch.arange(20)[:, None] * torch.logspace(0, -2, SIZE // 2)
    table = torch.cat([angle.cos(), angle.sin()], -1).half()
    tensors = [draw(3, heads * SIZE) for heads in (HEADS, KV_HEADS)]
    on_npu = [t.npu() for t in tensors]
    torch_npu._npu_rotary_embedding(positions.npu(), *on_npu, SIZE, table.npu(), neox)
    turn = torch.exp(1j * angle[positions].double())[:, None]
    for before, after in zip(tensors, on_npu, strict=True):
        heads = before.double().view(3, -1, SIZE)
        first, second = heads.chunk(2, -1) if neox else (heads[..., ::2], heads[..., 1::2])
        turned = torch.complex(first, second) * turn
        parts = (turned.real, turned.imag)
        expected = torch.cat(parts, -1) if neox else torch.stack(parts, -1).flatten(-2)
        torch.testing.assert_close(after.cpu().double(), expected.flatten(1), atol=6e-3, rtol=6e-3)


@pytest.mark.parametrize(
    ("best", "expected"),
    [(1, [[1, 9, 0, 0, 8, 0], [3, 3, 4, 4, 0, 0]]), (2, [[1, 9, 5, 6, 0, 0], [3, 3, 4, 4, 0, 0]])],
)
def test_all_but_the_best_groups_become_zero(best: int, expected: list[list[float]]) -> None:
    scores = torch.tensor([[1.0, 9.0, 5.0, 6.0, 8.0, 0.0], [3.0, 3.0, 4.0, 4.0, 1.0, 2.0]]).half().npu()
    torch_npu._npu_group_topk(scores, k=2, group_num=3, n=best)
    assert scores.cpu().tolist() == expected


def test_the_workspace_is_memory_of_the_device() -> None:
    query, cache = draw(1, HEADS, SIZE).npu(), on_device(draw(1, BLOCK, KV_HEADS, SIZE), nz=True)
    arguments = {
        "query": query, "key_cache": cache, "value_cache": cache, "num_kv_heads": KV_HEADS, "num_heads": HEADS,
        "scale_value": SCALE, "block_table": torch.zeros(1, 1, dtype=torch.int32).npu(),
        "context_lens": torch.tensor([9], dtype=torch.int32),
    }  # fmt: skip
    plain, given = torch.empty_like(query), torch.empty_like(query)
    workspace = torch_npu._npu_paged_attention_get_workspace(**arguments, out=given)
    assert (workspace.dtype, workspace.device.type) == (torch.uint8, "npu")
    torch_npu._npu_paged_attention(**arguments, out=plain)
    torch_npu._npu_paged_attention(**arguments, out=given, workspace=workspace)
    assert torch.equal(plain.cpu(), given.cpu())


def test_the_allocated_cache_form_of_310p() -> None:
    shape = (2, KV_HEADS * SIZE // 16, BLOCK, 16)
    cache = torch_npu.empty_with_format(shape, dtype=torch.float16, device="npu", acl_format=NZ)
    cache.zero_()
    key, query = draw(3, KV_HEADS, SIZE), draw(1, HEADS, SIZE)
    slots = torch.tensor([BLOCK, BLOCK + 1, BLOCK + 2], dtype=torch.int32)
    torch_npu._npu_reshape_and_cache(
        key=key.npu(), value=key.npu(), key_cache=cache, value_cache=cache, slot_indices=slots.npu()
    )
    out = torch.empty(1, HEADS, SIZE).half().npu()
    torch_npu._npu_paged_attention(
        query=query.npu(), key_cache=cache, value_cache=cache, num_kv_heads=KV_HEADS, num_heads=HEADS,
        scale_value=SCALE, block_table=torch.ones(1, 1, dtype=torch.int32).npu(),
        context_lens=torch.tensor([3], dtype=torch.int32), out=out,
    )  # fmt: skip
    reference = dense.dense_attention(query, key, key, SCALE, causal=True)[0]
    torch.testing.assert_close(out.cpu().double(), reference, atol=3e-3, rtol=3e-3)
