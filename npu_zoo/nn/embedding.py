"""Token embedding and the head over the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npu_zoo.nn.context import BuildContext


class Embedding(nn.Module):
    """Rows of a [vocab_size, hidden_size] table by token id."""

    def __init__(self, vocab_size: int, hidden_size: int, context: BuildContext) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=context.dtype), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[T] ids to [T, hidden_size]."""
        return F.embedding(input_ids, self.weight)
