"""The dense core of attention, and the layouts, masks and caches that are brought to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from npu_zoo.simulator.errors import NoSemantics
from npu_zoo.simulator.operators.cache import paged_rows

UNBOUNDED = 2147483647
COMPRESSED = (2, 3, 4)
"""Sparse modes whose mask is one triangle for every length."""

PER_CHANNEL, PER_TOKEN, PER_TOKEN_AND_HEAD_IN_PAGES = 0, 1, 5
_PAGED_MODES = (PER_CHANNEL, PER_TOKEN, PER_TOKEN_AND_HEAD_IN_PAGES)
Lengths = Sequence[int]
Optional = torch.Tensor | None
Result = tuple[torch.Tensor, Optional]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    hidden: Optional,
    sink: Optional = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence in float32.

    Args:
        query: [Sq, N, D].
        key: [Sk, Nk, D]; each of its heads serves N / Nk of the query's.
        value: [Sk, Nk, Dv].
        scale: of the scores.
        hidden: [Sq, Sk]; of bool, True where a key is hidden; of floats, what is added to the scores.
        sink: [N]; a score that takes its share of the softmax and has no value.

    Returns:
        The output [Sq, N, Dv], zero where every key is hidden, and the log-sum-exp of the scores [Sq, N].
    """
    groups = query.shape[1] // key.shape[1]
    keys, values = (t.float().repeat_interleave(groups, 1).transpose(0, 1) for t in (key, value))
    scores = query.float().transpose(0, 1) @ keys.transpose(1, 2) * scale  # [N, Sq, Sk]
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf")) if hidden.dtype is torch.bool else scores + hidden.float()
    if sink is not None:
        scores = torch.cat([scores, sink.float()[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    lse = scores.logsumexp(-1)
    shares = scores.softmax(-1).nan_to_num()[..., : key.shape[0]]
    return (shares @ values).transpose(0, 1), torch.where(lse == float("-inf"), float("inf"), lse).t()


def by_distance(mask: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """What a compressed mask [rows, columns] holds for keys that lie ``distance`` behind (negative: before) a query."""
    ahead, behind = mask[0], mask[:, 0]
    ahead_of = ahead[distance.clamp(0, len(ahead) - 1)]
    return torch.where(distance > 0, ahead_of, behind[(-distance).clamp(0, len(behind) - 1)])


def distances(num_queries: int, num_keys: int, offset: int) -> torch.Tensor:
    """How far each key [Sq, Sk] lies behind its query, the first query standing at the key ``offset``."""
    return torch.arange(num_keys)[None] - torch.arange(num_queries)[:, None] - offset


def hidden_keys(
    num_queries: int, num_keys: int, mode: int, mask: Optional, pre_tokens: int, next_tokens: int
) -> Optional:
    """Which keys [Sq, Sk] a sparse mode hides.

    0 and 1 take the mask as it is (0 also the two bounds, counted from the upper left corner); 2 and 3 are causal from
    the upper left and the lower right corner, 4 is a band from the lower right one: these read a compressed mask.
    """
    if mode not in range(5) or (mode > 1 and mask is None):
        given = "a mask" if mask is not None else "no mask"
        raise NoSemantics(f"fused attention: argument sparse_mode={mode} with {given} has no golden semantics")
    if mask is None:  # the bounds are ignored without a mask
        return None
    distance = distances(num_queries, num_keys, num_keys - num_queries if mode in (3, 4) else 0)
    if mode in (2, 3):
        return by_distance(mask, distance).bool()
    if mode == 4:
        return by_distance(mask, distance - next_tokens).bool() | (distance < -pre_tokens)
    hidden = mask[:num_queries, :num_keys].bool()
    return hidden | (distance < -pre_tokens) | (distance > next_tokens) if mode == 0 else hidden


@dataclass
class Request:
    """One call of fused attention in one vocabulary for both versions of the operator.

    Attributes:
        query, key, value: in the layout; keys and values also as a cache of blocks.
        layout: such as ``BSH`` or ``BNSD_NBSD``, the second the output's.
        num_heads, num_key_value_heads: N and Nk, Nk being N where it is 0.
        query_lengths, key_lengths: as the operator takes them.
        key_scale, key_offset, value_scale, value_offset: of int8 keys and values.
        key_mode, value_mode: 0 where the scales are per channel, 1 per token, 5 per token and head in blocks.
        sink: [N].
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
    sink: Optional = None

    @property
    def packed(self) -> bool:
        """Whether sequences lie behind each other instead of in a padded batch."""
        return self.layout.startswith(("TND", "NTD"))

    @property
    def kv_heads(self) -> int:
        """Nk."""
        return self.num_key_value_heads or self.num_heads

    @property
    def decode(self) -> bool:
        """Whether there is one query a sequence, so that its length and the sparse mode are ignored."""
        return not self.packed and self.query_rope is None and _query_length(self) == 1


def fused_attention(request: Request) -> Result:
    """Attention of all sequences of a call, in the output's layout; without log-sum-exp where it is not asked for."""
    if request.sink is not None and request.with_lse:
        raise NoSemantics("fused attention: the log-sum-exp with a learnable sink has no golden semantics")
    outputs, lses = [], []
    for number, query in enumerate(_queries(request)):
        key, value = _keys_and_values(request, number)
        mask = _mask_of(request, number)
        mode = 1 if request.decode else request.sparse_mode
        hidden = hidden_keys(query.shape[0], key.shape[0], mode, mask, request.pre_tokens, request.next_tokens)
        output, lse = attend(query, key, value, request.scale, hidden, request.sink)
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
    if not lengths or request.decode:
        return list(query)
    return [rows[:length] for rows, length in zip(query, _per_sequence(lengths, len(query)), strict=True)]


def _cut(rows: torch.Tensor, ends: list[int]) -> list[torch.Tensor]:
    return [rows[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _per_sequence(lengths: Lengths, batch: int) -> list[int]:
    return list(lengths) * batch if len(lengths) == 1 else list(lengths[:batch])


def _keys_and_values(request: Request, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = _rows(request, request.key, number), _rows(request, request.value, number)
    key = _restored(request, key, request.key_scale, request.key_offset, request.key_mode, number)
    value = _restored(request, value, request.value_scale, request.value_offset, request.value_mode, number)
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


def _restored(
    request: Request, codes: torch.Tensor, scale: Optional, offset: Optional, mode: int, number: int
) -> torch.Tensor:
    if scale is None and codes.is_floating_point():
        return codes
    modes = (PER_CHANNEL, PER_TOKEN) if request.block_table is None else _PAGED_MODES
    if scale is None or codes.dtype is not torch.int8 or mode not in modes:
        scales = "no scales" if scale is None else f"scales of mode {mode}"
        raise NoSemantics(f"fused attention: keys or values of {codes.dtype} with {scales} have no golden semantics")

    def spread(values: torch.Tensor) -> torch.Tensor:
        if mode == PER_CHANNEL:
            return values.float().reshape(-1, *codes.shape[1:]) if values.numel() > 1 else values.float()
        if mode == PER_TOKEN_AND_HEAD_IN_PAGES:  # [blocks, Nk, block_size], as a cache of one element a head
            return _rows(request, values.float()[..., None], number)
        return values.float().reshape(-1, values.shape[-1])[number, : codes.shape[0], None, None]

    wide = codes.float() if offset is None else codes.float() + spread(offset)
    return wide * spread(scale)


def _mask_of(request: Request, number: int) -> Optional:
    mask = request.mask
    if mask is None or (request.decode and request.sparse_mode in COMPRESSED):
        return None
    if mask.dim() < 3:
        return mask[number : number + 1] if request.decode and mask.dim() == 2 and len(mask) > 1 else mask
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
        return (whole if target == "TND" else whole.transpose(0, 1)).to(request.query.dtype)
    length = _query_length(request)
    batch = torch.zeros(len(outputs), length, *outputs[0].shape[1:])
    for number, output in enumerate(outputs):
        batch[number, : output.shape[0]] = output
    orders = {"BSND": (0, 1, 2, 3), "BNSD": (0, 2, 1, 3), "NBSD": (2, 0, 1, 3)}
    ordered = batch.flatten(2) if target == "BSH" else batch.permute(orders[target])
    return ordered.to(request.query.dtype)


def _assembled_lse(request: Request, lses: list[torch.Tensor]) -> torch.Tensor:
    if request.packed:
        return torch.cat(lses)[..., None]  # [T, N, 1]
    length = _query_length(request)
    batch = torch.full((len(lses), request.num_heads, length, 1), float("inf"))
    for number, lse in enumerate(lses):
        batch[number, :, : lse.shape[0], 0] = lse.t()
    return batch
