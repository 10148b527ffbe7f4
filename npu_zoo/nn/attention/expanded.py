"""Keys and values that are expanded from latents for one layer, in strips of the compiled library."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npu_zoo.core.attention import LatentProjection, SequenceSlice
from npu_zoo.core.model_config import MLAConfig
from npu_zoo.nn.attention.compiled_steps import STRIP, CompiledMetadata, attend, make_metadata, strip_bytes
from npu_zoo.nn.attention.workspace import Workspace
from npu_zoo.nn.kernels.compiled.binding import ADDRESS, COUNT, SIZE, Function

_KINDS = {torch.bfloat16: 0, torch.float32: 1}
_pack = Function("zoo_pack_expanded", ADDRESS, ADDRESS, SIZE, SIZE, *[ADDRESS] * 5, COUNT)


class ExpandedStrips:
    """Every head's keys and values of some stretches of tokens, each from a strip's beginning on."""

    def __init__(self, mla: MLAConfig, num_heads: int, dtype: torch.dtype) -> None:
        kind = _KINDS[dtype]
        widths = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim
        self._sizes = np.array([kind, num_heads, num_heads, *widths, STRIP], dtype=np.int64)
        self._bytes = [
            num_heads * strip_bytes(kind, width, values) for values, width in enumerate((sum(widths[:2]), widths[2]))
        ]
        self._memory = Workspace(torch.uint8, torch.device("cpu"))
        self._stretches = np.empty((0, 3), dtype=np.int64)
        self._pools: tuple[int, int] = (0, 0)

    def fill(self, projection: LatentProjection, latent: Tensor, rope: Tensor, stretches: list[slice]) -> None:
        """Expand stretches of tokens, [T, kv_lora_rank] and [T, qk_rope_head_dim]; what was there before is lost."""
        first, last = stretches[0].start, stretches[-1].stop
        keys = projection.expand_keys(latent[first:last]).contiguous()
        values = projection.project(latent[first:last].unsqueeze(1).expand(-1, keys.shape[0], -1)).contiguous()
        turned = rope[first:last].t().contiguous()
        lengths = np.array([part.stop - part.start for part in stretches], dtype=np.int64)
        strips = -(-lengths // STRIP)
        starts = np.array([part.start - first for part in stretches], dtype=np.int64)
        self._stretches = np.stack((starts, lengths, np.cumsum(strips) - strips), axis=1)
        pools = [
            self._memory.buffer(name, int(strips.sum()) * size) for name, size in zip("kv", self._bytes, strict=True)
        ]
        self._pools = pools[0].data_ptr(), pools[1].data_ptr()
        _pack(
            self._sizes.ctypes.data,
            self._stretches.ctypes.data,
            len(stretches),
            last - first,
            keys.data_ptr(),
            turned.data_ptr(),
            values.data_ptr(),
            *self._pools,
            torch.get_num_threads(),
        )

    def attend(
        self,
        queries: tuple[Tensor, Tensor],
        rows: list[slice],
        scale: float,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
    ) -> None:
        """Attend from rows of queries to a stretch each.

        Args:
            queries: both parts, [T, num_heads, width] each.
            rows: the tokens of each stretch's queries.
            out: [T, num_heads, v_head_dim], filled for the rows.
            lse: [T, num_heads], filled with the log of the sum of exponential scores.
            causal: whether a row's queries are its stretch's last tokens; else they see all of it.
        """
        metadata = self._metadata(rows)
        metadata.items[:, 7] = not causal
        attend(self._sizes.ctypes.data, metadata, self._pools, *queries, None, None, out, scale, lse)

    def _metadata(self, rows: list[slice]) -> CompiledMetadata:
        lengths: NDArray[np.int64] = np.array([row.stop - row.start for row in rows], dtype=np.int64)
        keys, strips = self._stretches[:, 1], -(-self._stretches[:, 1] // STRIP)
        tables = np.arange(strips.sum())
        slices = [SequenceSlice(0, int(length), ()) for length in lengths]
        metadata = make_metadata(slices, keys - lengths, lengths, tables, strips, STRIP, [])
        metadata.items[:, 0] = [row.start for row in rows]
        return metadata
