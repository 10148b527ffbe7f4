"""What the C library does with memory that tensors on the host have given back."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""

_NEVER = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Have freed memory wait for the next tensor of this process instead of going back to the system.

    A prompt's activations are tens of megabytes a layer, which glibc maps anew for every tensor, and the first touch of
    fresh pages took a fifth of a prompt's time. Called once weights and cache have memory of their own.

    Returns:
        Whether the C library takes such advice; others than glibc are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
