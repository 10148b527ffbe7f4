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

_KEPT_STEPS = 2
"""The last one, and the one before where that was not seen yet."""


@dataclass(frozen=True)
class DraftRow:
    """What became of one row of a step.

    Attributes:
        following: the tokens behind those of the row's tokens that stand, which are its first.
        slots: where the sequence's keys and values lie, with room for ``count - 1`` tokens more; unread where
            nothing is to be guessed.
        count: drafts that are wanted.
    """

    following: tuple[int, ...]
    slots: tuple[int, ...] = ()
    count: int = 0


@dataclass(frozen=True)
class _Step:
    """A step's rows, and the model's normed output [T, hidden_size] of all their tokens."""

    rows: tuple[StepRow, ...]
    hidden: Tensor


class MtpDrafter:
    """Keeps what the last steps' tokens came to, until it is known what followed them.

    Args:
        model: with the layer built.
        attention: whose cache has the layer's keys and values behind those of the model's last.

    Raises:
        ConfigError: the model's class has no such layer.
    """

    def __init__(self, model: CausalLM, attention: StepAttention, device: torch.device) -> None:
        self._model, self._attention, self._device = require_mtp(model), attention, device
        self._steps: dict[int, _Step] = {}

    def keep(self, number: int, rows: Sequence[StepRow], hidden: Tensor) -> None:
        """Remember a step; of earlier ones the last is kept."""
        self._steps = {n: step for n, step in self._steps.items() if number - _KEPT_STEPS < n < number}
        self._steps[number] = _Step(tuple(rows), hidden)

    def draft(self, number: int, rows: Sequence[DraftRow]) -> Tensor:
        """Let the layer see a kept step, and guess.

        Args:
            number: of the step, which is forgotten then.
            rows: of the step, in its order.

        Returns:
            First drafts of the rows that want most and then of the others, second drafts likewise and so on, which
            :func:`by_row` puts in order; none where the step is not there.
        """
        step = self._steps.pop(number, None)
        nothing = torch.empty(0, dtype=torch.long, device=self._device)
        if step is None:
            return nothing
        seen = self._see(step, rows)
        order = _most_first(rows)
        if not order:
            return nothing
        ends = list(accumulate(len(row.following) for row in rows))
        x = seen[self._tensor([ends[n] - 1 for n in order])]
        places = [step.rows[n].start + len(rows[n].following) - 1 for n in order]
        return torch.cat(list(self._guess(x, places, [rows[n] for n in order])))

    def _see(self, step: _Step, rows: Sequence[DraftRow]) -> Tensor:
        """[T, hidden_size], of those of a step's tokens that stand."""
        hidden = step.hidden
        counts = [len(row.following) for row in rows]
        starts = accumulate((row.num_tokens for row in step.rows), initial=0)
        if sum(counts) < len(hidden):
            spans = (range(start, start + count) for start, count in zip(starts, counts, strict=False))
            hidden = hidden[self._tensor(list(chain.from_iterable(spans)))]
        slices = [s for row, count in zip(step.rows, counts, strict=True) for s in _slices(row, count)]
        following = self._tensor(list(chain.from_iterable(row.following for row in rows)))
        return self._predict(hidden, following, slices)

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


def _slices(row: StepRow, count: int) -> list[SequenceSlice]:
    """A row's first tokens as the step itself had them, single ones or a chunk."""
    if row.decodes:
        return [SequenceSlice(place, 1, row.slots) for place in row.positions[:count]]
    return [SequenceSlice(row.start, count, row.slots)] if count else []


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
