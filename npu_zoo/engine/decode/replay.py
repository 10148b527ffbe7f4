"""Decode steps of a CPU replayed: what a step of a batch size does is written down once, and done again for the next.

The first step of each batch size is computed as ever, and recorded meanwhile. See :mod:`npu_zoo.nn.kernels.recording`.
A step of another size is filled up to the next one with copies of the row that has the least to read. They write what
that row writes, go to the same experts, and are left out of the results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_zoo.core.attention import AttentionMetadata, ReplayAttention, SequenceSlice
from npu_zoo.engine.decode.path import DecodePath
from npu_zoo.nn.context import ForwardContext
from npu_zoo.nn.kernels.recording import NotReplayableError, Recording, record
from npu_zoo.nn.model import CausalLM

SIZES = (*range(1, 9), 12, 16, 24, 32, 48, 64)
"""Rows of steps that are recorded. Each size keeps its activations, so they are few."""


@dataclass
class DecodeReplay:
    """One batch size.

    Attributes:
        inputs: [2, batch] ids and positions.
        recording: None until it is made.
        hidden, logits: what a replay writes, [batch, hidden_size] and [batch, vocab_size].
    """

    inputs: Tensor
    metadata: AttentionMetadata
    recording: Recording | None = None
    hidden: Tensor | None = None
    logits: Tensor | None = None


class DecodeReplays(DecodePath):
    """The recordings of a whole model on one rank, made as they are needed.

    Args:
        model: with its weights loaded.
        attention: its backend.
        max_model_len: the longest sequence.
    """

    def __init__(self, model: CausalLM, attention: ReplayAttention, max_model_len: int) -> None:
        self._model, self._attention, self._longest = model, attention, max_model_len
        self._replays: dict[int, DecodeReplay] = {}
        self._warm = False
        self.obstacle = ""

    @property
    def form(self) -> str:
        """See :class:`DecodePath`."""
        return f"eager: {self.obstacle}" if self.obstacle else "replays of recorded steps"

    def run(
        self, given: list[int] | Tensor, rows: list[SequenceSlice], largest: int
    ) -> tuple[Tensor, Tensor | None] | None:
        """See :meth:`DecodePath.run`.

        Returns:
            None where the step has more rows than any that is recorded, it is the first of all, which computes tables
            that later ones read, or the model's steps cannot be recorded, for which ``obstacle`` says why.
        """
        count = len(rows)
        size = next((size for size in SIZES if size >= count), None)
        if self.obstacle or size is None:
            return None
        if not self._warm:
            self._warm = True
            return None
        least = min(range(count), key=lambda number: rows[number].start)
        order = [*range(count), *[least] * (size - count)]
        filled = [rows[number] for number in order]
        entry = self._replays.get(size) or self._make(size)
        self._attention.refill(entry.metadata, filled, count)
        entry.inputs.copy_(torch.tensor([[given[number] for number in order], [row.start for row in filled]]))
        if entry.recording is not None:
            entry.recording.replay()
        elif not self._record(entry):
            return None
        assert entry.logits is not None
        assert entry.hidden is not None
        return entry.logits[:count], entry.hidden[:count]

    def _make(self, size: int) -> DecodeReplay:
        inputs = torch.zeros(2, size, dtype=torch.long)
        self._replays[size] = DecodeReplay(inputs, self._attention.replay_metadata(size, self._longest))
        return self._replays[size]

    def _record(self, entry: DecodeReplay) -> bool:
        """Compute a step and write down what it does, if that is possible."""
        context = ForwardContext(self._attention, entry.metadata, 0, (entry.inputs.shape[1],))
        try:
            with record() as recording:
                entry.hidden = self._model(entry.inputs[0], entry.inputs[1], context)
                entry.logits = self._model.compute_logits(entry.hidden)
        except NotReplayableError as error:
            self.obstacle = str(error)
            self._replays.clear()
            return False
        entry.recording = recording
        return True
