from __future__ import annotations

import importlib.util
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu

from npu_zoo.simulator.errors import NoSemantics

_SPEC = importlib.util.spec_from_file_location("dense", Path(__file__).with_name("dense.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
dense = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(dense)

pytestmark = pytest.mark.chip("ascend910b")

HEADS, KV_HEADS, SIZE = 4, 2, 128
SCALE = SIZE**-0.5
QUERIES, KEYS = [5, 1, 12], [37, 130, 12]
BLOCK = 128
CAUSAL = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def draw(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def sequences() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    return (
        [draw(n, HEADS, SIZE) for n in QUERIES],
        [draw(n, KV_HEADS, SIZE) for n in KEYS],
        [draw(n, KV_HEADS, SIZE) + 0.1 for n in KEYS],
    )


def expected(queries: list[torch.Tensor], keys: list[torch.Tensor], values: list[torch.Tensor], **how: Any) -> Any:
    found = [dense.dense_attention(q, k, v, SCALE, **how) for q, k, v in zip(queries, keys, values, strict=True)]
    return torch.cat([output for output, _ in found]), torch.cat([lse for _, lse in found])


def close(found: torch.Tensor, reference: torch.Tensor) -> None:
    torch.testing.assert_close(found.cpu().double(), reference, atol=3e-3, rtol=3e-3)


def nz(cache: torch.Tensor) -> torch.Tensor:
    """[nb, bs, Nk, D] as [nb, Nk, D/16, bs, 16]."""
    return cache.unflatten(-1, (-1, 16)).permute(0, 2, 3, 1, 4).contiguous()


CACHES = {
    "blocks of rows": lambda cache: cache.flatten(2),
    "blocks of heads": lambda cache: cache.transpose(1, 2).contiguous(),
    "NZ": nz,
}


@pytest.mark.parametrize("form", CACHES)
def test_chunked_prefill_over_pages(form: str) -> None:
    queries, keys, values = sequences()
    key_cache, table = dense.scattered(keys, BLOCK, 8)
    value_cache, _ = dense.scattered(values, BLOCK, 8)
    reference, lse_reference = expected(queries, keys, values, causal=True)
    found, lse = torch_npu.npu_fused_infer_attention_score(
        query=torch.cat(queries).npu(), key=CACHES[form](key_cache).npu(), value=CACHES[form](value_cache).npu(),
        atten_mask=CAUSAL.npu(), block_table=table.npu(), input_layout="TND", block_size=BLOCK,
        actual_seq_lengths=list(accumulate(QUERIES)), actual_seq_lengths_kv=KEYS, num_key_value_heads=KV_HEADS,
        num_heads=HEADS, scale=SCALE, sparse_mode=3, softmax_lse_flag=True,
    )  # fmt: skip
    close(found, reference)
    close(lse[..., 0], lse_reference)


def test_whole_prompts_without_a_cache() -> None:
    queries = [draw(n, HEADS, SIZE) for n in (3, 9)]
    keys = [draw(n, KV_HEADS, SIZE) for n in (3, 9)]
    found, _ = torch_npu.npu_fused_infer_attention_score_v2(
        torch.cat(queries).npu(), torch.cat(keys).npu(), torch.cat(keys).npu(), atten_mask=CAUSAL.npu(),
        input_layout="TND", actual_seq_qlen=[3, 12], actual_seq_kvlen=[3, 12], num_query_heads=HEADS,
        num_key_value_heads=KV_HEADS, softmax_scale=SCALE, sparse_mode=3,
    )  # fmt: skip
    close(found, expected(queries, keys, keys, causal=True)[0])


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD", "BNSD_BSND"])
@pytest.mark.parametrize("paged", [True, False])
def test_decode(layout: str, paged: bool) -> None:
    queries = [draw(1, HEADS, SIZE) + n for n in range(3)]
    keys, values = [draw(n, KV_HEADS, SIZE) for n in KEYS], [draw(n, KV_HEADS, SIZE) - 0.2 for n in KEYS]
    if paged:
        (key, table), (value, _) = (dense.scattered(rows, BLOCK, 8) for rows in (keys, values))
        form = "blocks of rows" if layout.startswith("BS") else "blocks of heads"
        arguments = {"block_table": table.npu(), "block_size": BLOCK}
        key, value = CACHES[form](key), CACHES[form](value)
    else:
        key, value = (torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (keys, values))
        key, value = (in_layout(t, layout) for t in (key, value))
        arguments = {}
    found, _ = torch_npu.npu_fused_infer_attention_score(
        in_layout(torch.stack(queries), layout).npu(), key.npu(), value.npu(), input_layout=layout,
        actual_seq_lengths_kv=KEYS, num_key_value_heads=KV_HEADS, num_heads=HEADS, scale=SCALE, **arguments,
    )  # fmt: skip
    reference = expected(queries, keys, values, causal=True)[0][:, None]
    close(found, in_layout(reference, layout.split("_")[-1]))


def in_layout(batch: torch.Tensor, layout: str) -> torch.Tensor:
    """[B, S, N, D] in another layout."""
    source = layout.split("_")[0]
    return {"BSH": batch.flatten(2), "BSND": batch, "BNSD": batch.transpose(1, 2).contiguous()}[source]


def test_a_mask_hides_keys() -> None:
    query, key = draw(1, 6, HEADS, SIZE), draw(1, 9, KV_HEADS, SIZE)
    mask = torch.zeros(1, 6, 9, dtype=torch.bool)
    mask[:, :, 4:] = True
    found, _ = torch_npu.npu_fused_infer_attention_score(
        query.npu(), key.npu(), key.npu(), atten_mask=mask.npu(), input_layout="BSND", num_heads=HEADS,
        num_key_value_heads=KV_HEADS, scale=SCALE,
    )  # fmt: skip
    reference = dense.dense_attention(query[0], key[0, :4], key[0, :4], SCALE, causal=False)[0]
    close(found[0], reference)


@pytest.mark.parametrize("offset", [0, 4])
def test_causal_from_either_corner(offset: int) -> None:
    query, key = draw(1, 5, HEADS, SIZE), draw(1, 5 + offset, KV_HEADS, SIZE)
    for mode in (2, 3):
        found, _ = torch_npu.npu_fused_infer_attention_score(
            query.npu(), key.npu(), key.npu(), atten_mask=CAUSAL.npu(), input_layout="BSND", num_heads=HEADS,
            num_key_value_heads=KV_HEADS, scale=SCALE, sparse_mode=mode,
        )  # fmt: skip
        keys = key[0] if mode == 3 else key[0, :5]
        close(found[0], dense.dense_attention(query[0], keys, keys, SCALE, causal=True)[0])


def test_parts_merged_by_their_log_sum_exp() -> None:
    query, key, value = draw(4, HEADS, SIZE), draw(40, KV_HEADS, SIZE), draw(40, KV_HEADS, SIZE) + 1
    parts = []
    for rows in (slice(0, 16), slice(16, 40)):
        output, lse = torch_npu.npu_fused_infer_attention_score(
            query.npu(), key[rows].npu(), value[rows].npu(), input_layout="TND", actual_seq_lengths=[4],
            actual_seq_lengths_kv=[rows.stop - rows.start], num_heads=HEADS, num_key_value_heads=KV_HEADS, scale=SCALE,
            softmax_lse_flag=True,
        )  # fmt: skip
        parts.append((output.reshape(-1, SIZE), lse.flatten()))
    merged, _ = torch_npu.npu_attention_update([lse for _, lse in parts], [output for output, _ in parts], 0)
    reference = dense.dense_attention(query, key, value, SCALE, causal=False)[0]
    close(merged.view(4, HEADS, SIZE), reference)


def latent(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compressed keys [tokens, 1, 512] and their rotary part [tokens, 1, 64]."""
    return draw(tokens, 1, 512) / 3, draw(tokens, 1, 64)


def test_absorbed_decode_equals_expanded_heads() -> None:
    up_key, up_value = draw(HEADS, 128, 512) / 22, draw(HEADS, 512, 128) / 22
    plain, rope = draw(3, HEADS, 128), draw(3, HEADS, 64)
    parts = [latent(n) for n in KEYS]
    (compressed, table), (ropes, _) = (dense.scattered([p[i] for p in parts], BLOCK, 8) for i in (0, 1))
    absorbed = torch.einsum("bnd,ndr->bnr", plain.float(), up_key.float()).half()
    found, _ = torch_npu.npu_fused_infer_attention_score_v2(
        absorbed[:, :, None].contiguous().npu(), compressed.transpose(1, 2).contiguous().npu(),
        compressed.transpose(1, 2).contiguous().npu(), query_rope=rope[:, :, None].npu(),
        key_rope=ropes.transpose(1, 2).contiguous().npu(), block_table=table.npu(), block_size=BLOCK,
        actual_seq_kvlen=KEYS, input_layout="BNSD_NBSD", num_query_heads=HEADS, num_key_value_heads=1,
        softmax_scale=192**-0.5,
    )  # fmt: skip
    output = torch.einsum("nbsr,nrd->bsnd", found.cpu().float(), up_value.float())
    for number, (part, key_rope) in enumerate(parts):
        keys = torch.einsum("sr,ndr->snd", part[:, 0].double(), up_key.double())
        keys = torch.cat([keys, key_rope.double().expand(-1, HEADS, -1)], -1)
        values = torch.einsum("sr,nrd->snd", part[:, 0].double(), up_value.double())
        query = torch.cat([plain[number], rope[number]], -1)[None]
        reference = dense.dense_attention(query, keys, values, 192**-0.5, causal=False)[0]
        torch.testing.assert_close(output[number].double(), reference, atol=1e-2, rtol=1e-2)


def test_latent_prefill_with_separate_rotary_parts() -> None:
    query, rope = draw(6, HEADS, 128), draw(6, HEADS, 64)
    key, key_rope, value = draw(6, HEADS, 128) + 0.1, draw(6, HEADS, 64) - 0.1, draw(6, HEADS, 128) + 0.2
    found, _ = torch_npu.npu_fused_infer_attention_score(
        query.npu(), key.npu(), value.npu(), query_rope=rope.npu(), key_rope=key_rope.npu(), atten_mask=CAUSAL.npu(),
        input_layout="TND", actual_seq_lengths=[6], actual_seq_lengths_kv=[6], num_heads=HEADS,
        num_key_value_heads=HEADS, scale=SCALE, sparse_mode=3,
    )  # fmt: skip
    whole_query, whole_key = torch.cat([query, rope], -1), torch.cat([key, key_rope], -1)
    close(found, dense.dense_attention(whole_query, whole_key, value, SCALE, causal=True)[0])


@pytest.mark.parametrize("mode", [0, 1])
def test_keys_of_eight_bits(mode: int) -> None:
    query = draw(2, HEADS, 1, SIZE)
    codes = torch.randint(-127, 128, (2, 2, KV_HEADS, 40, SIZE), dtype=torch.int8)
    per_channel = (torch.rand(2, KV_HEADS, 1, SIZE) / 50 + 0.001).half()
    per_token = torch.rand(2, 2, 40) / 50 + 0.001
    scale = per_channel if mode == 0 else per_token
    found, _ = torch_npu.npu_fused_infer_attention_score(
        query.npu(), codes[0].npu(), codes[1].npu(), input_layout="BNSD", actual_seq_lengths_kv=[40, 33],
        key_antiquant_scale=scale[0].npu(), value_antiquant_scale=scale[1].npu(), key_antiquant_mode=mode,
        value_antiquant_mode=mode, num_heads=HEADS, num_key_value_heads=KV_HEADS, scale=SCALE, inner_precise=1,
    )  # fmt: skip
    for number, length in enumerate((40, 33)):
        steps = per_channel.double() if mode == 0 else per_token[:, number, None, :length, None].double()
        rows = [(codes[i, number, :, :length].double() * steps[i]).transpose(0, 1) for i in (0, 1)]
        reference = dense.dense_attention(query[number].transpose(0, 1), *rows, SCALE, causal=False)[0]
        torch.testing.assert_close(found[number, :, 0].cpu().double(), reference[0], atol=1e-2, rtol=1e-2)


def seen_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention [Sq, N, D] in which query i sees the keys j with seen[i, j]."""
    output = torch.zeros(*query.shape[:2], value.shape[-1], dtype=torch.float64)
    for row in range(len(query)):
        if seen[row].any():
            rows = (t[seen[row]] for t in (key, value))
            output[row] = dense.dense_attention(query[row : row + 1], *rows, SCALE, causal=False)[0][0]
    return output


def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The first version with the arguments that all tests share, on the device."""
    how = {name: given.npu() if isinstance(given, torch.Tensor) else given for name, given in how.items()}
    how = {"num_heads": HEADS, "num_key_value_heads": KV_HEADS, "scale": SCALE, **how}
    return torch_npu.npu_fused_infer_attention_score(query.npu(), key.npu(), value.npu(), **how)


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD", "BNSD_BSND", "BSH_NBSD", "BSND_NBSD", "BNSD_NBSD"])
@pytest.mark.parametrize("paged", [True, False])
def test_prefill_in_padded_layouts(layout: str, paged: bool) -> None:
    query, keys = draw(2, 6, HEADS, SIZE), [draw(n, KV_HEADS, SIZE) for n in (9, 140)]
    values = [key.flip(0) + 0.2 for key in keys]
    if paged:
        (key, table), (value, _) = (dense.scattered(rows, BLOCK, 4) for rows in (keys, values))
        key, value = key.flatten(2), value.flatten(2)
        how = {"block_table": table, "block_size": BLOCK}
    else:
        key, value = (torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (keys, values))
        key, value, how = in_layout(key, layout), in_layout(value, layout), {}
    found, lse = fused(
        in_layout(query, layout), key, value, input_layout=layout, actual_seq_lengths=[6, 6, 6],
        actual_seq_lengths_kv=[9, 140, 1], sparse_mode=3, atten_mask=CAUSAL, softmax_lse_flag=True, **how,
    )  # fmt: skip
    pairs = [dense.dense_attention(q, k, v, SCALE, causal=True) for q, k, v in zip(query, keys, values, strict=True)]
    output, target = torch.stack([output for output, _ in pairs]), layout.split("_")[-1]
    close(found, output.permute(2, 0, 1, 3) if target == "NBSD" else in_layout(output, target))
    close(lse[..., 0], torch.stack([one for _, one in pairs]).transpose(1, 2))


@pytest.mark.parametrize("layout", ["TND", "TND_NTD", "NTD", "NTD_TND"])
def test_prefill_in_packed_layouts(layout: str) -> None:
    source, _, target = layout.partition("_")
    queries, keys, values = sequences()
    arrange = {"TND": lambda t: t, "NTD": lambda t: t.transpose(0, 1).contiguous()}
    tensors = (arrange[source](torch.cat(rows)) for rows in (queries, keys, values))
    found, lse = fused(
        *tensors, input_layout=layout, actual_seq_lengths=list(accumulate(QUERIES)), sparse_mode=3, atten_mask=CAUSAL,
        actual_seq_lengths_kv=list(accumulate(KEYS)), softmax_lse_flag=True,
    )  # fmt: skip
    reference, lse_reference = expected(queries, keys, values, causal=True)
    close(found, arrange[target or source](reference))
    close(lse[..., 0], lse_reference)


def test_chunks_of_a_prompt_are_the_whole_prompt() -> None:
    query, key, value = draw(40, HEADS, SIZE), draw(40, KV_HEADS, SIZE), draw(40, KV_HEADS, SIZE) + 1
    (keys, table), (values, _) = (dense.scattered([rows], BLOCK, 2) for rows in (key, value))
    parts = []
    for start, end in ((0, 13), (13, 14), (14, 40)):
        part, _ = fused(
            query[start:end], keys.flatten(2), values.flatten(2), input_layout="TND", actual_seq_lengths=[end - start],
            actual_seq_lengths_kv=[end], block_table=table, block_size=BLOCK, sparse_mode=3, atten_mask=CAUSAL,
        )  # fmt: skip
        parts.append(part)
    close(torch.cat(parts), dense.dense_attention(query, key, value, SCALE, causal=True)[0])


def test_a_band_from_the_lower_right_corner() -> None:
    query, key = draw(5, HEADS, SIZE), draw(9, KV_HEADS, SIZE)
    found, _ = fused(
        query[None], key[None], key[None], input_layout="BSND", sparse_mode=4, atten_mask=CAUSAL, pre_tokens=2,
        next_tokens=1,
    )  # fmt: skip
    seen = torch.tensor([[i + 4 - 2 <= j <= i + 4 + 1 for j in range(9)] for i in range(5)])
    close(found[0], seen_attention(query, key, key, seen))


def test_bounds_from_the_upper_left_corner_hold_with_a_mask_alone() -> None:
    query, key = draw(5, HEADS, SIZE), draw(9, KV_HEADS, SIZE)
    mask = torch.zeros(1, 5, 9, dtype=torch.bool)
    mask[0, :, 1] = True
    tensors, how = (query[None], key[None], key[None]), {"input_layout": "BSND", "pre_tokens": 1, "next_tokens": 2}
    seen = torch.tensor([[i - 1 <= j <= i + 2 and j != 1 for j in range(9)] for i in range(5)])
    close(fused(*tensors, atten_mask=mask, **how)[0][0], seen_attention(query, key, key, seen))
    close(fused(*tensors, atten_mask=mask, sparse_mode=1, **how)[0][0], seen_attention(query, key, key, ~mask[0]))
    close(fused(*tensors, **how)[0][0], seen_attention(query, key, key, torch.ones(5, 9, dtype=torch.bool)))


def test_a_mask_for_each_sequence() -> None:
    query, key = draw(2, 1, HEADS, SIZE), draw(2, 6, KV_HEADS, SIZE)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 3:], mask[1, :2] = True, True
    found, _ = fused(query, key, key, input_layout="BSND", atten_mask=mask, pre_tokens=0, next_tokens=0)
    for number, seen in enumerate(~mask):
        close(found[number], seen_attention(query[number], key[number], key[number], seen[None]))


def test_decode_ignores_sparse_mode_bounds_and_length() -> None:
    query, key = draw(2, HEADS, 1, SIZE), draw(2, KV_HEADS, 7, SIZE)
    found, _ = fused(
        query, key, key, input_layout="BNSD", sparse_mode=3, atten_mask=CAUSAL, pre_tokens=0, next_tokens=0,
        actual_seq_lengths=[0, 1],
    )  # fmt: skip
    for number in range(2):
        rows = key[number].transpose(0, 1)
        reference = dense.dense_attention(query[number].transpose(0, 1), rows, rows, SCALE, causal=False)[0]
        close(found[number, :, 0], reference[0])


def test_a_compressed_mask_the_wrong_way_round_shows() -> None:
    query, key = draw(1, 5, HEADS, SIZE), draw(1, 5, KV_HEADS, SIZE)
    found, _ = fused(query, key, key, input_layout="BSND", sparse_mode=3, atten_mask=~CAUSAL)
    seen = torch.ones(5, 5, dtype=torch.bool).triu(1)
    close(found[0], seen_attention(query[0], key[0], key[0], seen))


def test_queries_before_all_keys_give_zeros() -> None:
    query, key = draw(1, 5, HEADS, SIZE), draw(1, 3, KV_HEADS, SIZE)
    found, lse = fused(
        query, key, key, input_layout="BSND", sparse_mode=3, atten_mask=CAUSAL, softmax_lse_flag=True, inner_precise=2
    )
    assert not found[0, :2].any()
    assert bool((lse[0, :, :2] == float("inf")).all())
    close(found[0, 2:], dense.dense_attention(query[0, 2:], key[0], key[0], SCALE, causal=True)[0])


def test_a_sink_takes_its_share() -> None:
    query, key, value = (draw(6, n, SIZE).bfloat16() for n in (HEADS, KV_HEADS, KV_HEADS))
    sink = torch.tensor([0.0, 1.0, 2.0, -30.0]).bfloat16()
    arguments = {
        "atten_mask": CAUSAL.npu(), "input_layout": "TND", "actual_seq_qlen": [6], "actual_seq_kvlen": [6],
        "num_query_heads": HEADS, "num_key_value_heads": KV_HEADS, "softmax_scale": SCALE, "sparse_mode": 3,
        "learnable_sink": sink.npu(),
    }  # fmt: skip
    tensors = [t.npu() for t in (query, key, value)]
    found, _ = torch_npu.npu_fused_infer_attention_score_v2(*tensors, **arguments)
    output, lse = dense.dense_attention(query, key, value, SCALE, causal=True)
    kept = lse.exp() / (lse.exp() + sink.double().exp())
    torch.testing.assert_close(found.cpu().double(), output * kept[..., None], atol=2e-2, rtol=2e-2)
    with pytest.raises(NoSemantics, match="learnable sink"):
        torch_npu.npu_fused_infer_attention_score_v2(*tensors, **arguments, return_softmax_lse=True)


@pytest.mark.parametrize("mode", [0, 1])
def test_codes_in_pages_with_offsets(mode: int) -> None:
    query, lengths = draw(2, HEADS, 1, SIZE), [40, 140]
    codes = [[torch.randint(-127, 128, (n, KV_HEADS, SIZE), dtype=torch.int8) for n in lengths] for _ in range(2)]
    shape = (1, KV_HEADS, 1, SIZE) if mode == 0 else (2, 2 * BLOCK)
    dtype = torch.float16 if mode == 0 else torch.float32
    scales, offsets = [(torch.rand(shape) / 50 + 0.001).to(dtype) for _ in range(2)], [draw(*shape).to(dtype)] * 2
    (key, table), (value, _) = (dense.scattered(rows, BLOCK, 4) for rows in codes)
    found, _ = fused(
        query, key.flatten(2), value.flatten(2), input_layout="BNSD", actual_seq_lengths_kv=lengths, block_table=table,
        block_size=BLOCK, key_antiquant_scale=scales[0], value_antiquant_scale=scales[1],
        key_antiquant_offset=offsets[0], value_antiquant_offset=offsets[1], key_antiquant_mode=mode,
        value_antiquant_mode=mode,
    )  # fmt: skip
    for number, length in enumerate(lengths):
        rows = []
        for kind in (0, 1):
            step, shift = (
                t[0].transpose(0, 1).double() if mode == 0 else t[number, :length, None, None].double()
                for t in (scales[kind], offsets[kind])
            )
            rows.append((codes[kind][number].double() + shift) * step)
        reference = dense.dense_attention(query[number].transpose(0, 1), *rows, SCALE, causal=False)[0]
        torch.testing.assert_close(found[number, :, 0].cpu().double(), reference[0], atol=1e-2, rtol=1e-2)


def test_codes_with_scales_by_token_and_head_in_pages() -> None:
    query, lengths = draw(2, HEADS, 1, SIZE), [40, 140]
    codes = [[torch.randint(-127, 128, (n, KV_HEADS, SIZE), dtype=torch.int8) for n in lengths] for _ in range(2)]
    scales = [[torch.rand(n, KV_HEADS, 1) / 50 + 0.001 for n in lengths] for _ in range(2)]
    (key, table), (value, _) = (dense.scattered(rows, BLOCK, 4) for rows in codes)
    in_pages = [dense.scattered(rows, BLOCK, 4)[0][..., 0].transpose(1, 2).contiguous() for rows in scales]
    found, _ = fused(
        query, key.flatten(2), value.flatten(2), input_layout="BNSD", actual_seq_lengths_kv=lengths, block_table=table,
        block_size=BLOCK, key_antiquant_scale=in_pages[0], value_antiquant_scale=in_pages[1], key_antiquant_mode=5,
        value_antiquant_mode=5,
    )  # fmt: skip
    for number in range(2):
        rows = [codes[kind][number].double() * scales[kind][number].double() for kind in (0, 1)]
        reference = dense.dense_attention(query[number].transpose(0, 1), *rows, SCALE, causal=False)[0]
        torch.testing.assert_close(found[number, :, 0].cpu().double(), reference[0], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("operator", ["fused", "incre"])
def test_scales_of_keys_and_values_stacked(operator: str) -> None:
    query, codes = draw(1, HEADS, 1, SIZE), torch.randint(-127, 128, (2, 1, KV_HEADS, 30, SIZE), dtype=torch.int8)
    scale = (torch.rand(2, KV_HEADS, 1, SIZE) / 50 + 0.001).half()
    if operator == "fused":
        found, _ = fused(query, *codes, input_layout="BNSD", antiquant_scale=scale)
    else:
        found = torch_npu.npu_incre_flash_attention(
            query.npu(), *codes.npu(), antiquant_scale=scale.npu(), antiquant_offset=torch.zeros_like(scale).npu(),
            input_layout="BNSD", num_heads=HEADS, num_key_value_heads=KV_HEADS, scale_value=SCALE,
        )  # fmt: skip
    rows = [(codes[kind, 0].double() * scale[kind].double()).transpose(0, 1) for kind in (0, 1)]
    reference = dense.dense_attention(query[0].transpose(0, 1), *rows, SCALE, causal=False)[0]
    torch.testing.assert_close(found[0, :, 0].cpu().double(), reference[0], atol=1e-2, rtol=1e-2)


def test_absorbed_prefill_over_pages_of_fractals() -> None:
    queries, ropes = [draw(n, HEADS, 512) / 4 for n in QUERIES], [draw(n, HEADS, 64) for n in QUERIES]
    parts = [latent(n) for n in KEYS]
    (keys, table), (key_ropes, _) = (dense.scattered([part[i] for part in parts], BLOCK, 8) for i in (0, 1))
    found, _ = fused(
        torch.cat(queries), nz(keys), nz(keys), query_rope=torch.cat(ropes), key_rope=nz(key_ropes), block_table=table,
        block_size=BLOCK, input_layout="TND", actual_seq_lengths=list(accumulate(QUERIES)), actual_seq_lengths_kv=KEYS,
        num_key_value_heads=1, sparse_mode=3, atten_mask=CAUSAL,
    )  # fmt: skip
    whole = [torch.cat(pair, -1) for pair in zip(queries, ropes, strict=True)]
    reference, _ = expected(whole, [torch.cat(part, -1) for part in parts], [part[0] for part in parts], causal=True)
    close(found, reference)


@pytest.mark.parametrize("version", ["", "_v2"])
def test_given_outputs_and_workspace(version: str) -> None:
    query, key = draw(2, HEADS, 1, SIZE).npu(), draw(2, KV_HEADS, 9, SIZE).npu()
    names = ("num_query_heads", "softmax_scale") if version else ("num_heads", "scale")
    how = {names[0]: HEADS, names[1]: SCALE, "num_key_value_heads": KV_HEADS, "input_layout": "BNSD"}
    operator = getattr(torch_npu, f"npu_fused_infer_attention_score{version}")
    sized = getattr(torch_npu, f"_npu_fused_infer_attention_score{version}_get_max_workspace")
    workspace = sized(query, key, key, **how)
    assert (workspace.dtype, workspace.device.type) == (torch.float16, "npu")
    outputs = [torch.zeros_like(query), torch.zeros(1).npu()]
    operator.out(query, key, key, workspace=workspace, out=outputs, **how)
    assert torch.equal(outputs[0].cpu(), operator(query, key, key, **how)[0].cpu())
    assert outputs[0].any()


def test_a_part_without_keys_has_no_weight() -> None:
    lse = torch.tensor([[0.5, float("inf"), 2.0], [1.0, 3.0, float("inf")]])
    outputs = draw(2, 3, 8).float()
    found, merged = torch_npu.npu_attention_update([*lse.npu()], [*outputs.npu()], 1)
    share = 1 / (1 + torch.tensor(0.5).double().exp())
    reference = torch.stack([outputs[0, 0] * share + outputs[1, 0] * (1 - share), outputs[1, 1], outputs[0, 2]])
    close(found, reference.double())
    close(merged, torch.tensor([float(torch.tensor([0.5, 1.0]).double().exp().sum().log()), 3.0, 2.0]).double())


def test_the_older_operators() -> None:
    query, key, value = draw(2, 6, HEADS, SIZE), draw(2, 6, KV_HEADS, SIZE), draw(2, 6, KV_HEADS, SIZE) - 0.3
    how = {"num_heads": HEADS, "num_key_value_heads": KV_HEADS, "scale_value": SCALE, "input_layout": "BSND"}
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    prompt = torch_npu.npu_prompt_flash_attention(query.npu(), key.npu(), value.npu(), atten_mask=mask.npu(), **how)
    whole = torch_npu.npu_prompt_flash_attention(query.npu(), key.npu(), value.npu(), **how)
    step = torch_npu.npu_incre_flash_attention(
        query[:, :1].contiguous().npu(), key.npu(), value.npu(), actual_seq_lengths=[2, 5], **how
    )
    for number, length in enumerate((2, 5)):
        tensors = query[number], key[number], value[number]
        close(prompt[number], dense.dense_attention(*tensors, SCALE, causal=True)[0])
        close(whole[number], dense.dense_attention(*tensors, SCALE, causal=False)[0])
        rows = (t[number, :length] for t in (key, value))
        close(step[number], dense.dense_attention(query[number, :1], *rows, SCALE, causal=False)[0])


@pytest.mark.parametrize(
    ("argument", "given"),
    [("pse_shift", torch.zeros(1, HEADS, 6, 9).half()), ("quant_scale_out", torch.ones(1)), ("sparse_mode", 9)],
)
def test_what_is_not_modelled_is_refused(argument: str, given: Any) -> None:
    query, key = draw(1, 6, HEADS, SIZE).npu(), draw(1, 9, KV_HEADS, SIZE).npu()
    ropes = {"query_rope": draw(1, 6, HEADS, 64).npu(), "key_rope": draw(1, 9, KV_HEADS, 64).npu()}
    mask = {"atten_mask": torch.zeros(1, 6, 6, dtype=torch.bool).npu(), **ropes} if argument == "sparse_mode" else {}
    with pytest.raises(NoSemantics, match=argument):
        torch_npu.npu_fused_infer_attention_score_v2(
            query, key, key, input_layout="BSND", num_query_heads=HEADS, num_key_value_heads=KV_HEADS,
            **{argument: given.npu() if isinstance(given, torch.Tensor) else given}, **mask,
        )  # fmt: skip
