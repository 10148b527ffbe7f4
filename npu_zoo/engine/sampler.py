"""Chooses the next tokens from logits.

Every draw depends on the request's seed, the completion's number and the position alone: the same request gives the
same text alone, in any batch, and after preemption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine.guidance import Guide
from npu_zoo.engine.host_rows import argmax, draw, largest, rank, row_parts
from npu_zoo.engine.penalties import SeenTokens, has_penalties
from npu_zoo.nn.kernels import reference
from npu_zoo.nn.kernels.table import TopKTopP


class SamplingState(Protocol):
    """Whose next token is drawn: a :class:`~npu_zoo.engine.sequence.Sequence`, or one as it would be with drafts."""

    @property
    def params(self) -> SamplingParams:
        """What was asked for."""

    @property
    def seed(self) -> int:
        """Of its draws."""

    @property
    def index(self) -> int:
        """Number of the completion."""

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far."""

    def seen_tokens(self, vocab_size: int, device: torch.device) -> SeenTokens:
        """What penalties are made of, for logits of a size and on a device."""

    @property
    def guided(self) -> bool:
        """Whether the next token has to keep a form."""

    @property
    def guide(self) -> Guide | None:
        """What knows the form."""


@dataclass(frozen=True)
class SampledTokens:
    """One step's tokens, and what was asked of their probabilities.

    Attributes:
        token_ids: one per sequence.
        logprobs: of the chosen token and the ``k`` most likely ones, per sequence that asked: pairs of id and
            natural-log probability before penalties and temperature, the chosen one first, and the chosen one's rank.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


@dataclass(frozen=True)
class TokenLogprobs:
    """A position's chosen token with its rank (1 is the most likely), and the most likely tokens in order."""

    chosen: tuple[int, float, int]
    top: list[tuple[int, float]]


class Sampler:
    """Draws one token per row of logits.

    Args:
        top_k_top_p: the kernel that cuts what is not drawn from.
    """

    def __init__(self, top_k_top_p: TopKTopP = reference.top_k_top_p) -> None:
        self._top_k_top_p = top_k_top_p

    def sample(self, logits: Tensor, sequences: Rows[SamplingState], stop_ids: Rows[tuple[int, ...]]) -> SampledTokens:
        """Draw.

        Args:
            logits: [N, vocab_size], of the N sequences' last tokens; left as they are.
            sequences: whose output counts for penalties and positions.
            stop_ids: per sequence, the ids held back until ``min_tokens`` is reached.
        """
        shaped = self._shape(logits, sequences, stop_ids)
        token_ids = self._choose(shaped, sequences)
        return SampledTokens(token_ids, _logprobs(logits, token_ids, sequences))

    def _choose(self, logits: Tensor, sequences: Rows[SamplingState]) -> list[int]:
        drawn = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy]
        if not drawn:
            return _best(logits)
        rows = torch.tensor(drawn, device=logits.device)
        chosen = [0] * len(sequences) if len(drawn) == len(sequences) else _best(logits)
        # On a CPU a few rows at a time: what they are sorted and summed in stays in the cache.
        parts = row_parts(len(drawn), logits.shape[1]) if logits.device.type == "cpu" else [slice(0, len(drawn))]
        for part in parts:
            own = [sequences[row] for row in drawn[part]]
            picked = _draw(logits.index_select(0, rows[part]).float(), own, self._top_k_top_p)
            for row, token_id in zip(drawn[part], picked, strict=True):
                chosen[row] = token_id
        return chosen

    def _shape(self, logits: Tensor, sequences: Rows[SamplingState], stop_ids: Rows[tuple[int, ...]]) -> Tensor:
        """Logits after penalties and biases, what must not be drawn at minus infinity; copied where they change."""
        due = [h if s.num_output_tokens < s.params.min_tokens else () for h, s in zip(stop_ids, sequences, strict=True)]
        changes = [
            (row, sequence, held)
            for row, (sequence, held) in enumerate(zip(sequences, due, strict=True))
            if held or sequence.guided or has_penalties(sequence.params) or sequence.params.logit_bias
        ]
        if not changes:
            return logits
        shaped = logits.to(torch.float32, copy=True)
        for row, sequence, held in changes:
            if has_penalties(sequence.params):
                sequence.seen_tokens(shaped.shape[1], shaped.device).penalise(shaped[row], sequence.params)
            if sequence.params.logit_bias:
                _add_bias(shaped[row], sequence.params.logit_bias)
            held_back = [i for i in held if i < shaped.shape[1]]
            if sequence.guided and sequence.guide is not None:
                _keep_form(shaped[row], sequence.guide, held_back)
            else:
                shaped[row, held_back] = float("-inf")
        return shaped


def _best(logits: Tensor) -> list[int]:
    return argmax(logits) if logits.device.type == "cpu" else logits.argmax(-1).tolist()


def _add_bias(row: Tensor, bias: Mapping[int, float]) -> None:
    """Add a request's biases to its [vocab_size] logits, in place; ids beyond them say nothing."""
    known = {token_id: value for token_id, value in bias.items() if token_id < row.shape[0]}
    ids = torch.tensor(list(known), dtype=torch.long, device=row.device)
    row[ids] += torch.tensor(list(known.values()), dtype=row.dtype, device=row.device)


def _keep_form(row: Tensor, guide: Guide, held_back: list[int]) -> None:
    """Leave of [vocab_size] logits what the form allows and is not held back, in place.

    Where the form allows nothing else, such as the end of a text that cannot go on, it goes first.
    """
    bits = torch.frombuffer(bytearray(guide.mask()), dtype=torch.uint8)
    allowed = (bits.unsqueeze(1) >> torch.arange(8)).bitwise_and(1).view(-1)[: row.shape[0]].bool()
    free = allowed.clone()
    free[held_back] = False
    chosen = free if free.any() else allowed
    row.masked_fill_(~chosen.to(row.device), float("-inf"))


def _draw(logits: Tensor, sequences: list[SamplingState], top_k_top_p: TopKTopP) -> list[int]:
    """One id per row of [N, vocab_size] float32 logits, by inverting the cumulative distribution."""
    params = [sequence.params for sequence in sequences]
    temperatures = torch.tensor([p.temperature for p in params], device=logits.device)
    logits = _truncate(logits / temperatures.unsqueeze(1).clamp_min(1e-5), params, top_k_top_p)
    shares = [_uniform(sequence) for sequence in sequences]
    if logits.device.type == "cpu":
        return [draw(row, share) for row, share in zip(logits.numpy(), shares, strict=True)]
    cumulative = torch.softmax(logits, -1, dtype=torch.float64).cumsum(-1)
    draws = torch.tensor(shares, dtype=torch.float64, device=logits.device)
    # Scaling by the last sum keeps a draw near 1 inside the range whatever was rounded.
    targets = draws.unsqueeze(1) * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
    return picked.clamp_max(logits.shape[1] - 1).tolist()


def _truncate(logits: Tensor, params: list[SamplingParams], top_k_top_p: TopKTopP) -> Tensor:
    """min_p, then top_k, then top_p, in the order of vLLM; what is cut is at minus infinity."""
    if any(p.min_p > 0 for p in params):
        logprobs = torch.log_softmax(logits, -1)
        floor = torch.tensor([p.min_p for p in params], device=logits.device).log().unsqueeze(1)
        logits = logits.masked_fill(logprobs < logprobs.amax(-1, keepdim=True) + floor, float("-inf"))
    size = logits.shape[1]
    if not any(0 < p.top_k < size or p.top_p < 1.0 for p in params):
        return logits
    return top_k_top_p(logits, [p.top_k if 0 < p.top_k < size else 0 for p in params], [p.top_p for p in params])


def _uniform(sequence: SamplingState) -> float:
    """A number in [0, 1) from seed, completion and position."""
    key = f"{sequence.seed}/{sequence.index}/{sequence.num_output_tokens}".encode()
    # 53 bits are what a float holds: with more, the largest would round to 1 and lie outside every token's share.
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11) / 2.0**53


def _logprobs(logits: Tensor, token_ids: list[int], sequences: Rows[SamplingState]) -> list[TokenLogprobs | None]:
    found: list[TokenLogprobs | None] = [None] * len(token_ids)
    rows = [row for row, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
    if rows:
        wanted = [int(sequences[row].params.logprobs or 0) for row in rows]
        chosen = [token_ids[row] for row in rows]
        picked = top_logprobs(logits[torch.tensor(rows, device=logits.device)], chosen, wanted)
        for row, entry in zip(rows, picked, strict=True):
            found[row] = entry
    return found


def top_logprobs(logits: Tensor, chosen: list[int], wanted: list[int]) -> list[TokenLogprobs]:
    """Natural-log probabilities of chosen tokens and of the most likely ones.

    Args:
        logits: [N, vocab_size].
        chosen: N ids.
        wanted: how many of the most likely to give, per row.
    """
    if logits.device.type == "cpu":
        return [_row_logprobs(row, token, count) for row, token, count in zip(logits, chosen, wanted, strict=True)]
    logprobs = torch.log_softmax(logits.float(), -1)
    ids = torch.tensor(chosen, device=logits.device).unsqueeze(1)
    own = logprobs.gather(1, ids)
    ranks = (logprobs > own).sum(-1) + 1
    values, indices = logprobs.topk(min(max(wanted), logits.shape[1]), -1)
    columns = zip(
        chosen, own.squeeze(1).tolist(), ranks.tolist(), indices.tolist(), values.tolist(), wanted, strict=True
    )
    return [
        TokenLogprobs((token, logprob, rank), list(zip(top_ids, top_values, strict=True))[:count])
        for token, logprob, rank, top_ids, top_values, count in columns
    ]


def _row_logprobs(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """As :func:`top_logprobs`, of one row in a CPU's memory."""
    row = torch.log_softmax(logits.float(), -1).numpy()
    top = largest(row, min(count, len(row)))
    return TokenLogprobs((token, float(row[token]), rank(row, token)), [(place, float(row[place])) for place in top])
