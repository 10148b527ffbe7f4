"""The memory behind the backends: blocks of keys and values, zero until written."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from npu_zoo.core.errors import HardwareError
from npu_zoo.nn.attention.workspace import Workspace

if TYPE_CHECKING:
    from npu_zoo.nn.attention.decode import DecodePlan

Blocks = slice | Tensor
"""Block numbers as an index: a slice where they follow each other, so that reading them copies nothing."""


class BlockCache:
    """Keys and values of all layers in blocks of ``block_size`` tokens.

    A key block holds its tokens along the last dimension, [num_kv_heads, head_dim, block_size], a value block its
    features, [num_kv_heads, block_size, head_dim]: so the scores of a query against a block, and the weighted values,
    are both weighted sums of rows. One block more than asked for is kept, is never written and stays zero.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.device = device
        lead = (num_layers, num_blocks + 1, num_kv_heads)
        self.keys = allocate_zeros((*lead, head_dim, block_size), dtype, device)
        self.values = allocate_zeros((*lead, block_size, head_dim), dtype, device)
        # Views by layer, because making them costs as much as a single token's work.
        self.key_rows = [layer.view(-1, block_size) for layer in self.keys]
        self.value_rows = [layer.view(-1, head_dim) for layer in self.values]
        self._key_places = [layer.permute(0, 3, 1, 2) for layer in self.keys]
        self._value_places = [layer.permute(0, 2, 1, 3) for layer in self.values]

    @property
    def lazy_memory(self) -> tuple[Tensor, ...]:
        """See :meth:`npu_zoo.core.attention.StepAttention.lazy_memory`."""
        return self.keys, self.values

    @property
    def zero_block(self) -> int:
        """The number of the block that is always zero."""
        return self.num_blocks

    def open(self, blocks: NDArray[np.int64]) -> None:
        """Make blocks ready for :meth:`write`, once a step for all layers."""

    def write(self, layer: int, key: Tensor, value: Tensor, blocks: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values, [T, num_kv_heads, head_dim], at places within blocks, [T] each.

        Returns:
            Both as :meth:`read` would give them back.
        """
        self._key_places[layer].index_put_((blocks, offsets), key)
        self._value_places[layer].index_put_((blocks, offsets), value)
        return key, value

    def scores(self, layer: int, query: Tensor, plan: DecodePlan) -> Tensor:
        """The products [M, num_heads, block_size] of queries, [M, num_heads, head_dim], with the keys of M blocks."""
        sums = weighted_sums(self.key_rows[layer], plan.key_rows, plan.key_bags, query)
        return sums.view(len(query), -1, self.block_size)

    def weighted_values(self, layer: int, probabilities: Tensor, plan: DecodePlan) -> Tensor:
        """Sums [N * num_heads, head_dim] of values, weighted by probabilities in the order of the plan's rows."""
        return weighted_sums(self.value_rows[layer], plan.value_rows, plan.value_bags, probabilities)

    def read(self, layer: int, blocks: Blocks, num_tokens: int, workspace: Workspace) -> tuple[Tensor, Tensor]:
        """The first tokens of a run of blocks, in the workspace's buffers ``key`` and ``value``.

        Returns:
            Transposed keys [num_kv_heads, head_dim, num_tokens] and values [num_kv_heads, num_tokens, head_dim].
        """
        keys = _select(self.keys[layer], blocks, workspace).permute(1, 2, 0, 3)
        keys = workspace.copy("key", keys).view(self.num_kv_heads, self.head_dim, -1)
        values = _select(self.values[layer], blocks, workspace).transpose(0, 1)
        values = workspace.copy("value", values).view(self.num_kv_heads, -1, self.head_dim)
        return keys[:, :, :num_tokens], values[:, :num_tokens]

    def index(self, blocks: Sequence[int] | NDArray[np.int64]) -> Blocks:
        """Block numbers in the form that :meth:`read` takes."""
        return index_blocks(blocks, self.device)


def weighted_sums(table: Tensor, rows: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    """A weighted sum of a table's rows for every bag of row numbers."""
    return F.embedding_bag(rows, table, bags, mode="sum", per_sample_weights=weights.view(-1))


def index_blocks(blocks: Sequence[int] | NDArray[np.int64], device: torch.device) -> Blocks:
    """Block numbers as an index of a pool on a device."""
    numbers = np.asarray(blocks, dtype=np.int64)
    if len(numbers) and (np.diff(numbers) == 1).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return torch.from_numpy(numbers).to(device)


def _select(pool: Tensor, blocks: Blocks, workspace: Workspace) -> Tensor:
    if isinstance(blocks, slice):
        return pool[blocks]
    return torch.index_select(pool, 0, blocks, out=workspace.buffer("blocks", len(blocks), *pool.shape[1:]))


def allocate_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zero tensor which, on a CPU, takes up memory only where it has been touched.

    Not in huge pages: a prompt of 2,048 tokens, which touches them first, took a fifth longer, and steps that only read
    them were no more than a twentieth faster.

    Raises:
        HardwareError: there is not that much memory.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        if device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
            return torch.zeros(shape, dtype=dtype, device=device)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(memory, dtype=dtype).view(shape)
    except (MemoryError, OSError, OverflowError, torch.OutOfMemoryError) as error:
        raise HardwareError(
            f"cannot reserve {size / 2**30:.2f} GiB on {device} for keys and values: {error}; "
            "lower kv_cache_memory, max_num_seqs or max_model_len"
        ) from error
