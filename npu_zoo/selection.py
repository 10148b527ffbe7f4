"""Chooses a kernel per operation and an attention backend, and keeps the reason for all that was passed over.

The choice is made once, from specs alone, before torch is imported; the engine binds what was chosen.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from npu_zoo.core.config import AttentionChoice, KernelChoice
from npu_zoo.core.errors import HardwareError, PluginError
from npu_zoo.core.features import Attention
from npu_zoo.core.hardware import DType
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.quantization import scheme_of, scheme_operations
from npu_zoo.core.specs import AttentionBackendSpec, KernelSpec
from npu_zoo.registry import load_code

_STORED = {"heads": "keys and values by head", "latent": "latents (MLA)"}


SHARED_OPERATIONS = (
    "rms_norm",
    "add_rms_norm",
    "rotary_embedding",
    "interleaved_rotary_embedding",
    "head_linear",
    "silu_and_mul",
    "linear",
    "route_tokens",
    "experts",
    "top_k_top_p",
)
"""The zoo's own operations, which every run has a kernel for."""

_OF_EXPERTS = ("route_tokens", "experts")
_OF_LATENTS = ("head_linear", "interleaved_rotary_embedding")
_OF_HEADS = ("rotary_embedding",)


def select_kernels(
    kernels: Mapping[str, KernelSpec],
    chip: str,
    dtype: DType,
    config: ModelConfig | None = None,
    quantization: str = "none",
    operations: Collection[str] | None = None,
) -> tuple[KernelChoice, ...]:
    """The kernel of every operation of a run, for a chip and dtype; one that the model has no use for is no fallback.

    Args:
        kernels: what is registered.
        chip: the chip's name.
        dtype: the compute dtype.
        config: the model's hyperparameters; None takes every kind of layer for used.
        quantization: operations of quantized layers are left out but for those of this scheme.
        operations: those beyond the shared ones that the family calls; None takes every registered one.

    Raises:
        PluginError: an operation has no kernel that is available.
    """
    unused = _unused(config, quantization) if config else ()
    concerned = _concerned({spec.operation for spec in kernels.values()}, quantization, operations)
    choices = (
        _select_kernel(operation, kernels.values(), chip, dtype)
        if operation not in unused
        else _select_unused(operation, kernels.values(), chip, dtype)
        for operation in sorted(concerned)
    )
    return tuple(choice for choice in choices if choice is not None)


def _concerned(registered: set[str], quantization: str, operations: Collection[str] | None) -> set[str]:
    """The registered operations of a run: the zoo's own, the family's, and those of the scheme's layers."""
    if operations is None:
        wanted = registered
    else:
        missing = sorted({*operations} - registered)
        if missing:
            raise PluginError(f"no plugin registers a kernel for {', '.join(missing)}, which the model calls")
        wanted = registered & {*SHARED_OPERATIONS, *operations, *scheme_operations(quantization)}
    return {operation for operation in wanted if scheme_of(operation) in (None, quantization)}


def _unused(config: ModelConfig, quantization: str) -> tuple[str, ...]:
    """Operations of kinds of layers that a model does not have."""
    of_experts = (*_OF_EXPERTS, scheme_operations(quantization)[1])
    return (_OF_HEADS if config.mla else _OF_LATENTS) + (() if config.moe else of_experts)


def _select_kernel(operation: str, kernels: Iterable[KernelSpec], chip: str, dtype: DType) -> KernelChoice:
    candidates = sorted((k for k in kernels if k.operation == operation), key=lambda k: (-k.priority, k.name))
    obstacles = {k.name: _obstacle(k, chip, dtype) for k in candidates}
    fit = [k for k in candidates if not obstacles[k.name]]
    if not fit:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in obstacles.items())
        raise PluginError(f"no kernel for {operation} on {chip} with {dtype}: {reasons}")
    best = fit[0]
    passed = [
        f"{k.name}: {obstacles[k.name] or _outranked(k.priority, best.priority)}" for k in candidates if k != best
    ]
    fallback = best.chip == "any" and best.priority <= 0
    reason = best.description or f"priority {best.priority} on {best.chip}"
    return KernelChoice(operation, best.name, best.implementation, reason, fallback, tuple(passed))


def _select_unused(operation: str, kernels: Iterable[KernelSpec], chip: str, dtype: DType) -> KernelChoice | None:
    """What an operation would have that the model has no use for; such a one needs no kernel there."""
    try:
        choice = _select_kernel(operation, kernels, chip, dtype)
    except PluginError:
        return None
    return replace(choice, fallback=False, reason="this model does not use it")


def select_attention(
    backends: Mapping[str, AttentionBackendSpec],
    kind: Attention,
    chip: str,
    dtype: DType,
    config: ModelConfig,
    block_size: int | None,
    kv_cache_dtype: str = "auto",
) -> AttentionChoice:
    """The attention backend of a kind, for what the model keeps of a token.

    Raises:
        HardwareError: none takes the chip, dtypes, head size and block size; every obstacle is named.
    """
    of_kind = [b for b in backends.values() if b.kind == kind and b.kv_cache_dtype == kv_cache_dtype]
    candidates = sorted(of_kind, key=lambda b: (-b.priority, b.name))
    obstacles = {b.name: _backend_obstacle(b, chip, dtype, config, block_size) for b in candidates}
    # Plain torch is at home on a CPU; on an accelerator that has backends of its own it would be a silent fallback.
    if chip != "cpu" and any(b.chip == chip for b in candidates):
        obstacles |= {
            b.name: f"{chip} has backends of its own" for b in candidates if b.chip == "any" and b.priority <= 0
        }
    fit = [b for b in candidates if not obstacles[b.name]]
    if not fit:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in obstacles.items()) or "none is registered"
        stored = dtype if kv_cache_dtype == "auto" else f"{dtype} and a cache of {kv_cache_dtype}"
        raise HardwareError(f"no {kind} attention backend for {chip} with {stored}: {reasons}")
    best = fit[0]
    passed = [
        f"{b.name}: {obstacles[b.name] or _outranked(b.priority, best.priority)}" for b in candidates if b != best
    ]
    size = None if kind == "flash" else block_size or (best.block_sizes[0] if best.block_sizes else 16)
    reason = best.description or f"priority {best.priority} on {best.chip}"
    return AttentionChoice(best.name, best.implementation, size, best.prefix_caching, reason, tuple(passed), best.reads)


def _backend_obstacle(
    backend: AttentionBackendSpec, chip: str, dtype: DType, config: ModelConfig, block_size: int | None
) -> str:
    cache, head_dim = ("latent", config.mla.kv_lora_rank) if config.mla else ("heads", config.head_dim)
    if backend.cache != cache:
        return f"stores {_STORED[backend.cache]}, and this model has {_STORED[cache]}"
    obstacle = _obstacle(backend, chip, dtype)
    if not obstacle and backend.head_dims and head_dim not in backend.head_dims:
        obstacle = f"head size {head_dim} is none of {_list(backend.head_dims)}"
    if not obstacle and block_size and backend.block_sizes and block_size not in backend.block_sizes:
        obstacle = f"block size {block_size} is none of {_list(sorted(backend.block_sizes))}"
    return obstacle


def _obstacle(spec: KernelSpec | AttentionBackendSpec, chip: str, dtype: DType) -> str:
    """Why something cannot serve here; empty when it can."""
    if spec.chip not in ("any", chip):
        return f"for {spec.chip}, not {chip}"
    if dtype not in spec.dtypes:
        return f"takes {_list(spec.dtypes)}, not {dtype}"
    return unavailable(spec)


def unavailable(spec: KernelSpec | AttentionBackendSpec) -> str:
    """What this machine lacks for a kernel or backend; empty when nothing."""
    missing = [module for module in spec.requires if not is_importable(module)]
    if missing:
        return f"{', '.join(missing)} is not installed"
    return str(load_code(spec.condition)()) if spec.condition else ""


@functools.cache
def is_importable(module: str) -> bool:
    """Whether a top-level module is installed, without importing it."""
    return importlib.util.find_spec(module) is not None


def _outranked(own: int, best: int) -> str:
    return f"priority {own}, below {best}" if own < best else f"priority {own}, as the chosen one, later by name"


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
