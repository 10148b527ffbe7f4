"""Memory of weights in kernels' own layouts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

from npu_zoo.nn.kernels.compiled.binding import ADDRESS, SIZE, Function, load_library

_HUGE_PAGE = 2 << 20
_LINE = 64
_SLAB = 64 << 20

_huge_pages = Function("zoo_huge_pages", ADDRESS, SIZE)


class Slabs:
    """Hands out memory that stays, one weight after the other in large pieces of whole huge pages.

    A weight with memory of its own would lie on small pages at both ends, which for an expert's is nearly all of it.
    What is never written takes up no memory.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], at the start of a cache line. A slab is released with the last of what came from it."""
        size = _filled(num_bytes, _LINE)
        with self._lock:
            if len(self._free) < size:
                self._free = self._map(max(_SLAB, _filled(size, _HUGE_PAGE)))
            taken, self._free = self._free[:num_bytes], self._free[size:]
        return taken

    @staticmethod
    def _map(size: int) -> Tensor:
        memory = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8)
        slab = memory[-memory.data_ptr() % _HUGE_PAGE :][:size]
        _huge_pages(slab.data_ptr(), size)
        return slab


def _filled(value: int, step: int) -> int:
    return -(-value // step) * step


_slabs = Slabs()


def allocate(num_bytes: int) -> Tensor:
    """Memory that stays, uint8 [num_bytes], in huge pages where the system has them."""
    return _slabs.take(num_bytes)


def move_to_huge_pages(mapped: Tensor, offset: int = 0) -> int:
    """Put mapped memory that is only read on huge pages of this process where it lies on small ones, at its address.

    Files have large pages where memory was in one piece when they were written or read, and not where it was not; small
    ones cost a sixth of the bandwidth. Others may read the memory meanwhile. Its last part, of less than a page, stays.

    Args:
        mapped: uint8 [bytes], which stays mapped.
        offset: what lies before it has been seen to.

    Returns:
        The offset to go on from, after 4 MiB that were moved, or a part in 8,192; the number of bytes where nothing is
        left.
    """
    return _mover()(mapped.data_ptr(), len(mapped), offset)


@functools.cache
def _mover() -> Callable[..., int]:
    """Not as other functions of the library: its thread runs while other engines' calls are recorded."""
    function = load_library().zoo_move_to_huge_pages
    function.argtypes, function.restype = (ADDRESS, SIZE, SIZE), SIZE
    return function
