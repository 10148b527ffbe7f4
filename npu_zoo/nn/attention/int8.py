"""Keys and values in int8, with a scale per token and key-value head that is computed as they are written.

Codes are symmetric, ``max|x| / 127``, so no calibration is needed, a token's codes are the same in whatever step it is
computed, and a token of zeros or of anything else harms none beside it. Decode reads the codes themselves: torch's sums
of quantized rows restore each row in registers, at the speed of the fewer bytes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npu_zoo.nn.attention.cache import BlockCache, Blocks, allocate_zeros
from npu_zoo.nn.attention.contiguous import ContiguousAttention
from npu_zoo.nn.attention.decode import DecodePlan
from npu_zoo.nn.attention.paged import PagedAttention
from npu_zoo.nn.attention.workspace import Workspace

LARGEST_CODE = 127
ROW_TOKENS = 64
"""Tokens of a block: a row of keys has as many codes, and its own scale and shift beside them."""

_SHIFT = 128
"""What is added to a code, since the rows that torch sums are of unsigned bytes."""

_TAIL = 2 * torch.float32.itemsize
"""Bytes behind a row's codes: its scale and its shift, of float32."""

_READ_TOKENS = 512
"""Tokens that are restored at once where a context is read back."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric codes of each vector along the last dimension.

    Returns:
        Whole numbers from -127 to 127 in float32 of the shape of ``x``, and the scales, without its last dimension.
        A vector of zeros has zeros for codes and for its scale.
    """
    wide = x.float()
    scales = wide.abs().amax(-1) / LARGEST_CODE
    divisor = torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
    return (wide / divisor).round_().clamp_(-LARGEST_CODE, LARGEST_CODE), scales


class Int8BlockCache(BlockCache):
    """Blocks of codes, laid out as those of :class:`BlockCache`, each row with a scale and a shift behind its codes.

    A row of values is one token's, and so is its scale. A row of keys is one feature of a block's tokens: it restores
    codes alone, and the tokens' scales, which lie beside the blocks, are multiplied into the scores.
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
        self.dtype = dtype
        lead = (num_layers, num_blocks + 1, num_kv_heads)
        self.keys = allocate_zeros((*lead, head_dim, block_size + _TAIL), torch.uint8, device)
        self.values = allocate_zeros((*lead, block_size, head_dim + _TAIL), torch.uint8, device)
        self.key_scales = allocate_zeros((*lead, block_size), torch.float32, device)
        self.key_rows = [layer.view(-1, block_size + _TAIL) for layer in self.keys]
        self.value_rows = [layer.view(-1, head_dim + _TAIL) for layer in self.values]
        self._key_places = [layer.permute(0, 3, 1, 2) for layer in self.keys]
        self._value_places = [layer.permute(0, 2, 1, 3) for layer in self.values]
        self._scale_places = [layer.permute(0, 2, 1) for layer in self.key_scales]
        self._opened = np.zeros(num_blocks + 1, dtype=np.bool_)
        self._key_tail = torch.tensor([1.0, -_SHIFT]).view(torch.uint8).to(device)

    @property
    def lazy_memory(self) -> tuple[Tensor, ...]:
        """See :meth:`npu_zoo.core.attention.StepAttention.lazy_memory`."""
        return self.keys, self.values, self.key_scales

    def open(self, blocks: NDArray[np.int64]) -> None:
        """Write the tails of key rows, once a block: to fill them all at the start would touch the whole cache."""
        fresh = np.unique(blocks[~self._opened[blocks]])
        if len(fresh):
            self.keys[:, torch.from_numpy(fresh).to(self.device), :, :, self.block_size :] = self._key_tail
            self._opened[fresh] = True

    def write(self, layer: int, key: Tensor, value: Tensor, blocks: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`BlockCache.write`; what is returned has been rounded to codes and restored."""
        key_codes, key_scales = quantize(key)
        value_codes, value_scales = quantize(value)
        self._key_places[layer].index_put_((blocks, offsets), _as_bytes(key_codes))
        self._scale_places[layer].index_put_((blocks, offsets), key_scales)
        tails = torch.stack((value_scales, value_scales * -_SHIFT), -1).view(torch.uint8)
        self._value_places[layer].index_put_((blocks, offsets), torch.cat((_as_bytes(value_codes), tails), -1))
        restored = key_codes.mul_(key_scales.unsqueeze(-1)), value_codes.mul_(value_scales.unsqueeze(-1))
        return restored[0].to(key.dtype), restored[1].to(value.dtype)

    def read(self, layer: int, blocks: Blocks, num_tokens: int, workspace: Workspace) -> tuple[Tensor, Tensor]:
        """See :meth:`BlockCache.read`."""
        size, count = self.block_size, -(-num_tokens // self.block_size)
        numbers = (torch.arange(blocks.start, blocks.stop) if isinstance(blocks, slice) else blocks)[:count]
        keys = workspace.buffer("key", self.num_kv_heads, self.head_dim, count, size)
        values = workspace.buffer("value", self.num_kv_heads, count, size, self.head_dim)
        step = max(1, _READ_TOKENS // size)
        for first in range(0, count, step):
            part = numbers[first : first + step]
            rows = part * self.num_kv_heads + torch.arange(self.num_kv_heads).unsqueeze(1)  # [num_kv_heads, blocks]
            features = (rows * self.head_dim).unsqueeze(1) + torch.arange(self.head_dim).unsqueeze(1)
            scales = self.key_scales[layer][part].transpose(0, 1).unsqueeze(1)
            keys[:, :, first : first + len(part)] = _restored(self.key_rows[layer], features).mul_(scales)
            tokens = (rows * size).unsqueeze(2) + torch.arange(size)
            values[:, first : first + len(part)] = _restored(self.value_rows[layer], tokens)
        return keys.flatten(2)[:, :, :num_tokens], values.flatten(1, 2)[:, :num_tokens]

    def scores(self, layer: int, query: Tensor, plan: DecodePlan) -> Tensor:
        """See :meth:`BlockCache.scores`; in float32."""
        sums = _weighted_sums(self.key_rows[layer], plan.key_rows, plan.key_bags, query.float())
        scales = self.key_scales[layer].index_select(0, plan.blocks).unsqueeze(2)
        return sums.view(len(query), self.num_kv_heads, -1, self.block_size).mul_(scales).flatten(1, 2)

    def weighted_values(self, layer: int, probabilities: Tensor, plan: DecodePlan) -> Tensor:
        """See :meth:`BlockCache.weighted_values`; in float32."""
        return _weighted_sums(self.value_rows[layer], plan.value_rows, plan.value_bags, probabilities)


class _Int8(PagedAttention):
    """What both kinds share."""

    _cache_class = Int8BlockCache
    _prefix_cost = 12  # restoring a prefix takes as long as so many rows take to sum over its bytes

    @staticmethod
    def bytes_per_token(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Cache bytes of one token in one layer, in blocks of 64: codes, scales and shifts, whatever the dtype is."""
        keys = head_dim + -(-head_dim * _TAIL // ROW_TOKENS) + torch.float32.itemsize
        return num_kv_heads * (keys + head_dim + _TAIL)


class Int8PagedAttention(_Int8):
    """Attention over a pool of blocks of int8 keys and values, on a CPU."""


class Int8ContiguousAttention(_Int8, ContiguousAttention):
    """The same over one slot per sequence."""


def _as_bytes(codes: Tensor) -> Tensor:
    return (codes + _SHIFT).to(torch.uint8)


def _restored(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of bytes in float32, each a sum of its own, which is the fastest way to restore them."""
    return _weighted_sums(table, rows.flatten(), torch.arange(rows.numel()), None).view(*rows.shape, -1)


def _weighted_sums(table: Tensor, rows: Tensor, bags: Tensor, weights: Tensor | None) -> Tensor:
    """As :func:`~npu_zoo.nn.attention.cache.weighted_sums`, over rows of bytes that end in their scale and shift."""
    each = None if weights is None else weights.view(-1)
    sums: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(table, rows, bags, per_sample_weights=each)
    return sums
