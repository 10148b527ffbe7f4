"""Binds the kernels that were chosen for a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from npu_zoo.core.config import KernelChoice
from npu_zoo.core.errors import PluginError, WeightsError
from npu_zoo.nn.routing import Routing
from npu_zoo.registry import load_code

Stored = Any
"""A weight as its kernel stores it: a tensor, or what a kernel of quantized weights makes of one."""


class LinearKernel(Protocol):
    """A matrix product with a weight in the kernel's own layout; see :class:`npu_zoo.nn.kernels.reference.Linear`.

    One that can compute a whole SwiGLU feed-forward has ``feed_forward(x, gate_up, down)``, with both stored weights;
    one that can give its sums as they are, ``apply_in_float32(x, packed)``. For one whose layout may be kept in a file,
    see :func:`packed_parts`; kernels of quantized weights may have the same.
    """

    def packs(self, dtype: torch.dtype) -> bool:
        """Whether the stored form is another one than the weight."""

    def pack(self, weight: Tensor) -> Stored:
        """The stored form of a [out, in] weight."""

    def apply(self, x: Tensor, packed: Any) -> Tensor:
        """[..., in] to [..., out]."""


def pack_parts(kernel: LinearKernel, parts: Sequence[Tensor]) -> Stored:
    """The stored form of a weight whose rows lie in several tensors, one after the other.

    A kernel that need not have them in one place has ``pack_parts(parts)``.
    """
    own: Callable[[Sequence[Tensor]], Stored] | None = getattr(kernel, "pack_parts", None)
    if own is not None:
        return own(parts)
    return kernel.pack(parts[0] if len(parts) == 1 else torch.cat(list(parts)))


def packed_parts(kernel: object, packed: Stored) -> Mapping[str, Tensor]:
    """The tensors that a stored weight consists of, by name; none where it cannot be kept in a file.

    A kernel whose stored weights can has ``packed_parts(packed)``, and ``from_packed_parts(parts, channels, inputs)``
    for the way back. Every tensor fills whole cache lines.
    """
    own: Callable[[Stored], Mapping[str, Tensor]] | None = getattr(kernel, "packed_parts", None)
    return {} if own is None else own(packed)


def from_packed_parts(kernel: object, parts: Mapping[str, Tensor], channels: int, inputs: int) -> Stored:
    """The stored form of a [channels, inputs] weight of what :func:`packed_parts` gave, which lies elsewhere now.

    Raises:
        WeightsError: the parts are not such a weight's.
    """
    own: Callable[[Mapping[str, Tensor], int, int], Stored] | None = getattr(kernel, "from_packed_parts", None)
    if own is None:
        raise WeightsError(f"{kernel} takes no weights that were laid out before")
    return own(parts, channels, inputs)


class Product(Protocol):
    """What multiplies with a stored weight: a kernel of plain or of quantized weights."""

    def apply(self, x: Tensor, packed: Any) -> Tensor:
        """[..., in] to [..., out]."""


def apply_parts(kernel: Product, x: Tensor, packed: Stored, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
    """[T, in] times a stacked weight, as one [T, rows] for each of its parts.

    A kernel whose operators want them apart, each contiguous, has ``apply_parts(x, packed, rows)``.
    """
    own: Callable[[Tensor, Stored, tuple[int, ...]], tuple[Tensor, ...]] | None = getattr(kernel, "apply_parts", None)
    return torch.split(kernel.apply(x, packed), list(rows), -1) if own is None else own(x, packed, rows)


class ExpertsKernel(Protocol):
    """The routed experts' feed-forward; see :func:`npu_zoo.nn.kernels.reference.experts`."""

    def __call__(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate_up: Sequence[Stored] | Stored,
        down: Sequence[Stored] | Stored,
        linear: Product,
        silu_and_mul: Callable[[Tensor], Tensor],
        elsewhere: bool = False,
    ) -> Tensor:
        """[T, hidden] to [T, hidden].

        Where ``elsewhere`` is set, the id after the last expert stands for experts of other ranks: they add nothing.

        A kernel that takes the experts' weights as one has ``stack(weights)``, and is given what it made. One that can
        compute the shared experts along has ``with_shared(stacked, shared)`` too, which makes of both stacks and of the
        shared experts' two weights the stacks that it is to be given, or None where it cannot. With
        quantized weights ``linear`` is their kernel, and the operation is ``experts_w8a16`` for w8a16 and so on.
        """


class RotaryKernel(Protocol):
    """A rotation; see :func:`npu_zoo.nn.kernels.reference.rotary_embedding`.

    One that takes its tables in another form has ``tables(cos, sin)``, which makes them of [positions, rotary_dim / 2].
    """

    def __call__(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [T, heads, rotary_dim], turned by the tables' rows of their positions."""


def rotary_tables(kernel: object, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables of all positions in the form that a rotary kernel takes."""
    tables: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = getattr(kernel, "tables", None)
    return (cos, sin) if tables is None else tables(cos, sin)


TopKTopP = Callable[[Tensor, Sequence[int], Sequence[float]], Tensor]
"""See :func:`npu_zoo.nn.kernels.reference.top_k_top_p`."""


@dataclass(frozen=True)
class Kernels:
    """One implementation per operation; signatures are those of :mod:`npu_zoo.nn.kernels.reference`.

    ``more`` holds operations beyond the shared ones, by name: those that the family's ``operations`` name, and those of
    its quantized layers.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rotary_embedding: RotaryKernel
    interleaved_rotary_embedding: Callable[[Tensor, Tensor, Tensor], Tensor]
    head_linear: Callable[[Tensor, Tensor], Tensor]
    silu_and_mul: Callable[[Tensor], Tensor]
    linear: LinearKernel
    route_tokens: Callable[[Tensor, Tensor | None, Routing], tuple[Tensor, Tensor]]
    experts: ExpertsKernel
    top_k_top_p: TopKTopP
    more: Mapping[str, Any]


class _More(dict[str, Any]):
    """Operations by name; a missing one is a fault of the plugin that calls it."""

    def __missing__(self, name: str) -> Any:
        raise PluginError(f"the model calls the operation {name}, which its family's spec does not name in operations")


def bind_kernels(choices: Iterable[KernelChoice]) -> Kernels:
    """Import what was chosen.

    Raises:
        PluginError: a kernel cannot be imported, or a shared operation has none.
    """
    bound = {choice.operation: load_code(choice.implementation) for choice in choices}
    shared = [name for name in Kernels.__dataclass_fields__ if name != "more"]
    missing = [name for name in shared if name not in bound]
    if missing:
        raise PluginError(f"no plugin registers a kernel for {', '.join(missing)}; is the native plugin loaded?")
    return Kernels(**{name: bound.pop(name) for name in shared}, more=_More(bound))
