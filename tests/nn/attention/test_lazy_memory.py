"""What backends say of the memory that they take as it is written: all of the cache, on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from npu_zoo.compiled.library import obstacle
from npu_zoo.core.attention import CacheLayout, LatentLayout
from npu_zoo.core.model_config import MLAConfig
from npu_zoo.nn.attention.compiled import (
    CompiledContiguousAttention,
    CompiledInt8PagedAttention,
    CompiledPagedAttention,
)
from npu_zoo.nn.attention.compiled_latent import CompiledLatentAttention
from npu_zoo.nn.attention.contiguous import ContiguousAttention
from npu_zoo.nn.attention.int8 import Int8ContiguousAttention, Int8PagedAttention
from npu_zoo.nn.attention.latent import PagedLatentAttention
from npu_zoo.nn.attention.paged import PagedAttention

CPU = torch.device("cpu")
COMPILED = (CompiledPagedAttention, CompiledContiguousAttention, CompiledInt8PagedAttention, CompiledLatentAttention)
PLAIN = (PagedAttention, ContiguousAttention, Int8PagedAttention, Int8ContiguousAttention, PagedLatentAttention)
LAYERS, HEADS, DIM, SLOTS, SIZE = 3, 2, 32, 5, 64
MLA = MLAConfig(kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=12, v_head_dim=20)


@pytest.mark.parametrize(
    "kind",
    [
        *PLAIN,
        *(pytest.param(kind, marks=pytest.mark.skipif(bool(obstacle()), reason=str(obstacle()))) for kind in COMPILED),
    ],
)
def test_it_is_all_of_the_cache(kind: Any) -> None:
    latent = kind in (PagedLatentAttention, CompiledLatentAttention)
    layout = LatentLayout(LAYERS, MLA, SLOTS, SIZE) if latent else CacheLayout(LAYERS, HEADS, DIM, SLOTS, SIZE)
    backend = kind(layout, torch.float32, CPU, 4, 1.0)
    of_token = kind.bytes_per_token(MLA, 4) if latent else kind.bytes_per_token(HEADS, DIM, 4)
    held = sum(tensor.nbytes for tensor in backend.lazy_memory())
    due = LAYERS * SLOTS * SIZE * of_token
    assert due <= held < due * (SLOTS + 2) / SLOTS  # some keep a block of zeros, and codes a tail in every row
