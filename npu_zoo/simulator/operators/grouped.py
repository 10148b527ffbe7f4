"""Products of groups of rows with a weight each: the experts of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from npu_zoo.simulator.errors import NoSemantics
from npu_zoo.simulator.golden import golden
from npu_zoo.simulator.operators.quantization import (
    dequantized,
    dtype_of,
    integer_codes,
    quantize_rows,
    scale_values,
)

COUNTS, KEY_VALUE = 1, 2
Tensors = Sequence[torch.Tensor]


def group_sizes(group_list: Sequence[Any], kind: int, groups: int) -> list[int]:
    """Rows of each group, of a list that is cumulative, of counts, or of (group, count) pairs."""
    if kind == KEY_VALUE:
        sizes = [0] * groups
        for group, count in group_list:
            sizes[group] += count
        return sizes
    if kind == COUNTS:
        return list(group_list)
    return [end - start for start, end in zip([0, *group_list[:-1]], group_list, strict=True)]


@golden("npu::npu_grouped_matmul", "npu::npu_grouped_matmul.List")
def npu_grouped_matmul(
    x: Tensors,
    weight: Tensors,
    bias: Tensors | None = None,
    scale: Tensors | None = None,
    offset: Tensors | None = None,
    antiquant_scale: Tensors | None = None,
    antiquant_offset: Tensors | None = None,
    per_token_scale: Tensors | None = None,
    group_list: torch.Tensor | Sequence[int] | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    act_type: int = 0,
    tuning_config: Sequence[int] | None = None,
    output_dtype: int | torch.dtype | None = None,
    **unsupported: object,
) -> list[torch.Tensor]:
    """Each group of rows times its weight [K, N]. Source: op-plugin, torch_npu-npu_grouped_matmul.md."""
    given = sorted(name for name, value in unsupported.items() if value)
    if given or act_type or offset or group_type not in (None, -1, 0):
        raise NoSemantics(
            f"npu_grouped_matmul: arguments {given or 'act_type, offset, group_type'} have no golden semantics"
        )
    weights = [matrix for w in weight for matrix in (w if w.dim() == 3 else [w])]
    inputs = _split(x, group_list, group_list_type, len(weights))
    per_expert = {
        "bias": _each(bias, len(weights)),
        "scale": _each(scale, len(weights)),
        "antiquant_scale": _each(antiquant_scale, len(weights)),
        "antiquant_offset": _each(antiquant_offset, len(weights)),
        "per_token_scale": _split(per_token_scale, group_list, group_list_type, len(weights)),
    }
    default = torch.int8 if x[0].dtype is torch.int8 else x[0].dtype
    target = dtype_of("npu_grouped_matmul", output_dtype, default)
    outputs = [
        _product(rows, matrix, target, **{name: values[i] for name, values in per_expert.items()})
        for i, (rows, matrix) in enumerate(zip(inputs, weights, strict=True))
    ]
    if split_item not in (2, 3):
        return outputs
    whole = torch.cat(outputs)
    rows = sum(part.shape[0] for part in x)
    if whole.shape[0] < rows:  # rows after the last group belong to nobody
        whole = torch.cat([whole, torch.zeros(rows - whole.shape[0], whole.shape[1], dtype=whole.dtype)])
    return [whole]


def _split(parts: Tensors | None, group_list: Any, kind: int, groups: int) -> list[Any]:
    if not parts:
        return [None] * groups
    if len(parts) > 1 or group_list is None:
        return list(parts)
    values = group_list.tolist() if isinstance(group_list, torch.Tensor) else list(group_list)
    sizes = group_sizes(values, kind, groups)
    return list(torch.split(parts[0][: sum(sizes)], sizes))


def _each(parts: Tensors | None, groups: int) -> list[Any]:
    """One entry per group: of a list, or of one tensor whose first dimension is the groups."""
    if not parts:
        return [None] * groups
    if len(parts) != groups or (groups == 1 and parts[0].dim() == 3):
        return list(parts[0])
    return list(parts)


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.dtype,
    *,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    antiquant_scale: torch.Tensor | None,
    antiquant_offset: torch.Tensor | None,
    per_token_scale: torch.Tensor | None,
) -> torch.Tensor:
    if antiquant_scale is not None:
        product = x.double() @ dequantized(weight, antiquant_scale, antiquant_offset).double()
    else:
        product = integer_codes(x).double() @ integer_codes(weight).double()
    if bias is not None and bias.dtype is torch.int32:
        product, bias = product + bias, None
    if scale is not None:
        product = product * scale_values(scale).double()
    if per_token_scale is not None:
        product = product * per_token_scale.double()[:, None]
    product = product if bias is None else product + bias.double()
    return product.round().clamp(-128, 127).to(target) if target is torch.int8 else product.to(target)


@golden("npu::npu_quant_grouped_matmul_dequant")
def npu_quant_grouped_matmul_dequant(
    x: torch.Tensor,
    quantized_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_list: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    x_offset: torch.Tensor | None = None,
    smooth_scale: torch.Tensor | None = None,
    quant_mode: str = "pertoken",
) -> torch.Tensor:
    """Rows are quantised, multiplied with int8 weights [E, N, K] and scaled back; cumulative groups.

    Source: op-plugin, torch_npu-npu_quant_grouped_matmul_dequant.md.
    """
    if quant_mode != "pertoken" or any(v is not None for v in (bias, x_scale, x_offset, smooth_scale)):
        raise NoSemantics("npu_quant_grouped_matmul_dequant: only quant_mode='pertoken' alone has golden semantics")
    codes, scales = quantize_rows(x)
    output = torch.zeros(x.shape[0], quantized_weight.shape[1])
    start = 0
    for expert, end in enumerate(group_list.tolist()):
        product = codes[start:end].double() @ quantized_weight[expert].double().t()
        scaled = product * weight_scale[expert].double() * scales[start:end].double()[:, None]
        output[start:end] = scaled.float()
        start = end
    return output.to(x.dtype)
