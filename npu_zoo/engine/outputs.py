"""A step's results on their way from the ranks that compute them to the first, which samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from npu_zoo.core.parallel import Place, Ranks
from npu_zoo.engine.step import StepRow

Outputs = tuple[Tensor | None, list[Tensor]]
"""[N, vocab_size] logits of the tokens that are sampled from, None where there are none; and prompts' hidden states."""

NO_OUTPUTS: Outputs = (None, [])


@dataclass(frozen=True)
class ResultShape:
    """What results are made of.

    Attributes:
        vocab_size, hidden_size: of logits and of hidden states.
        dtype: of both.
    """

    vocab_size: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device


def collect_outputs(
    ranks: Ranks, rows: Sequence[StepRow], outputs: Outputs, shape: ResultShape
) -> tuple[Tensor, list[Tensor]]:
    """Bring all replicas' results to the first rank, in the order of the rows; every rank calls it.

    Args:
        rows: the whole step's.
        outputs: of this rank's replica where it is on the last stage.
    """
    place = ranks.place
    own = [row for row in rows if row.replica == place.replica]
    if place.rank and place.is_last_stage and place.tp_rank == 0:
        _send(ranks, outputs)
    if place.rank:
        return _packed(outputs, shape)
    found: list[tuple[list[StepRow], Outputs]] = []
    for replica in range(place.split.dp):
        theirs = own if replica == place.replica else [row for row in rows if row.replica == replica]
        source = last_stage_rank(place, replica)
        found.append((theirs, outputs if source == 0 else _receive(ranks, source, theirs, shape)))
    return _in_order(rows, found, shape)


def last_stage_rank(place: Place, replica: int) -> int:
    """The rank that a replica's results come from."""
    split = place.split
    return (split.pp - 1) * split.stage_size + replica * split.tp


def _send(ranks: Ranks, outputs: Outputs) -> None:
    logits, prompts = outputs
    for tensor in [*([] if logits is None else [logits]), *prompts]:
        ranks.world.send(tensor, 0)


def _receive(ranks: Ranks, source: int, rows: Sequence[StepRow], shape: ResultShape) -> Outputs:
    samples = sum(row.num_logits for row in rows)
    logits = ranks.world.receive((samples, shape.vocab_size), shape.dtype, source) if samples else None
    prompts = [
        ranks.world.receive((row.num_tokens, shape.hidden_size), shape.dtype, source)
        for row in rows
        if row.wants_prompt
    ]
    return logits, prompts


def _in_order(
    rows: Sequence[StepRow], found: Sequence[tuple[list[StepRow], Outputs]], shape: ResultShape
) -> tuple[Tensor, list[Tensor]]:
    """Results by replica as results by row."""
    if len(found) == 1:
        return _packed(found[0][1], shape)
    parts = [logits for _, (logits, _) in found if logits is not None]
    together = torch.cat(parts) if parts else _no_logits(shape)
    by_replica = [row for own, _ in found for row in own]
    first = dict(zip(map(id, by_replica), accumulate((row.num_logits for row in by_replica), initial=0), strict=False))
    order = [first[id(row)] + number for row in rows for number in range(row.num_logits)]
    prompts = {
        id(row): hidden
        for own, (_, hiddens) in found
        for row, hidden in zip((r for r in own if r.wants_prompt), hiddens, strict=True)
    }
    logits = together[torch.tensor(order, device=together.device)] if order else together
    return logits, [prompts[id(row)] for row in rows if row.wants_prompt]


def _packed(outputs: Outputs, shape: ResultShape) -> tuple[Tensor, list[Tensor]]:
    logits, prompts = outputs
    return _no_logits(shape) if logits is None else logits, prompts


def _no_logits(shape: ResultShape) -> Tensor:
    """The logits of no row."""
    return torch.empty(0, shape.vocab_size, dtype=shape.dtype, device=shape.device)
