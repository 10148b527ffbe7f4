"""What the zoo registers of its compiled library for CPUs."""

from __future__ import annotations

from npu_zoo.api import DType, KernelSpec

_CONDITION = "npu_zoo.compiled.library:obstacle"
_PRIORITY = 20


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


COMPILED_KERNELS = (
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
)
