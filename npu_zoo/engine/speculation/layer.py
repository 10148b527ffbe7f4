"""One rank's part in drafting with the layer that predicts further tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from npu_zoo.core.attention import SequenceSlice, StepAttention
from npu_zoo.core.errors import ConfigError, WeightsError
from npu_zoo.engine.speculation.steps import STEPS_AT_ONCE, DraftRow, SeenStep, most_first
from npu_zoo.engine.step import StepRow
from npu_zoo.nn.context import ForwardContext
from npu_zoo.nn.model import CausalLM
from npu_zoo.nn.mtp import MTPForCausalLM


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

    @property
    def end(self) -> int:
        """The place behind them."""
        return self.row.start + len(self.following)

    def slots_up_to(self, place: int, slot_size: int) -> tuple[int, ...]:
        """Where the sequence lies before a place."""
        return tuple(self.row.slots[: -(-place // slot_size)])

    def places(self, slot_size: int) -> set[tuple[int, int]]:
        """Where their keys and values lie: slots with the places in them."""
        found = (divmod(place, slot_size) for place in range(self.row.start, self.end))
        return {(self.row.slots[index], place) for index, place in found}

    @property
    def slices(self) -> list[SequenceSlice]:
        """As the step itself had them: single tokens, or a chunk."""
        if self.row.decodes:
            return [SequenceSlice(place, 1, self.row.slots) for place in range(self.row.start, self.end)]
        return [SequenceSlice(self.row.start, len(self.following), self.row.slots)]


class Graphs(Protocol):
    """See :class:`npu_zoo.engine.speculation.graph.MtpGraphs`."""

    def takes(self, slices: list[SequenceSlice]) -> bool:
        """Whether there can be a graph for some tokens."""

    def predict(
        self, hidden: Tensor, following: list[int] | Tensor, slices: list[SequenceSlice]
    ) -> tuple[Tensor, Tensor]:
        """What the head takes for the tokens after the next, and the most likely of them."""


class MtpDrafter:
    """Keeps what the last steps' tokens came to, until it is known what followed them.

    Args:
        model: with the layer built.
        attention: whose cache has the layer's keys and values behind those of the model's last.
        slot_size: tokens of the cache's slots.
        graphs: for each guess of a step, what launches the layer; empty where it is launched operator by operator.

    Raises:
        ConfigError: the model's class has no such layer.
    """

    def __init__(
        self,
        model: CausalLM,
        attention: StepAttention,
        slot_size: int,
        device: torch.device,
        graphs: Sequence[Graphs] = (),
    ) -> None:
        self._model, self._attention, self._device = require_mtp(model), attention, device
        self._slot_size, self._graphs = slot_size, graphs
        self._kept: dict[int, _Kept] = {}

    def keep(self, number: int, rows: Sequence[StepRow], hidden: Tensor) -> None:
        """Remember a step; those that nobody asks for are forgotten after a while."""
        self._kept = {n: kept for n, kept in self._kept.items() if number - STEPS_AT_ONCE <= n < number}
        # A sequence's blocks are given up and taken while its steps wait here.
        self._kept[number] = _Kept(tuple(replace(row, slots=tuple(row.slots)) for row in rows), hidden)

    def draft(self, steps: Sequence[SeenStep]) -> Tensor:
        """Let the layer see kept steps, the earliest first, and guess what follows rows of the last one.

        Returns:
            First drafts of the rows that want most and then of the others, second drafts likewise and so on, which
            :func:`~npu_zoo.engine.speculation.steps.by_row` puts in order; none where the last step is not there.
        """
        found = [(step, kept) for step in steps if (kept := self._kept.pop(step.number, None)) is not None]
        nothing = torch.empty(0, dtype=torch.long, device=self._device)
        if not found or not any(row.following for step, _ in found for row in step.rows):
            return nothing
        last, order = steps[-1], most_first(steps[-1].rows)
        pieces, slices = self._standing(found)
        hidden = self._hidden(found, pieces)
        following = list(chain.from_iterable(piece.following for piece in pieces))
        if not order or found[-1][0] is not last:
            self._predict(hidden, self._tensor(following), slices)
            return nothing
        rows, kept = last.rows, found[-1][1]
        ends = dict(zip((p.first for p in pieces), accumulate(len(p.following) for p in pieces), strict=True))
        begin = sum(len(earlier.hidden) for _, earlier in found[:-1])
        firsts = list(accumulate((row.num_tokens for row in kept.rows), initial=begin))
        x, ids = self._guess(0, hidden, following, slices, [ends[firsts[n]] - 1 for n in order])
        places = [kept.rows[n].start + len(rows[n].following) - 1 for n in order]
        further = list(self._guess_on(x, ids, places, [rows[n] for n in order]))
        return torch.cat([ids, *further]) if further else ids

    def _standing(self, found: list[tuple[SeenStep, _Kept]]) -> tuple[list[_Piece], list[SequenceSlice]]:
        """What stands of some steps, and as what the backend is given it.

        One step is given as it was; of several, what follows each other in a sequence is given as one chunk.
        """
        pieces = list(_pieces(found))
        if len(found) == 1:
            return pieces, [s for piece in pieces for s in piece.slices]
        chunks = self._chunks(self._without_overwritten(pieces))
        slices = [
            SequenceSlice(chunk[0].row.start, chunk[-1].end - chunk[0].row.start, chunk[-1].row.slots)
            for chunk in chunks
        ]
        return list(chain.from_iterable(chunks)), slices

    def _chunks(self, pieces: list[_Piece]) -> list[list[_Piece]]:
        """Pieces by what they go on with: where one ends, in the same slots, another one begins."""
        size, chunks = self._slot_size, list[list[_Piece]]()
        ending: dict[tuple[int, tuple[int, ...]], list[_Piece]] = {}
        for piece in pieces:
            start = piece.row.start
            chunk = ending.pop((start, piece.slots_up_to(start, size)), None)
            if chunk is None:
                chunk = []
                chunks.append(chunk)
            chunk.append(piece)
            ending[piece.end, piece.slots_up_to(piece.end, size)] = chunk
        return chunks

    def _hidden(self, found: list[tuple[SeenStep, _Kept]], pieces: list[_Piece]) -> Tensor:
        """[T, hidden_size] of pieces, one after the other."""
        hidden = found[0][1].hidden if len(found) == 1 else torch.cat([kept.hidden for _, kept in found])
        places = [piece.first + n for piece in pieces for n in range(len(piece.following))]
        return hidden if places == list(range(len(hidden))) else hidden[self._tensor(places)]

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

    def _guess(
        self,
        number: int,
        hidden: Tensor,
        following: list[int] | Tensor,
        slices: list[SequenceSlice],
        behind: list[int],
    ) -> tuple[Tensor, Tensor]:
        """Apply the layer once, and the head behind some tokens.

        Args:
            number: of the guess in its step, from 0 on.
            behind: which of the tokens guesses are made behind.

        Returns:
            What the layer puts out for those tokens, [N, hidden_size], and the guesses, [N].
        """
        every = behind == list(range(len(slices)))
        if number < len(self._graphs) and self._graphs[number].takes(slices):
            x, ids = self._graphs[number].predict(hidden, following, slices)
            if every:
                return x, ids
            chosen = self._tensor(behind)
            # Behind the last guess nobody asks what the layer put out.
            return x[chosen] if number + 1 < len(self._graphs) else x, ids[chosen]
        known = following if isinstance(following, Tensor) else self._tensor(following)
        x = self._predict(hidden, known, slices)
        x = x if every and len(x) == len(slices) else x[self._tensor(behind)]
        return x, self._model.compute_logits(x).argmax(-1)

    def _guess_on(self, x: Tensor, ids: Tensor, places: list[int], rows: list[DraftRow]) -> Iterator[Tensor]:
        """Second guesses of the rows that want them, then third ones and so on.

        Args:
            x: [N, hidden_size], what the layer put out for each row's last token.
            ids: [N], first guesses.
            places: of those tokens.
            rows: those that want most first.
        """
        for number in range(1, rows[0].count):
            more = sum(row.count > number for row in rows)
            slices = [
                SequenceSlice(place + number, 1, row.slots)
                for place, row in zip(places[:more], rows[:more], strict=True)
            ]
            x, ids = self._guess(number, x[:more], ids[:more], slices, list(range(more)))
            yield ids

    def _predict(self, hidden: Tensor, following: Tensor, slices: list[SequenceSlice]) -> Tensor:
        positions = self._tensor(list(chain.from_iterable(range(s.start, s.context_len) for s in slices)))
        context = ForwardContext(self._attention, self._attention.prepare(slices), 0, (len(hidden),))
        return self._model.predict_further(hidden, following, positions, context)

    def _tensor(self, values: list[int]) -> Tensor:
        """Integers on the device, without waiting for it."""
        on_host = torch.tensor(values, dtype=torch.long)
        if self._device.type == "cpu":
            return on_host
        return on_host.pin_memory().to(self._device, non_blocking=True)


def _pieces(found: Sequence[tuple[SeenStep, _Kept]]) -> Iterator[_Piece]:
    first = 0
    for step, kept in found:
        for row, became in zip(kept.rows, step.rows, strict=True):
            if became.following:
                yield _Piece(row, became.following, first)
            first += row.num_tokens


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
