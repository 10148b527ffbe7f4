"""What rows detect, in the words that most of them share: dtypes, shapes, strides, formats and values of arguments.

Each function here returns a detector: called with a call, it says what was found, or None where the call does not make
the use. An argument that is absent or None is never found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from npu_zoo.simulator.rules.table import FRACTAL_NZ, Call, Detect, format_of

Condition = Callable[[Call], bool]

FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
HALVES = (FLOAT16, BFLOAT16)
FLOATS = (FLOAT16, BFLOAT16, FLOAT32)
INT8, INT32, INT64 = torch.int8, torch.int32, torch.int64
LAST = -1


_CODES = {
    1: INT8,
    3: INT32,
    5: FLOAT16,
    6: FLOAT32,
    12: torch.qint8,
    13: torch.quint8,
    15: BFLOAT16,
    16: torch.quint4x2,
}


def dtype_named(value: Any) -> Any:
    """A dtype that is given as itself, or as the number of its ScalarType; other values as they are."""
    return _CODES.get(value, value) if isinstance(value, int) else value


def tensors_of(call: Call, name: str) -> list[torch.Tensor]:
    """The tensors of one argument: itself, or those of a list."""
    value = call.get(name)
    if isinstance(value, torch.Tensor):
        return [value]
    return [item for item in value if isinstance(item, torch.Tensor)] if isinstance(value, (list, tuple)) else []


def shape(tensor: torch.Tensor) -> str:
    """A shape as it is shown."""
    return str(tuple(tensor.shape))


def first(*detects: Detect) -> Detect:
    """What the first of several detectors finds."""
    return lambda call: next((found for detect in detects if (found := detect(call)) is not None), None)


def where(condition: Condition, detect: Detect) -> Detect:
    """A detector for calls of one kind."""
    return lambda call: detect(call) if condition(call) else None


def always(found: str) -> Detect:
    """Every call."""
    return lambda call: found


def is_given(name: str) -> Condition:
    """Whether an argument is there and not None."""
    return lambda call: call.get(name) is not None


def equals(name: str, *values: Any) -> Condition:
    """Whether an argument has one of these values."""
    return lambda call: call.get(name) in values


def has_dtype(name: str, *dtypes: torch.dtype) -> Condition:
    """Whether an argument has tensors, all of these dtypes."""
    return lambda call: bool(found := tensors_of(call, name)) and all(tensor.dtype in dtypes for tensor in found)


def given(*names: str) -> Detect:
    """An argument that is not None."""
    return lambda call: next((f"{name} is given" for name in names if call.get(name) is not None), None)


def missing(*names: str) -> Detect:
    """An argument that is None."""
    return lambda call: next((f"{name} is not given" for name in names if call.get(name) is None), None)


def only_one_of(one: str, other: str) -> Detect:
    """One argument without the other."""

    def detect(call: Call) -> str | None:
        present = [name for name in (one, other) if call.get(name) is not None]
        absent = other if present == [one] else one
        return f"{present[0]} is given and {absent} is not" if len(present) == 1 else None

    return detect


def dtype_outside(names: Iterable[str], allowed: Sequence[torch.dtype]) -> Detect:
    """A tensor of a dtype that is not among the allowed ones."""
    chosen, permitted = tuple(names), frozenset(allowed)

    def detect(call: Call) -> str | None:
        for name in chosen:
            for tensor in tensors_of(call, name):
                if tensor.dtype not in permitted:
                    return f"{name} is {tensor.dtype}, not {' or '.join(str(dtype) for dtype in allowed)}"
        return None

    return detect


def dtype_differs(reference: str, *names: str) -> Detect:
    """A tensor whose dtype is not that of another argument."""

    def detect(call: Call) -> str | None:
        expected = tensors_of(call, reference)
        for name in names:
            for tensor in tensors_of(call, name):
                if expected and tensor.dtype != expected[0].dtype:
                    return f"{name} is {tensor.dtype} where {reference} is {expected[0].dtype}"
        return None

    return detect


def rank_outside(name: str, *ranks: int) -> Detect:
    """A tensor with another number of dimensions."""

    def detect(call: Call) -> str | None:
        for tensor in tensors_of(call, name):
            if tensor.dim() not in ranks:
                return f"{name} has {tensor.dim()} dimensions {shape(tensor)}, not {' or '.join(map(str, ranks))}"
        return None

    return detect


def shape_differs(reference: str, *names: str) -> Detect:
    """A tensor whose shape is not that of another argument."""

    def detect(call: Call) -> str | None:
        expected = call.get(reference)
        for name in names:
            tensor = call.get(name)
            if tensor is not None and expected is not None and tensor.shape != expected.shape:
                return f"{name} is {shape(tensor)} where {reference} is {shape(expected)}"
        return None

    return detect


def shape_outside(name: str, *shapes: tuple[int, ...]) -> Detect:
    """A tensor of another shape."""

    def detect(call: Call) -> str | None:
        tensor = call.get(name)
        if tensor is None or tuple(tensor.shape) in shapes:
            return None
        return f"{name} is {shape(tensor)}, not {' or '.join(map(str, shapes))}"

    return detect


def size_differs(name: str, dim: int, other: str, other_dim: int) -> Detect:
    """A dimension of a tensor that is not as long as one of another tensor."""

    def detect(call: Call) -> str | None:
        one, two = call.get(name), call.get(other)
        if one is None or two is None or one.dim() < _needed(dim) or two.dim() < _needed(other_dim):
            return None
        if one.shape[dim] == two.shape[other_dim]:
            return None
        return f"{name}.size({dim}) is {one.shape[dim]} where {other}.size({other_dim}) is {two.shape[other_dim]}"

    return detect


def size_outside(name: str, dim: int, *sizes: int) -> Detect:
    """A dimension of a tensor of another length."""

    def detect(call: Call) -> str | None:
        for tensor in tensors_of(call, name):
            if tensor.dim() >= _needed(dim) and tensor.shape[dim] not in sizes:
                return f"{name}.size({dim}) is {tensor.shape[dim]}, not {' or '.join(map(str, sizes))}"
        return None

    return detect


def size_not_within(name: str, dim: int, least: int, most: float = math.inf) -> Detect:
    """A dimension of a tensor that is too short or too long."""

    def detect(call: Call) -> str | None:
        for tensor in tensors_of(call, name):
            if tensor.dim() >= _needed(dim) and not least <= tensor.shape[dim] <= most:
                return f"{name}.size({dim}) is {tensor.shape[dim]}, not in [{least}, {most}]"
        return None

    return detect


def size_not_multiple(name: str, dim: int, of: int) -> Detect:
    """A dimension of a tensor that is no multiple."""

    def detect(call: Call) -> str | None:
        for tensor in tensors_of(call, name):
            if tensor.dim() >= _needed(dim) and tensor.shape[dim] % of:
                return f"{name}.size({dim}) is {tensor.shape[dim]}, no multiple of {of}"
        return None

    return detect


def _needed(dim: int) -> int:
    return dim + 1 if dim >= 0 else -dim


def empty(*names: str) -> Detect:
    """A tensor without elements."""

    def detect(call: Call) -> str | None:
        for name in names:
            if any(tensor.numel() == 0 for tensor in tensors_of(call, name)):
                return f"{name} has no elements"
        return None

    return detect


def not_contiguous(*names: str) -> Detect:
    """A tensor that is not contiguous."""

    def detect(call: Call) -> str | None:
        for name in names:
            for tensor in tensors_of(call, name):
                if not tensor.is_contiguous():
                    return f"{name} is not contiguous: shape {shape(tensor)}, strides {tensor.stride()}"
        return None

    return detect


def fractal_nz(*names: str) -> Detect:
    """A tensor in the format FRACTAL_NZ."""

    def detect(call: Call) -> str | None:
        for name in names:
            if any(format_of(tensor) == FRACTAL_NZ for tensor in tensors_of(call, name)):
                return f"{name} is FRACTAL_NZ"
        return None

    return detect


def not_fractal_nz(*names: str) -> Detect:
    """A tensor in another format than FRACTAL_NZ."""

    def detect(call: Call) -> str | None:
        for name in names:
            for tensor in tensors_of(call, name):
                if format_of(tensor) != FRACTAL_NZ:
                    return f"{name} has the format {format_of(tensor)}, not FRACTAL_NZ"
        return None

    return detect


def value_outside(name: str, *allowed: Any) -> Detect:
    """An argument of another value."""
    return lambda call: None if call.get(name) in allowed else f"{name} is {call.get(name)!r}, not {_listed(allowed)}"


def value_not_within(name: str, least: float, most: float) -> Detect:
    """A number outside a range."""

    def detect(call: Call) -> str | None:
        value = call.get(name)
        return None if value is None or least <= value <= most else f"{name} is {value}, not in [{least}, {most}]"

    return detect


def elements_outside(name: str, least: int, most: Callable[[Call], int]) -> Detect:
    """Contents of an integer tensor outside ``[least, most(call))``."""

    def detect(call: Call) -> str | None:
        tensor = call.get(name)
        if tensor is None or tensor.numel() == 0:
            return None
        low, high, limit = int(tensor.min()), int(tensor.max()), most(call)
        if least <= low and high < limit:
            return None
        return f"{name} holds {low if low < least else high}, not in [{least}, {limit})"

    return detect


def elements_repeated(name: str, *, ignore_negative: bool = False) -> Detect:
    """Contents of an integer tensor that are not unique."""

    def detect(call: Call) -> str | None:
        tensor = call.get(name)
        if tensor is None:
            return None
        flat = tensor.flatten()
        flat = flat[flat >= 0] if ignore_negative else flat
        values, counts = flat.unique(return_counts=True)
        repeated = values[counts > 1]
        return f"{name} holds {int(repeated[0])} more than once" if repeated.numel() else None

    return detect


def elements_decrease(name: str) -> Detect:
    """Contents of a list or a one-dimensional tensor where one is less than the one before, or negative."""

    def detect(call: Call) -> str | None:
        value = call.get(name)
        if value is None:
            return None
        numbers = [0, *(value.flatten().tolist() if isinstance(value, torch.Tensor) else value)]
        for before, after in itertools.pairwise(numbers):
            if after < before:
                return f"{name} is no series of cumulative lengths: {after} comes after {before}"
        return None

    return detect


def _listed(values: Iterable[Any]) -> str:
    return " or ".join(repr(value) for value in values)
