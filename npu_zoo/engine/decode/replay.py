"""Decode steps of a CPU replayed: what a step of a batch size does is written down once, and done again for the next.

The first step of each batch size is computed as ever, and recorded meanwhile. See :mod:`npu_zoo.nn.kernels.recording`.
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

SIZES = frozenset({*range(1, 9), 16, 32})
"""Rows of steps that are replayed. Each size keeps its activations, so they are few."""


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
            None where the step has another size, its rows share a prefix, it is the first of all, which computes tables
            that later ones read, or the model's steps cannot be recorded, for which ``obstacle`` says why.
        """
        if self.obstacle or len(rows) not in SIZES:
            return None
        if not self._warm:
            self._warm = True
            return None
        entry = self._replays.get(len(rows)) or self._make(len(rows))
        if not self._attention.refill(entry.metadata, rows):
            return None
        entry.inputs.copy_(torch.tensor([given, [row.start for row in rows]]))
        if entry.recording is None:
            return self._record(entry)
        entry.recording.replay()
        return _results(entry)

    def _make(self, size: int) -> DecodeReplay:
        inputs = torch.zeros(2, size, dtype=torch.long)
        self._replays[size] = DecodeReplay(inputs, self._attention.replay_metadata(size, self._longest))
        return self._replays[size]

    def _record(self, entry: DecodeReplay) -> tuple[Tensor, Tensor] | None:
        context = ForwardContext(self._attention, entry.metadata, 0, (entry.inputs.shape[1],))
        try:
            with record() as recording:
                entry.hidden = self._model(entry.inputs[0], entry.inputs[1], context)
                entry.logits = self._model.compute_logits(entry.hidden)
        except NotReplayableError as error:
            self.obstacle = str(error)
            self._replays.clear()
            return None
        entry.recording = recording
        return _results(entry)


def _results(entry: DecodeReplay) -> tuple[Tensor, Tensor]:
    assert entry.hidden is not None
    assert entry.logits is not None
    return entry.logits, entry.hidden
