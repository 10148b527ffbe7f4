"""The numbers of a sequence's blocks, in memory that arrays see without a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

_FIRST = 8


class BlockTable(Sequence[int]):
    """A list of block numbers that grows and shrinks at its end.

    ``numpy.asarray`` of it is a view: a step looks at the blocks of a long sequence without going through them. A view
    shows what was there when it was taken, for as long as its numbers are not given up.
    """

    __slots__ = ("_length", "_numbers")

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        plain = numbers if isinstance(numbers, np.ndarray) else list(numbers)
        given: NDArray[np.int32] = np.array(plain, dtype=np.int32)
        self._length = len(given)
        self._numbers: NDArray[np.int32] = np.concatenate([given, np.empty(_FIRST, dtype=np.int32)])

    def append(self, number: int) -> None:
        """Add a block at the end."""
        if self._length == len(self._numbers):
            # Into a new array, so that views of the old one stay what they are.
            self._numbers = np.concatenate([self._numbers, np.empty_like(self._numbers)])
        self._numbers[self._length] = number
        self._length += 1

    def pop(self) -> int:
        """Take the last block away.

        Raises:
            IndexError: there is none.
        """
        last = self[-1]
        self._length -= 1
        return last

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> BlockTable: ...

    def __getitem__(self, index: int | slice) -> int | BlockTable:
        held = self._numbers[: self._length]
        return BlockTable(held[index]) if isinstance(index, slice) else int(held[index])

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers[: self._length].tolist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self._numbers[: self._length], dtype=dtype, copy=copy)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Callable[[bytes], BlockTable], tuple[bytes]]:
        # As bytes: a step of many sequences sends as many tables, and an array takes ten times as long.
        return _from_bytes, (self._numbers[: self._length].tobytes(),)

    def __repr__(self) -> str:
        return f"BlockTable({list(self)})"


def _from_bytes(numbers: bytes) -> BlockTable:
    return BlockTable(np.frombuffer(numbers, dtype=np.int32))
