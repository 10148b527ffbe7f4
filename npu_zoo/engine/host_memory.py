"""What the C library does with memory that tensors on the host have given back."""

from __future__ import annotations

import ctypes
import os
import sys
from threading import Thread, Timer, get_native_id

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""

_NEVER = (1 << 31) - 1
_GATHERING_DELAY = 0.2
"""Seconds, in which the first token is on its way."""

_GATHERING_NICENESS = 10
"""A tenth of a core that steps need too, and all of one that nothing does."""

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


def gather_weights_later() -> Thread:
    """Bring weights of the compiled kernels to huge pages in the background, soon after this.

    Called once the first step is computed: reading weights is a fifth faster from huge pages, but the first token does
    not wait for them. See :class:`npu_zoo.nn.kernels.compiled.memory.Slabs`.
    """
    timer = Timer(_GATHERING_DELAY, _gather)
    timer.daemon = True
    timer.start()
    return timer


def _gather() -> None:
    from npu_zoo.nn.kernels.compiled.memory import gather_pages

    if sys.platform.startswith("linux"):  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, get_native_id(), _GATHERING_NICENESS)
    gather_pages()


def _advise(parameter: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(parameter, value))
