"""One rank's part in drafting with the layer that predicts further tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

import torch
from torch import Tensor

from npu_zoo.core.attention import SequenceSlice, StepAttention
from npu_zoo.core.errors import ConfigError, WeightsError
from npu_zoo.engine.step import StepRow
from npu_zoo.nn.context import ForwardContext
from npu_zoo.nn.model import CausalLM
from npu_zoo.nn.mtp import MTPForCausalLM

STEPS_AT_ONCE = 16
"""Steps that may wait until the layer sees them: a pass over many costs about what one over the last of them does."""


@dataclass(frozen=True)
class DraftRow:
    """What became of one row of a step.

    Attributes:
        following: the tokens behind those of the row's tokens that stand, which are its first.
        slots: where the sequence's keys and values lie, with room for ``count - 1`` tokens more; unread where
            nothing is to be guessed.
        count: drafts that are wanted; of the last step's rows alone.
    """

    following: tuple[int, ...]
    slots: tuple[int, ...] = ()
    count: int = 0


@dataclass(frozen=True)
class SeenStep:
    """A step for the layer to see.

    Attributes:
        number: of the step, as runners count.
        rows: what became of its rows, in their order.
    """

    number: int
    rows: tuple[DraftRow, ...]


@dataclass(frozen=True)
class _Kept:
    """A step's rows, and the model's normed output [T, hidden_size] of all their tokens."""

    rows: tuple[StepRow, ...]
    hidden: Tensor


@dataclass(frozen=True)
class _Piece:
    """Those tokens of a row that stand.

    Attributes:
        row: of the step.
        following: the tokens behind them.
        first: where the row begins among all kept tokens that are seen at once.
    """

    row: StepRow
    following: tuple[int, ...]
    first: int

    def places(self, slot_size: int) -> set[tuple[int, int]]:
        """Where their keys and values lie: slots with the places in them."""
        start = self.row.start
        found = (divmod(place, slot_size) for place in range(start, start + len(self.following)))
        return {(self.row.slots[index], place) for index, place in found}

    @property
    def slices(self) -> list[SequenceSlice]:
        """As the step itself had them: single tokens, or a chunk."""
        count = len(self.following)
        if self.row.decodes:
            return [SequenceSlice(place, 1, self.row.slots) for place in self.row.positions[:count]]
        return [SequenceSlice(self.row.start, count, self.row.slots)]


class MtpDrafter:
    """Keeps what the last steps' tokens came to, until it is known what followed them.

    Args:
        model: with the layer built.
        attention: whose cache has the layer's keys and values behind those of the model's last.
        slot_size: tokens of the cache's slots.

    Raises:
        ConfigError: the model's class has no such layer.
    """

    def __init__(self, model: CausalLM, attention: StepAttention, slot_size: int, device: torch.device) -> None:
        self._model, self._attention, self._device = require_mtp(model), attention, device
        self._slot_size = slot_size
        self._kept: dict[int, _Kept] = {}

    def keep(self, number: int, rows: Sequence[StepRow], hidden: Tensor) -> None:
        """Remember a step; those that nobody asks for are forgotten after a while."""
        self._kept = {n: kept for n, kept in self._kept.items() if number - STEPS_AT_ONCE <= n < number}
        self._kept[number] = _Kept(tuple(rows), hidden)

    def draft(self, steps: Sequence[SeenStep]) -> Tensor:
        """Let the layer see kept steps, the earliest first, and guess what follows rows of the last one.

        Returns:
            First drafts of the rows that want most and then of the others, second drafts likewise and so on, which
            :func:`by_row` puts in order; none where the last step is not there.
        """
        found = [(step, kept) for step in steps if (kept := self._kept.pop(step.number, None)) is not None]
        last, order = steps[-1], _most_first(steps[-1].rows)
        if not found or not any(row.following for step, _ in found for row in step.rows):
            return torch.empty(0, dtype=torch.long, device=self._device)
        seen = self._see(found)
        if not order or found[-1][0] is not last:
            return torch.empty(0, dtype=torch.long, device=self._device)
        rows, kept_rows = last.rows, found[-1][1].rows
        ends = list(accumulate(len(row.following) for row in rows))
        x = seen[self._tensor([len(seen) - ends[-1] + ends[n] - 1 for n in order])]
        places = [kept_rows[n].start + len(rows[n].following) - 1 for n in order]
        return torch.cat(list(self._guess(x, places, [rows[n] for n in order])))

    def _see(self, found: list[tuple[SeenStep, _Kept]]) -> Tensor:
        """[T, hidden_size] of those tokens of steps that stand, one after the other."""
        hidden = found[0][1].hidden if len(found) == 1 else torch.cat([kept.hidden for _, kept in found])
        pieces = list(_pieces(found))
        if len(found) > 1:
            pieces = self._without_overwritten(pieces)
        places = [piece.first + n for piece in pieces for n in range(len(piece.following))]
        following = self._tensor(list(chain.from_iterable(piece.following for piece in pieces)))
        given = hidden if len(places) == len(hidden) else hidden[self._tensor(places)]
        return self._predict(given, following, [s for piece in pieces for s in piece.slices])

    def _without_overwritten(self, pieces: list[_Piece]) -> list[_Piece]:
        """Those whose room no later one has taken: a sequence may have given it up since. The last step's all stay."""
        written: set[tuple[int, int]] = set()
        standing = []
        for piece in reversed(pieces):
            places = piece.places(self._slot_size)
            if written.isdisjoint(places):
                standing.append(piece)
            written |= places
        return standing[::-1]

    def _guess(self, x: Tensor, places: list[int], rows: list[DraftRow]) -> Iterator[Tensor]:
        """First guesses of all rows, then second ones of those that want them, and so on.

        Args:
            x: [N, hidden_size], what the layer put out for each row's last token.
            places: of those tokens.
            rows: those that want most first.
        """
        for depth in range(1, rows[0].count + 1):
            ids = self._model.compute_logits(x).argmax(-1)
            yield ids
            more = sum(row.count > depth for row in rows)
            if more:
                slices = [
                    SequenceSlice(place + depth, 1, row.slots)
                    for place, row in zip(places[:more], rows[:more], strict=True)
                ]
                x = self._predict(x[:more], ids[:more], slices)

    def _predict(self, hidden: Tensor, following: Tensor, slices: list[SequenceSlice]) -> Tensor:
        positions = self._tensor(list(chain.from_iterable(range(s.start, s.context_len) for s in slices)))
        context = ForwardContext(self._attention, self._attention.prepare(slices), 0, (len(hidden),))
        return self._model.predict_further(hidden, following, positions, context)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(self._device)


def _pieces(found: Sequence[tuple[SeenStep, _Kept]]) -> Iterator[_Piece]:
    first = 0
    for step, kept in found:
        for row, became in zip(kept.rows, step.rows, strict=True):
            if became.following:
                yield _Piece(row, became.following, first)
            first += row.num_tokens


def _most_first(rows: Sequence[DraftRow]) -> list[int]:
    """The rows that want drafts, those first that want most, so that those which want one more are always the first."""
    return sorted((n for n, row in enumerate(rows) if row.count), key=lambda n: -rows[n].count)


def by_row(rows: Sequence[DraftRow], drafts: Sequence[int]) -> list[list[int]]:
    """What :meth:`MtpDrafter.draft` gives, row by row."""
    found: list[list[int]] = [[] for _ in rows]
    order = _most_first(rows)
    of_draft = (
        n for depth in range(max((row.count for row in rows), default=0)) for n in order if rows[n].count > depth
    )
    for n, draft in zip(of_draft, drafts, strict=False):
        found[n].append(draft)
    return found


def require_stored(missing: Sequence[str], layer: int, directory: Path) -> None:
    """Refuse a checkpoint that lacks the whole layer, as conversions often do whose config.json still states it.

    Args:
        missing: tensors that the model needs and the checkpoint lacks.
        layer: the number of the layer.

    Raises:
        WeightsError: all of them are the layer's.
    """
    if missing and all(name.startswith(f"model.layers.{layer}.") for name in missing):
        raise WeightsError(
            f"speculative_method=mtp drafts with layer {layer}, of which the checkpoint in {directory} lacks "
            f"{len(missing)} tensors ({missing[0]}, …); take a checkpoint that holds it, or --speculative-method "
            "prompt_lookup, which needs none"
        )


def require_mtp(model: CausalLM) -> MTPForCausalLM:
    """A model that can predict further tokens.

    Raises:
        ConfigError: its class has no layer for it.
    """
    if not isinstance(model, MTPForCausalLM):
        raise ConfigError(
            f"speculative_method=mtp drafts with a layer that {type(model).__name__} does not build; "
            "--speculative-method prompt_lookup works with every model"
        )
    return model
