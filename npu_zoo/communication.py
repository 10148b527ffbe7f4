"""What ranks tell each other in a step, in bytes, as closed forms of the hyperparameters: no device, no torch.

Bytes are counted as a rank's own traffic counts them: of the tensors that one rank gives to an operation, or receives.
How often a byte travels is up to the operation's algorithm. Everything is exact but what ``all_to_all`` gives back,
which depends on the tokens: exact where the routing is given, else the mean under uniform routing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from npu_zoo.core.config import ExpertDispatch
from npu_zoo.core.hardware import ITEMSIZE, DType
from npu_zoo.core.model_config import ModelConfig, MoEConfig, padded_vocab_size
from npu_zoo.core.parallel import Place

_COUNT = 8
"""Bytes of the number of tokens for an expert."""


class Operation(NamedTuple):
    """One rank's part of an operation of a group.

    Attributes:
        name: ``group:operation``, such as ``tp:all_reduce``.
        bytes: of the tensor that the rank gives, or receives.
    """

    name: str
    bytes: float


@dataclass(frozen=True)
class StepShape:
    """How many tokens a step has; no hidden states of prompts are asked for.

    Attributes:
        batches: of each micro-batch, the tokens of each replica of the attention.
        sampled: of each replica, the rows whose logits are computed.
    """

    batches: tuple[tuple[int, ...], ...]
    sampled: tuple[int, ...]


def layer_operations(
    config: ModelConfig,
    place: Place,
    layer: int,
    replica_tokens: Sequence[int],
    dtype: DType,
    expert_dispatch: ExpertDispatch = "all_gather",
    arrived: int | None = None,
) -> Iterator[Operation]:
    """What a rank does with others in one layer.

    Args:
        layer: counted from 0, of the rank's stage.
        replica_tokens: tokens of each replica of the attention.
        dtype: the compute dtype.
        arrived: the rows that ``all_to_all`` brings to this rank's experts; None for their mean under uniform routing.
    """
    row, moe = config.hidden_size * ITEMSIZE[dtype], config.moe
    own = replica_tokens[place.replica]
    # A replica without tokens only lends its experts.
    sums = [Operation("tp:all_reduce", own * row)] if place.split.tp > 1 and own else []
    yield from sums
    if moe is not None and moe.has_experts(layer):
        if expert_dispatch == "all_gather":
            yield from _all_gather(place, replica_tokens, row)
        else:
            yield from _all_to_all(place, replica_tokens, moe, row, arrived)
    yield from sums


def _all_gather(place: Place, replica_tokens: Sequence[int], row: int) -> Iterator[Operation]:
    """Every replica's tokens, padded to the most that one has, to every replica; and the sums back."""
    replicas = place.split.dp
    if replicas > 1:
        padded = max(replica_tokens) * row
        yield Operation("dp:all_gather", padded)
        yield Operation("dp:reduce_scatter", replicas * padded)


def _all_to_all(
    place: Place, replica_tokens: Sequence[int], moe: MoEConfig, row: int, arrived: int | None
) -> Iterator[Operation]:
    """How many rows go to each expert, a row per token and expert, and what the experts make of the rows that came."""
    split = place.split
    if split.ep == 1:
        return
    chosen = moe.num_experts_per_tok
    shares, share = split.tp // split.moe_tp, place.tp_rank // split.moe_tp
    first, last = (replica_tokens[place.replica] * number // shares for number in (share, share + 1))
    returned = sum(replica_tokens) * chosen * row / split.ep if arrived is None else arrived * row
    yield Operation("ep:all_to_all", moe.n_routed_experts * _COUNT)
    yield Operation("ep:all_to_all", (last - first) * chosen * row)
    yield Operation("ep:all_to_all", returned)


def step_operations(
    config: ModelConfig,
    place: Place,
    step: StepShape,
    dtype: DType,
    expert_dispatch: ExpertDispatch = "all_gather",
    arrived: Iterable[int] | None = None,
) -> Iterator[Operation]:
    """What a rank does with others in a step.

    Args:
        dtype: the compute dtype.
        arrived: the rows that ``all_to_all`` brings to this rank's experts, by micro-batch and layer of experts in the
            order in which they are computed; None for their mean under uniform routing.
    """
    moe, rows = config.moe, None if arrived is None else iter(arrived)
    for tokens in step.batches:
        passed = tokens[place.replica] * config.hidden_size * ITEMSIZE[dtype]
        if place.stage and passed:
            yield Operation("world:receive", passed)
        if not place.stage and place.split.tp > 1 and passed:
            yield Operation("tp:all_reduce", passed)  # the embedding's
        for layer in place.layers(config.num_hidden_layers):
            expected = next(rows) if rows is not None and moe is not None and moe.has_experts(layer) else None
            yield from layer_operations(config, place, layer, tokens, dtype, expert_dispatch, expected)
        if not place.is_last_stage and passed:
            yield Operation("world:send", passed)
    yield from _results(config, place, step.sampled, ITEMSIZE[dtype])


def draft_operations(
    config: ModelConfig,
    place: Place,
    applied: Sequence[int],
    guessed: Sequence[int],
    dtype: DType,
    expert_dispatch: ExpertDispatch = "all_gather",
    arrived: Iterable[int] | None = None,
) -> Iterator[Operation]:
    """What a rank does with others where the layer that predicts further tokens sees a step and guesses.

    The drafts themselves are known on every rank, so nothing travels back.

    Args:
        applied: tokens of each time that the layer is applied: a step's, then those that a further guess is made from.
        guessed: rows of each guess.
        dtype: the compute dtype.
        arrived: see :func:`step_operations`, of each time that the layer is applied.
    """
    row, rows = config.hidden_size * ITEMSIZE[dtype], None if arrived is None else iter(arrived)
    split, layer = place.split, config.num_hidden_layers
    head = padded_vocab_size(config.vocab_size) // split.tp * ITEMSIZE[dtype]
    for tokens in applied:
        if split.tp > 1:
            yield Operation("tp:all_reduce", tokens * row)  # the embedding's
        expected = next(rows) if rows is not None else None
        yield from layer_operations(config, place, layer, (tokens,), dtype, expert_dispatch, expected)
    if split.tp > 1:
        yield from (Operation("tp:all_gather", count * head) for count in guessed)


def _results(config: ModelConfig, place: Place, sampled: Sequence[int], itemsize: int) -> Iterator[Operation]:
    """The logits' way from the ranks that have a part of the vocabulary to the first rank, which samples."""
    split, own = place.split, sampled[place.replica]
    logits = config.vocab_size * itemsize
    if place.is_last_stage and own:
        if split.tp > 1:
            yield Operation("tp:all_gather", own * (padded_vocab_size(config.vocab_size) // split.tp) * itemsize)
        if place.rank and place.tp_rank == 0:
            yield Operation("world:send", own * logits)
    if place.rank:
        return
    for replica, rows in enumerate(sampled):
        if rows and (split.pp > 1 or replica):  # else they are this rank's own
            yield Operation("world:receive", rows * logits)


def calls_of(operations: Iterable[Operation]) -> dict[str, int]:
    """How often each operation is done, by name."""
    return dict(Counter(operation.name for operation in operations))


def bytes_of(operations: Iterable[Operation]) -> dict[str, float]:
    """The bytes given to each operation, by name."""
    found: dict[str, float] = {}
    for operation in operations:
        found[operation.name] = found.get(operation.name, 0) + operation.bytes
    return found
