"""Token embedding and the head over the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npu_zoo.core.errors import WeightsError
from npu_zoo.core.model_config import padded_vocab_size
from npu_zoo.core.weights import Shard
from npu_zoo.nn.context import BuildContext
from npu_zoo.nn.layer import Layer
from npu_zoo.nn.linear import Linear


def vocabulary_shard(vocab_size: int, context: BuildContext) -> Shard:
    """A rank's part of the vocabulary, without padding.

    Raises:
        WeightsError: the ranks do not divide the padded vocabulary.
    """
    padded, tp = padded_vocab_size(vocab_size), context.tp
    if padded % tp.size:
        raise WeightsError(f"a vocabulary of {vocab_size}, padded to {padded}, cannot be shared by {tp.size} ranks")
    share = padded // tp.size
    first, last = (min(vocab_size, number * share) for number in (tp.rank, tp.rank + 1))
    return Shard(0, first, last, vocab_size)


class Embedding(Layer):
    """Rows of a [vocab_size, hidden_size] table by token id; rows of padding follow, which no id reaches."""

    def __init__(self, vocab_size: int, hidden_size: int, context: BuildContext) -> None:
        super().__init__()
        self._tp = context.tp
        self.shard = vocabulary_shard(vocab_size, context)
        rows = padded_vocab_size(vocab_size) // context.tp.size
        self.weight = nn.Parameter(torch.empty(rows, hidden_size, dtype=context.dtype), requires_grad=False)

    def checkpoint_view(self) -> Tensor:
        """The rows that a loader fills."""
        return self.weight.data[: self.shard.stop - self.shard.start]

    def forward(self, input_ids: Tensor) -> Tensor:
        """[T] ids to [T, hidden_size]."""
        if self._tp.size == 1:
            return F.embedding(input_ids, self.weight)
        local = input_ids - self.shard.start
        mine = (local >= 0) & (local < len(self.weight))
        rows = F.embedding(local.where(mine, 0), self.weight)
        return self._tp.all_reduce(rows.masked_fill(~mine.unsqueeze(1), 0))


class LMHead(Linear):
    """The scores of every token id. Rows of padding are computed along and masked out: no sampler ever sees one.

    Args:
        name: the checkpoint's name of the matrix.
    """

    quantizable = False

    def __init__(self, hidden_size: int, vocab_size: int, context: BuildContext, name: str = "lm_head") -> None:
        self.shard = vocabulary_shard(vocab_size, context)
        rows = self.shard.stop - self.shard.start
        padding = padded_vocab_size(vocab_size) // context.tp.size - rows
        super().__init__(hidden_size, {name: rows}, context, padding)
        self._name, self._vocab_size = name, vocab_size

    def shards(self) -> dict[str, Shard]:
        """See :meth:`Linear.shards`."""
        return {f"{self._name}.weight": self.shard} if self._tp.size > 1 else {}

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to [..., vocab_size]."""
        return self._tp.all_gather(super().forward(x), -1)[..., : self._vocab_size]
