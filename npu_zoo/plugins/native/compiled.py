"""What the zoo registers of its compiled library for CPUs."""

from __future__ import annotations

from typing import Any, Literal

from npu_zoo.api import AttentionBackendSpec, DType, KernelSpec

_CONDITION = "npu_zoo.compiled.library:obstacle"
_PRIORITY = 20
_ALL: tuple[DType, ...] = ("float32", "bfloat16", "float16")


def _kernel(operation: str, implementation: str, description: str, dtypes: tuple[DType, ...]) -> KernelSpec:
    return KernelSpec(
        name=f"compiled_{operation}",
        operation=operation,
        chip="cpu",
        dtypes=dtypes,
        implementation=f"npu_zoo.nn.kernels.compiled.{implementation}",
        priority=_PRIORITY,
        condition=_CONDITION,
        description=description,
    )


_FLOATS: tuple[DType, ...] = ("bfloat16", "float32")


def _elementwise(operation: str) -> KernelSpec:
    return _kernel(operation, f"elementwise:{operation}", "the zoo's own C++, in one pass over its values", _FLOATS)


COMPILED_KERNELS = (
    *map(
        _elementwise,
        ("rms_norm", "add_rms_norm", "silu_and_mul", "rotary_embedding", "interleaved_rotary_embedding"),
    ),
    _kernel("linear", "linear:PanelLinear", "the zoo's own C++, with the weight in panels", ("bfloat16",)),
    _kernel(
        "linear_w8a16",
        "quantized:PanelInt8Linear",
        "the zoo's own C++, with int8 codes in panels and inputs as integers of 16 bits for few rows",
        ("bfloat16",),
    ),
    _kernel(
        "linear_w4a16",
        "quantized:PanelInt4Linear",
        "the zoo's own C++, with int4 codes in panels and inputs as integers of 16 bits for few rows",
        ("bfloat16",),
    ),
    _kernel(
        "head_linear",
        "heads:head_linear",
        "the zoo's own C++, one pass over the matrices for all tokens",
        ("bfloat16",),
    ),
    _kernel("route_tokens", "experts:route_tokens", "the zoo's own C++, one call, in float32", _ALL),
    _kernel("experts", "experts:experts", "the zoo's own C++, one call, with the weights in panels", ("bfloat16",)),
    *(
        _kernel(
            f"experts_{scheme}", "code_experts:experts", "the zoo's own C++, one call for few tokens", ("bfloat16",)
        )
        for scheme in ("w8a16", "w4a16")
    ),
)


def _backend(
    name: str, kind: Literal["paged", "flash"], implementation: str, description: str, **more: Any
) -> AttentionBackendSpec:
    return AttentionBackendSpec(
        name=f"compiled_{name}",
        kind=kind,
        chip="cpu",
        dtypes=_FLOATS,
        implementation=f"npu_zoo.nn.attention.{implementation}",
        block_sizes=(64, 32, 128, 256) if kind == "paged" else (),
        prefix_caching=kind == "paged",
        priority=_PRIORITY,
        condition=_CONDITION,
        description=description,
        **more,
    )


COMPILED_BACKENDS = (
    _backend(
        "paged",
        "paged",
        "compiled:CompiledPagedAttention",
        "the zoo's own C++, over blocks of strips laid out for the processor's products",
    ),
    _backend(
        "paged_latent",
        "paged",
        "compiled_latent:CompiledLatentAttention",
        "the zoo's own C++, over latents in blocks: absorbed for few queries, expanded for prompts",
        cache="latent",
    ),
    _backend(
        "flash",
        "flash",
        "compiled:CompiledContiguousAttention",
        "the zoo's own C++, over one contiguous stretch of strips per sequence",
    ),
    _backend(
        "paged_int8",
        "paged",
        "compiled:CompiledInt8PagedAttention",
        "the zoo's own C++, over int8 keys and values in blocks, with a scale per token and head",
        kv_cache_dtype="int8",
    ),
    _backend(
        "flash_int8",
        "flash",
        "compiled:CompiledInt8ContiguousAttention",
        "the zoo's own C++, over int8 keys and values in one contiguous stretch per sequence",
        kv_cache_dtype="int8",
    ),
)
