"""When the host's memory is taken from the system, and what the C library does with what tensors have given back."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""

_NEVER = (1 << 31) - 1
_USUAL_TRIM_THRESHOLD, _USUAL_MMAP_MAX = 128 << 10, 65536


_TAKEN_AT_ONCE = 64 << 20
"""Bytes between two reports."""


def take_memory(tensors: Sequence[Tensor], progress: Callable[[int, int], None] | None = None) -> None:
    """Have the system give tensors on the host their memory, whatever they hold; it does so when a page is written.

    Where a virtual machine's host has to find the memory first, a prompt took a quarter longer that wrote to new pages.

    Args:
        progress: told the bytes that have been taken, and all of them.
    """
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    for tensor in tensors:
        pages = tensor.view(-1).view(torch.uint8)[:: mmap.PAGESIZE]
        for piece in torch.split(pages, _TAKEN_AT_ONCE // mmap.PAGESIZE):
            piece.bitwise_or_(0)
            done = min(total, done + len(piece) * mmap.PAGESIZE)
            if progress is not None:
                progress(done, total)


def keep_freed_memory() -> bool:
    """Have freed memory wait for the next tensor of this process instead of going back to the system.

    A prompt's activations are tens of megabytes a layer, which glibc maps anew for every tensor, and the first touch of
    fresh pages took a fifth of a prompt's time. Called once weights and cache have memory of their own.

    Returns:
        Whether the C library takes such advice; others than glibc are left as they are.
    """
    return _advise(_M_MMAP_MAX, 0) and _advise(_M_TRIM_THRESHOLD, _NEVER)


def return_freed_memory() -> None:
    """The opposite, as processes begin: for another model's weights, among which what was freed would lie in pieces."""
    if _advise(_M_MMAP_MAX, _USUAL_MMAP_MAX) and _advise(_M_TRIM_THRESHOLD, _USUAL_TRIM_THRESHOLD):
        ctypes.CDLL(None).malloc_trim(0)


def _advise(parameter: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(parameter, value))
