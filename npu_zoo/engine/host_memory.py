"""What the C library does with memory that tensors on the host have given back."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""

_NEVER = (1 << 31) - 1
_USUAL_TRIM_THRESHOLD, _USUAL_MMAP_MAX = 128 << 10, 65536


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
