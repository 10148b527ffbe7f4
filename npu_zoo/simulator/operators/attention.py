"""Attention: one dense core, and the layouts, masks and caches that the fused operators bring to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from npu_zoo.simulator.errors import NoSemantics
from npu_zoo.simulator.golden import golden
from npu_zoo.simulator.operators.cache import paged_rows

UNBOUNDED = 2147483647
PER_CHANNEL, PER_TOKEN = 0, 1
Lengths = Sequence[int]
Optional = torch.Tensor | None
Result = tuple[torch.Tensor, Optional]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, hidden: Optional
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence in float32.

    Args:
        query: [Sq, N, D].
        key: [Sk, Nk, D]; each of its heads serves N / Nk of the query's.
        value: [Sk, Nk, Dv].
        scale: of the scores.
        hidden: [Sq, Sk]; of bool, True where a key is hidden; of floats, what is added to the scores.

    Returns:
        The output [Sq, N, Dv], zero where every key is hidden, and the log-sum-exp of the scores [Sq, N].
    """
    groups = query.shape[1] // key.shape[1]
    keys, values = (t.float().repeat_interleave(groups, 1).transpose(0, 1) for t in (key, value))
    scores = query.float().transpose(0, 1) @ keys.transpose(1, 2) * scale  # [N, Sq, Sk]
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf")) if hidden.dtype is torch.bool else scores + hidden.float()
    lse = scores.logsumexp(-1)
    output = (scores.softmax(-1).nan_to_num() @ values).transpose(0, 1)
    return output, torch.where(lse == float("-inf"), float("inf"), lse).t()


def hidden_keys(
    num_queries: int, num_keys: int, mode: int, mask: Optional, pre_tokens: int, next_tokens: int
) -> Optional:
    """Which keys [Sq, Sk] a sparse mode hides.

    0 and 1 take the mask as it is (0 also the two bounds, counted from the upper left corner); 2 and 3 are causal from
    the upper left and the lower right corner, 4 is a band from the lower right one.
    """
    offset = num_keys - num_queries if mode in (3, 4) else 0
    distance = torch.arange(num_keys)[None] - torch.arange(num_queries)[:, None] - offset
    if mode in (2, 3):
        return distance > 0
    hidden = (distance < -pre_tokens) | (distance > next_tokens) if mode in (0, 4) else torch.zeros_like(distance) > 0
    if mask is not None and mode in (0, 1):
        hidden = hidden | mask[:num_queries, :num_keys].bool()
    return hidden if bool(hidden.any()) else None


@dataclass
class Request:
    """One call of fused attention in one vocabulary for both versions of the operator.

    Attributes:
        query, key, value: in the layout; keys and values also as a cache of blocks.
        layout: such as ``BSH`` or ``BNSD_NBSD``, the second the output's.
        num_heads, num_key_value_heads: N and Nk, Nk being N where it is 0.
        query_lengths, key_lengths: as the operator takes them.
        key_scale, key_offset, value_scale, value_offset: of int8 keys and values.
        key_mode, value_mode: 0 where the scales are per channel, 1 per token.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layout: str
    num_heads: int
    num_key_value_heads: int
    scale: float
    sparse_mode: int
    mask: Optional
    pre_tokens: int
    next_tokens: int
    block_table: Optional
    query_lengths: Lengths | None
    key_lengths: Lengths | None
    query_rope: Optional = None
    key_rope: Optional = None
    key_scale: Optional = None
    key_offset: Optional = None
    value_scale: Optional = None
    value_offset: Optional = None
    key_mode: int = 0
    value_mode: int = 0
    with_lse: bool = False

    @property
    def packed(self) -> bool:
        """Whether sequences lie behind each other instead of in a padded batch."""
        return self.layout.startswith(("TND", "NTD"))

    @property
    def kv_heads(self) -> int:
        """Nk."""
        return self.num_key_value_heads or self.num_heads


def fused_attention(request: Request) -> Result:
    """Attention of all sequences of a call, in the output's layout; without log-sum-exp where it is not asked for."""
    queries = _queries(request)
    outputs, lses = [], []
    for number, query in enumerate(queries):
        key, value = _keys_and_values(request, number)
        decode = not request.packed and query.shape[0] == 1 and request.query_rope is None
        mode = 0 if decode else request.sparse_mode
        mask = _mask_of(request, number)
        hidden = hidden_keys(query.shape[0], key.shape[0], mode, mask, request.pre_tokens, request.next_tokens)
        output, lse = attend(query, key, value, request.scale, hidden)
        outputs.append(output)
        lses.append(lse)
    return _assembled(request, outputs), _assembled_lse(request, lses) if request.with_lse else None


def _heads_last(tensor: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    """[B, S, N, D], or [T, N, D] of packed layouts."""
    if layout == "BSH":
        return tensor.reshape(*tensor.shape[:-1], heads, -1)
    if layout in ("BNSD", "NTD"):
        return tensor.transpose(-3, -2)
    if layout in ("BSND", "TND"):
        return tensor
    raise NoSemantics(f"fused attention: input_layout='{layout}' has no golden semantics")


def _queries(request: Request) -> list[torch.Tensor]:
    layout = request.layout.split("_")[0]
    query = _heads_last(request.query, layout, request.num_heads)
    if request.query_rope is not None:
        query = torch.cat([query, _heads_last(request.query_rope, layout, request.num_heads)], -1)
    lengths = request.query_lengths
    if request.packed:
        return _cut(query, list(lengths or [query.shape[0]]))
    if not lengths or (query.shape[1] == 1 and request.query_rope is None):
        return list(query)
    return [rows[:length] for rows, length in zip(query, _per_sequence(lengths, len(query)), strict=True)]


def _cut(rows: torch.Tensor, ends: list[int]) -> list[torch.Tensor]:
    return [rows[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _per_sequence(lengths: Lengths, batch: int) -> list[int]:
    return list(lengths) * batch if len(lengths) == 1 else list(lengths)


def _keys_and_values(request: Request, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = _rows(request, request.key, number), _rows(request, request.value, number)
    key = _restored(key, request.key_scale, request.key_offset, request.key_mode, number)
    value = _restored(value, request.value_scale, request.value_offset, request.value_mode, number)
    if request.key_rope is not None:
        key = torch.cat([key, _rows(request, request.key_rope, number)], -1)
    return key, value


def _rows(request: Request, tensor: torch.Tensor, number: int) -> torch.Tensor:
    """Keys or values [Sk, Nk, D] of one sequence."""
    lengths = request.key_lengths
    if request.block_table is not None:
        length = _per_sequence(lengths or [], len(request.block_table))[number]
        return paged_rows(tensor, request.block_table[number], length, request.kv_heads)
    rows = _heads_last(tensor, request.layout.split("_")[0], request.kv_heads)
    if request.packed:
        return _cut(rows, list(lengths or [rows.shape[0]]))[number]
    return rows[number] if not lengths else rows[number, : _per_sequence(lengths, len(rows))[number]]


def _restored(codes: torch.Tensor, scale: Optional, offset: Optional, mode: int, number: int) -> torch.Tensor:
    if scale is None:
        return codes
    if mode not in (PER_CHANNEL, PER_TOKEN):
        raise NoSemantics(f"fused attention: quantised keys of mode {mode} have no golden semantics")

    def spread(values: torch.Tensor) -> torch.Tensor:
        if mode == PER_CHANNEL:
            return values.float().reshape(-1, *codes.shape[1:]) if values.numel() > 1 else values.float()
        return values.float().reshape(-1, values.shape[-1])[number, : codes.shape[0], None, None]

    wide = codes.float() if offset is None else codes.float() + spread(offset)
    return wide * spread(scale)


def _mask_of(request: Request, number: int) -> Optional:
    mask = request.mask
    if mask is None or mask.dim() == 1:
        return mask
    if mask.dim() == 2:
        per_sequence = not request.packed and _query_length(request) == 1 and len(mask) > 1
        return mask[number : number + 1] if per_sequence else mask
    while mask.dim() > 3:
        mask = mask[:, 0]
    return mask[number % len(mask)]


def _query_length(request: Request) -> int:
    return _heads_last(request.query, request.layout.split("_")[0], request.num_heads).shape[1]


def _assembled(request: Request, outputs: list[torch.Tensor]) -> torch.Tensor:
    source, _, target = request.layout.partition("_")
    target = target or source
    if request.packed:
        whole = torch.cat(outputs)  # [T, N, D]
        return (whole if target == "TND" else whole.transpose(0, 1)).to(_output_dtype(request))
    length = _query_length(request)
    batch = torch.zeros(len(outputs), length, *outputs[0].shape[1:])
    for number, output in enumerate(outputs):
        batch[number, : output.shape[0]] = output
    orders = {"BSND": (0, 1, 2, 3), "BNSD": (0, 2, 1, 3), "NBSD": (2, 0, 1, 3)}
    ordered = batch.flatten(2) if target == "BSH" else batch.permute(orders[target])
    return ordered.to(_output_dtype(request))


def _output_dtype(request: Request) -> torch.dtype:
    return request.query.dtype


def _assembled_lse(request: Request, lses: list[torch.Tensor]) -> torch.Tensor:
    if request.packed:
        return torch.cat(lses)[..., None]  # [T, N, 1]
    length = _query_length(request)
    batch = torch.full((len(lses), request.num_heads, length, 1), float("inf"))
    for number, lse in enumerate(lses):
        batch[number, :, : lse.shape[0], 0] = lse.t()
    return batch


_IGNORED = {"inner_precise", "block_size", "workspace", "out", "antiquant_mode"}


def _refuse(operator: str, arguments: dict[str, object]) -> None:
    meant = {name: value for name, value in arguments.items() if name not in _IGNORED and value is not None}
    given = sorted(name for name, value in meant.items() if not isinstance(value, int) or value)
    if given:
        raise NoSemantics(f"{operator}: arguments {', '.join(given)} have no golden semantics")


@golden("npu::npu_fused_infer_attention_score", "npu::npu_fused_infer_attention_score.out")
def npu_fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    atten_mask: Optional = None,
    actual_seq_lengths: Lengths | None = None,
    actual_seq_lengths_kv: Lengths | None = None,
    antiquant_scale: Optional = None,
    antiquant_offset: Optional = None,
    key_antiquant_scale: Optional = None,
    key_antiquant_offset: Optional = None,
    value_antiquant_scale: Optional = None,
    value_antiquant_offset: Optional = None,
    block_table: Optional = None,
    query_rope: Optional = None,
    key_rope: Optional = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = UNBOUNDED,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    antiquant_mode: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
    **unsupported: object,
) -> Result:
    """Source: op-plugin, torch_npu-npu_fused_infer_attention_score.md."""
    _refuse("npu_fused_infer_attention_score", unsupported)
    if antiquant_scale is not None:  # the older form: keys and values stacked
        key_antiquant_scale, value_antiquant_scale = antiquant_scale
        key_antiquant_mode = value_antiquant_mode = antiquant_mode
        if antiquant_offset is not None:
            key_antiquant_offset, value_antiquant_offset = antiquant_offset
    return fused_attention(
        Request(
            query, key, value, input_layout, num_heads, num_key_value_heads, scale, sparse_mode, atten_mask, pre_tokens,
            next_tokens, block_table, actual_seq_lengths, actual_seq_lengths_kv, query_rope, key_rope,
            key_antiquant_scale, key_antiquant_offset, value_antiquant_scale, value_antiquant_offset,
            key_antiquant_mode, value_antiquant_mode, softmax_lse_flag,
        )
    )  # fmt: skip


@golden("npu::npu_fused_infer_attention_score_v2", "npu::npu_fused_infer_attention_score_v2.out")
def npu_fused_infer_attention_score_v2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_rope: Optional = None,
    key_rope: Optional = None,
    atten_mask: Optional = None,
    actual_seq_qlen: Lengths | None = None,
    actual_seq_kvlen: Lengths | None = None,
    block_table: Optional = None,
    dequant_scale_key: Optional = None,
    dequant_offset_key: Optional = None,
    dequant_scale_value: Optional = None,
    dequant_offset_value: Optional = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = UNBOUNDED,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    key_quant_mode: int = 0,
    value_quant_mode: int = 0,
    return_softmax_lse: bool = False,
    **unsupported: object,
) -> Result:
    """Source: op-plugin, torch_npu-npu_fused_infer_attention_score_v2.md."""
    _refuse("npu_fused_infer_attention_score_v2", unsupported)
    return fused_attention(
        Request(
            query, key, value, input_layout, num_query_heads, num_key_value_heads, softmax_scale, sparse_mode,
            atten_mask, pre_tokens, next_tokens, block_table, actual_seq_qlen, actual_seq_kvlen, query_rope, key_rope,
            dequant_scale_key, dequant_offset_key, dequant_scale_value, dequant_offset_value, key_quant_mode,
            value_quant_mode, return_softmax_lse,
        )
    )  # fmt: skip


@golden("npu::npu_attention_update")
def npu_attention_update(
    lse: Sequence[torch.Tensor], local_out: Sequence[torch.Tensor], update_type: int
) -> tuple[torch.Tensor, Optional]:
    """Outputs [T, D] of parts of the keys merged by their log-sum-exp [T]; the merged one too where update_type is 1.

    Source: op-plugin, torch_npu-npu_attention_update.md.
    """
    parts = torch.stack([part.float().reshape(-1) for part in lse])
    merged = parts.masked_fill(parts == float("inf"), float("-inf")).logsumexp(0)
    weights = (parts - merged).exp().nan_to_num(posinf=0.0)[..., None]
    total = sum(part.float() * weight for part, weight in zip(local_out, weights, strict=True))
    assert isinstance(total, torch.Tensor)
    return total.to(local_out[0].dtype), merged if update_type == 1 else None


@golden("npu::npu_incre_flash_attention")
def npu_incre_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    atten_mask: Optional = None,
    actual_seq_lengths: Lengths | None = None,
    block_table: Optional = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    **unsupported: object,
) -> torch.Tensor:
    """One query a sequence. Source: op-plugin, （beta）torch_npu-npu_incre_flash_attention.md."""
    _refuse("npu_incre_flash_attention", unsupported)
    request = Request(
        query, key, value, input_layout, num_heads, num_key_value_heads, scale_value, 0, atten_mask, UNBOUNDED,
        UNBOUNDED, block_table, None, actual_seq_lengths,
    )  # fmt: skip
    return fused_attention(request)[0]


@golden("npu::npu_prompt_flash_attention")
def npu_prompt_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    atten_mask: Optional = None,
    actual_seq_lengths: Lengths | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = 0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    actual_seq_lengths_kv: Lengths | None = None,
    sparse_mode: int = 0,
    **unsupported: object,
) -> torch.Tensor:
    """Whole prompts. Source: op-plugin, （beta）torch_npu-npu_prompt_flash_attention.md."""
    _refuse("npu_prompt_flash_attention", unsupported)
    request = Request(
        query, key, value, input_layout, num_heads, num_key_value_heads, scale_value, sparse_mode, atten_mask,
        pre_tokens, next_tokens, None, actual_seq_lengths, actual_seq_lengths_kv or actual_seq_lengths,
    )  # fmt: skip
    return fused_attention(request)[0]
