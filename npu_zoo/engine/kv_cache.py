"""A rank's KV cache: what a token takes of it, how large it is, and the attention backend that holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from npu_zoo.core.attention import CacheLayout, LatentLayout, StepAttention
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.errors import HardwareError
from npu_zoo.core.parallel import Place
from npu_zoo.nn.rotary import softmax_scale
from npu_zoo.registry import load_code


@dataclass(frozen=True)
class CachePlan:
    """The KV cache as it was sized.

    Attributes:
        num_slots, slot_size: see :class:`CacheLayout`.
        max_model_len: the longest sequence that the cache takes.
        num_bytes: of all layers.
    """

    num_slots: int
    slot_size: int
    max_model_len: int
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache holds."""
        return self.num_slots * self.slot_size


def plan_cache(config: EngineConfig, bytes_per_token: int, free: int) -> CachePlan:
    """Size the KV cache: what the user gave, or a share of what is free, but no more than all sequences could fill.

    Args:
        config: the run.
        bytes_per_token: of all layers.
        free: bytes of free memory on the device.

    Raises:
        HardwareError: the memory does not hold one sequence of the length that was asked for, or is not there.
    """
    given = config.kv_cache_memory or int(free * config.kv_cache_fraction)
    paged = config.attention == "paged"
    size = (config.attention_choice.block_size or 1) if paged else 1
    affordable = given // (bytes_per_token * size) * size
    longest = config.max_model_len
    if affordable < longest:
        if config.max_model_len_asked or affordable < 1:
            raise HardwareError(
                f"max_model_len={longest} takes {longest * bytes_per_token / 2**20:.0f} MiB of keys and values, and "
                f"{given / 2**20:.0f} MiB are there, enough for {affordable} tokens; lower --max-model-len or give "
                "--kv-cache-memory"
            )
        longest = affordable
    slot_size, slots_per_sequence = (size, -(-longest // size)) if paged else (longest, 1)
    slots = min(affordable // slot_size, config.max_num_seqs * slots_per_sequence)
    num_bytes = slots * slot_size * bytes_per_token
    if num_bytes > free:
        raise HardwareError(
            f"the KV cache of {num_bytes / 2**30:.1f} GiB that --kv-cache-memory allows does not fit: "
            f"{free / 2**30:.1f} GiB are free; lower it, or leave it unset for a share of what is free"
        )
    return CachePlan(slots, slot_size, longest, num_bytes)


def bytes_per_token(config: EngineConfig, place: Place) -> int:
    """Cache bytes of one token in all layers of a rank."""
    model, dtype = config.model_config, getattr(torch, config.dtype)
    if model.mla:
        return _cached_layers(config, place) * int(_backend(config).bytes_per_token(model.mla, dtype.itemsize))
    _, kv_heads, head_dim = config.head_layout
    return _cached_layers(config, place) * int(_backend(config).bytes_per_token(kv_heads, head_dim, dtype.itemsize))


def create_attention(
    config: EngineConfig, place: Place, device: torch.device, num_slots: int, slot_size: int
) -> StepAttention:
    """The backend that was chosen, with a cache for a rank's layers.

    Raises:
        HardwareError: there is not enough memory.
    """
    model, layers = config.model_config, _cached_layers(config, place)
    heads, kv_heads, head_dim = config.head_layout
    layout: CacheLayout | LatentLayout = (
        LatentLayout(layers, model.mla, num_slots, slot_size)
        if model.mla
        else CacheLayout(layers, kv_heads, head_dim, num_slots, slot_size)
    )
    dtype = getattr(torch, config.dtype)
    created: StepAttention = _backend(config)(layout, dtype, device, heads, softmax_scale(model))
    return created


def _backend(config: EngineConfig) -> Any:
    return load_code(config.attention_choice.implementation)


def _cached_layers(config: EngineConfig, place: Place) -> int:
    """Layers whose keys and values are cached: the stage's, and behind the last one that which drafts."""
    return len(place.layers(config.model_config.num_hidden_layers)) + (config.mtp and place.is_last_stage)
