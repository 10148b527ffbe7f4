from __future__ import annotations

import importlib.util
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu

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


def test_the_older_operators() -> None:
    query, key = draw(2, HEADS, 9, SIZE), draw(2, KV_HEADS, 9, SIZE)
    found = torch_npu.npu_prompt_flash_attention(
        query.npu(), key.npu(), key.npu(), atten_mask=CAUSAL.npu(), num_heads=HEADS, num_key_value_heads=KV_HEADS,
        scale_value=SCALE, input_layout="BNSD", sparse_mode=2,
    )  # fmt: skip
    last = torch_npu.npu_incre_flash_attention(
        query[:, :, -1:].contiguous().npu(), key.npu(), key.npu(), num_heads=HEADS, num_key_value_heads=KV_HEADS,
        scale_value=SCALE, input_layout="BNSD",
    )  # fmt: skip
    for number in range(2):
        rows = [t[number].transpose(0, 1) for t in (query, key, key)]
        reference = dense.dense_attention(*rows, SCALE, causal=True)[0].transpose(0, 1)
        close(found[number], reference)
        close(last[number], reference[:, -1:])


@pytest.mark.parametrize("version", [1, 2])
def test_a_workspace_and_outputs_given_ahead(version: int) -> None:
    query, key = draw(3, HEADS, SIZE), draw(3, KV_HEADS, SIZE)
    name = "npu_fused_infer_attention_score" + ("" if version == 1 else "_v2")
    heads, scale, lengths = ("num_heads", "scale", "actual_seq_lengths") if version == 1 else (
        "num_query_heads", "softmax_scale", "actual_seq_qlen"
    )  # fmt: skip
    arguments = {
        heads: HEADS, scale: SCALE, lengths: [3], "input_layout": "TND", "num_key_value_heads": KV_HEADS,
        "sparse_mode": 3, "atten_mask": CAUSAL.npu(),
        "actual_seq_lengths_kv" if version == 1 else "actual_seq_kvlen": [3],
    }  # fmt: skip
    tensors = [query.npu(), key.npu(), key.npu()]
    workspace = getattr(torch_npu, f"_{name}_get_max_workspace")(*tensors, **arguments)
    out, lse = torch.empty(3, HEADS, SIZE).half().npu(), torch.empty(1).npu()
    getattr(torch_npu, name).out(*tensors, **arguments, workspace=workspace, out=[out, lse])
    close(out, dense.dense_attention(query, key, key, SCALE, causal=True)[0])
