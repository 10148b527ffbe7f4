"""Memory of weights in kernels' own layouts."""

from __future__ import annotations

import platform
import re
from threading import Lock

import torch
from torch import Tensor

from npu_zoo.nn.kernels.compiled.binding import ADDRESS, SIZE, Function

_HUGE_PAGE = 2 << 20
_LINE = 64
_SLAB = 64 << 20

_huge_pages = Function("zoo_huge_pages", ADDRESS, SIZE)
_gather_pages = Function("zoo_gather_pages", ADDRESS, SIZE)


class Slabs:
    """Hands out memory that stays, one weight after the other in large pieces that huge pages can lie under.

    A weight with memory of its own would lie on small pages at both ends, which for an expert's is nearly all of it.
    What is never written takes up no memory.

    Memory is touched first on small pages where the system can gather those later (Linux 6.1): to touch a huge one
    takes milliseconds where it has to be found or is the first use of a virtual machine's memory, and weights have
    thousands.

    Args:
        gathers: whether the system can.
    """

    def __init__(self, *, gathers: bool) -> None:
        self._lock = Lock()
        self._gathers = gathers
        self._slab = self._free = torch.empty(0, dtype=torch.uint8)
        self._scattered: list[tuple[int, int]] = []

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], at the start of a cache line. A slab is released with the last of what came from it."""
        size = _filled(num_bytes, _LINE)
        with self._lock:
            if len(self._free) < size:
                self._finish()
                self._slab = self._free = self._map(max(_SLAB, _filled(size, _HUGE_PAGE)))
            taken, self._free = self._free[:num_bytes], self._free[size:]
        return taken

    def gather(self) -> int:
        """Bring what was handed out to huge pages; the bytes that are there now. Takes seconds for gigabytes.

        What was freed meanwhile is somebody else's memory or nobody's, to whom it does nothing.
        """
        with self._lock:
            self._finish()
            scattered, self._scattered = self._scattered, []
        return sum(size for address, size in scattered if _gather_pages.call_unrecorded(address, size) == 0)

    def _finish(self) -> None:
        """Hand out no more of the slab, so that what is gathered is all written."""
        used = (len(self._slab) - len(self._free)) // _HUGE_PAGE * _HUGE_PAGE
        if used and self._gathers:
            self._scattered.append((self._slab.data_ptr(), used))
        self._slab = self._free = self._slab[:0]

    def _map(self, size: int) -> Tensor:
        memory = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8)
        slab = memory[-memory.data_ptr() % _HUGE_PAGE :][:size]
        if not self._gathers:
            _huge_pages(slab.data_ptr(), size)
        return slab


def _filled(value: int, step: int) -> int:
    return -(-value // step) * step


def _system_gathers() -> bool:
    """Whether Linux has MADV_COLLAPSE."""
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    return platform.system() == "Linux" and version is not None and tuple(map(int, version.groups())) >= (6, 1)


_slabs = Slabs(gathers=_system_gathers())


def allocate(num_bytes: int) -> Tensor:
    """Memory that stays, uint8 [num_bytes], for huge pages where the system has them."""
    return _slabs.take(num_bytes)


def gather_pages() -> int:
    """See :meth:`Slabs.gather`, of all that :func:`allocate` gave."""
    return _slabs.gather()
