"""Token embedding and the head over the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npu_zoo.core.model_config import padded_vocab_size
from npu_zoo.nn.context import BuildContext
from npu_zoo.nn.linear import Linear


class Embedding(nn.Module):
    """Rows of a [vocab_size, hidden_size] table by token id; rows of padding follow, which no id reaches."""

    def __init__(self, vocab_size: int, hidden_size: int, context: BuildContext) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        rows = padded_vocab_size(vocab_size)
        self.weight = nn.Parameter(torch.empty(rows, hidden_size, dtype=context.dtype), requires_grad=False)

    def checkpoint_view(self) -> Tensor:
        """The rows that a loader fills."""
        return self.weight.data[: self._vocab_size]

    def forward(self, input_ids: Tensor) -> Tensor:
        """[T] ids to [T, hidden_size]."""
        return F.embedding(input_ids, self.weight)


class LMHead(Linear):
    """The scores of every token id. Rows of padding are computed along and masked out: no sampler ever sees one.

    Args:
        name: the checkpoint's name of the matrix.
    """

    quantizable = False

    def __init__(self, hidden_size: int, vocab_size: int, context: BuildContext, name: str = "lm_head") -> None:
        super().__init__(hidden_size, {name: vocab_size}, context, padded_vocab_size(vocab_size) - vocab_size)
        self._vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to [..., vocab_size]."""
        return super().forward(x)[..., : self._vocab_size]
