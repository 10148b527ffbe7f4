"""Norms, rotations and activations in bfloat16 and float32; in float32 inside, rounded where the reference rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_zoo.nn.kernels.compiled.binding import ADDRESS, COUNT, FLOAT, SIZE, Function

_Functions = dict[torch.dtype, Function]


def _functions(name: str, *arguments: type) -> _Functions:
    """A function's two forms, by dtype."""
    return {
        dtype: Function(f"zoo_{name}_{str(dtype).removeprefix('torch.')}", *arguments)
        for dtype in (torch.bfloat16, torch.float32)
    }


_HEADS = (ADDRESS, SIZE, SIZE, SIZE)
_rms_norm = _functions("rms_norm", ADDRESS, SIZE, ADDRESS, SIZE, SIZE, FLOAT, ADDRESS, COUNT)
_add_rms_norm = _functions("add_rms_norm", *[ADDRESS] * 3, SIZE, SIZE, FLOAT, ADDRESS, ADDRESS, COUNT)
_silu_and_mul = _functions("silu_and_mul", ADDRESS, SIZE, SIZE, ADDRESS, COUNT)
_rotary = _functions("rotary", *_HEADS, *_HEADS, ADDRESS, ADDRESS, SIZE, SIZE, ADDRESS, ADDRESS, COUNT)
_interleaved = _functions("interleaved_rotary", *_HEADS, ADDRESS, ADDRESS, SIZE, SIZE, ADDRESS, COUNT)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`npu_zoo.nn.kernels.reference.rms_norm`."""
    width = x.shape[-1]
    rows = _rows(x) if x.dim() == 2 else x.contiguous()
    out = x.new_empty(x.shape)
    _rms_norm[x.dtype](
        rows.data_ptr(),
        rows.stride(0) if rows.dim() == 2 else width,
        weight.data_ptr(),
        x.numel() // width,
        width,
        eps,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`npu_zoo.nn.kernels.reference.add_rms_norm`."""
    x, residual, width = x.contiguous(), residual.contiguous(), x.shape[-1]
    out, total = x.new_empty(x.shape), x.new_empty(x.shape)
    _add_rms_norm[x.dtype](
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        x.numel() // width,
        width,
        eps,
        out.data_ptr(),
        total.data_ptr(),
        torch.get_num_threads(),
    )
    return out, total


def silu_and_mul(x: Tensor) -> Tensor:
    """See :func:`npu_zoo.nn.kernels.reference.silu_and_mul`."""
    x, width = x.contiguous(), x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    _silu_and_mul[x.dtype](x.data_ptr(), x.numel() // (2 * width), width, out.data_ptr(), torch.get_num_threads())
    return out


def rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`npu_zoo.nn.kernels.reference.rotary_embedding`."""
    outs = query.new_empty(query.shape), key.new_empty(key.shape)
    query, key, cos, sin = _rows(query), _rows(key), cos.contiguous(), sin.contiguous()
    _rotary[query.dtype](
        *_heads(query),
        *_heads(key),
        cos.data_ptr(),
        sin.data_ptr(),
        len(query),
        query.shape[2] // 2,
        outs[0].data_ptr(),
        outs[1].data_ptr(),
        torch.get_num_threads(),
    )
    return outs


def interleaved_rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`npu_zoo.nn.kernels.reference.interleaved_rotary_embedding`."""
    out = x.new_empty(x.shape)
    x, cos, sin = _rows(x), cos.contiguous(), sin.contiguous()
    _interleaved[x.dtype](
        *_heads(x),
        cos.data_ptr(),
        sin.data_ptr(),
        len(x),
        x.shape[2] // 2,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _rows(x: Tensor) -> Tensor:
    """A tensor each of whose rows is contiguous, as those of a projection's parts are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    """[T, heads, D] as the library takes it: address, strides and the number of heads."""
    return x.data_ptr(), x.stride(0), x.stride(1), x.shape[1]
