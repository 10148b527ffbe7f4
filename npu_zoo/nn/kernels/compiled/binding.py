"""The compiled library in this process: loaded on first use, its functions called through ctypes.

Tensors are handed over as addresses, so what calls a function checks dtypes, strides and sizes before.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import ClassVar

import torch  # noqa: F401 - before the library, which takes its threads from torch's OpenMP

from npu_zoo.compiled.library import COMMAND, library_path
from npu_zoo.core.errors import HardwareError

ADDRESS, SIZE, COUNT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


@functools.cache
def load_library() -> ctypes.CDLL:
    """The library, ready to be called.

    Raises:
        HardwareError: it is not built for this machine, or cannot be loaded.
    """
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise HardwareError(
            f"the compiled kernels cannot be loaded: {error}; `{COMMAND} --force` builds them anew"
        ) from None
    if library.zoo_start():
        raise HardwareError(
            "the system does not let this process use the processor's matrix unit, for which the compiled kernels "
            f"were built; delete {path.parent} and run in an environment without a compiler to do without them"
        )
    return library


Listener = Callable[["Function", tuple[int | float | None, ...]], None]


class Function:
    """A function of the library, which is loaded when one is first called.

    Attributes:
        listener: told of every call of any function, where somebody writes calls down.

    Args:
        name: its name in C.
        arguments: their ctypes.
        result: the ctype of what it gives.
    """

    listener: ClassVar[Listener | None] = None

    def __init__(self, name: str, *arguments: type, result: type | None = None) -> None:
        self.name, self.arguments, self._result = name, arguments, result
        self._call: Callable[..., int] = self._first_call

    def __call__(self, *values: int | float | None) -> int:
        """Call it; threads of Python go on meanwhile."""
        if Function.listener is not None:
            Function.listener(self, values)
        return self._call(*values)

    def _first_call(self, *values: int | float | None) -> int:
        function = getattr(load_library(), self.name)
        function.argtypes, function.restype = self.arguments, self._result
        self._call = function
        return self._call(*values)
