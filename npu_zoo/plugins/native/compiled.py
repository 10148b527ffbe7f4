"""What the zoo registers of its compiled library for CPUs."""

from __future__ import annotations

from npu_zoo.api import DType, KernelSpec

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
)
