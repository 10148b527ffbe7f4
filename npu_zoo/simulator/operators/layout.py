"""Storage layouts: FRACTAL_NZ tensors hold the same values, and say of themselves what they are."""

from __future__ import annotations

import torch

from npu_zoo.simulator.errors import NoSemantics
from npu_zoo.simulator.golden import golden
from npu_zoo.simulator.memory import DeviceMemory

REASON = "its kernel moves bytes into a layout that the simulated memory does not have"


@golden(
    "npu::npu_format_cast", "npu::_npu_format_cast", "npu::_npu_format_cast.aclnn", "npu::_npu_format_cast.input_dtype",
    on_device=True, native=False, reason=REASON, launch="Cast",
)  # fmt: skip
def npu_format_cast(
    memory: DeviceMemory,
    input: torch.Tensor,
    acl_format: int,
    customize_dtype: int | None = None,
    input_dtype: int | None = None,
) -> torch.Tensor:
    """A copy in another format. torch_npu pads its storage, and allocates ND where internal formats are not allowed.

    Source: op-plugin, （beta）torch_npu-npu_format_cast.md.
    """
    import torch_npu

    if customize_dtype is not None or input_dtype is not None:
        raise NoSemantics("npu_format_cast: arguments customize_dtype and input_dtype have no golden semantics")
    if torch_npu.get_npu_format(input) == acl_format:
        return input
    output: torch.Tensor = torch_npu.empty_with_format(
        tuple(input.shape), dtype=input.dtype, device=input.device, acl_format=acl_format
    )
    memory.view(output).copy_(memory.view(input))
    return output


@golden("npu::npu_format_cast_.acl_format", on_device=True, native=False, reason=REASON, launch="Cast")
def npu_format_cast_in_place(
    memory: DeviceMemory,
    input: torch.Tensor,
    acl_format: int,
    customize_dtype: int | None = None,
    input_dtype: int | None = None,
) -> torch.Tensor:
    """The tensor gets a storage in the other format; what shares its old one keeps that.

    Source: op-plugin, （beta）torch_npu-npu_format_cast_.md. What a tensor instead of a format means is not modelled:
    the page takes its format, the kernel its values.
    """
    cast = npu_format_cast(memory, input, acl_format, customize_dtype, input_dtype)
    if cast is not input:
        input.set_(cast.untyped_storage(), cast.storage_offset(), cast.shape, cast.stride())
    return input
