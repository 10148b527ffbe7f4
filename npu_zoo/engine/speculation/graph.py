"""The layer that predicts further tokens from captured graphs: seeing a step, and each further guess, is one launch."""

from __future__ import annotations

from torch import Tensor

from npu_zoo.core.attention import SequenceSlice
from npu_zoo.engine.decode.graph import CapturedGraphs, DecodeGraph
from npu_zoo.engine.speculation.layer import require_mtp
from npu_zoo.nn.context import ForwardContext


class MtpGraphs(CapturedGraphs):
    """The layer with the model's head behind it, for single tokens.

    There is one of these for each guess of a step, since the next one's inputs are written on the host while those of
    the one before may still be on their way.
    """

    def takes(self, slices: list[SequenceSlice]) -> bool:
        """Whether there can be a graph for some tokens."""
        return 0 < len(slices) <= self.sizes[-1] and all(s.num_tokens == 1 for s in slices)

    def predict(
        self, hidden: Tensor, following: list[int] | Tensor, slices: list[SequenceSlice]
    ) -> tuple[Tensor, Tensor]:
        """What the head takes for the tokens after the next, and the most likely of them; the next run overwrites both.

        Args:
            hidden: [T, hidden_size], see :meth:`npu_zoo.nn.mtp.MTPForCausalLM.predict_further`.
            following: the tokens behind them.
            slices: where they lie.
        """
        count, entry = len(slices), self._entry(len(slices))
        on_host = [0] * count if isinstance(following, Tensor) else following
        self._stage(entry, on_host, [place.start for place in slices])
        if isinstance(following, Tensor):
            entry.inputs[0, :count].copy_(following)
        assert entry.hidden is not None
        entry.hidden[:count].copy_(hidden)
        ids, predicted = self._replay(entry, slices)
        assert predicted is not None
        return predicted, ids

    @property
    def _takes_hidden(self) -> bool:
        return True

    def _forward(self, entry: DecodeGraph, context: ForwardContext) -> tuple[Tensor, Tensor]:
        assert entry.hidden is not None
        model = require_mtp(self.setup.model)
        predicted = model.predict_further(entry.hidden, entry.inputs[0], entry.inputs[1], context)
        return predicted, model.compute_logits(predicted).argmax(-1)
