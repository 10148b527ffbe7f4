"""Tensors on their way to other ranks."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_MOST_UNDER_WAY = 4


class Sends:
    """What a rank has sent and nobody may have received yet; it must stay as it is until then.

    gloo calls a send completed only once it was waited for, so the oldest is waited for when there are many. Who
    receives does so in the order of sending and waits for nothing in between, so that this ends.
    """

    def __init__(self) -> None:
        self._under_way: deque[tuple[Any, Tensor]] = deque()

    def __len__(self) -> int:
        return len(self._under_way)

    def add(self, work: Any, x: Tensor) -> None:
        """Keep one more; returns before it has arrived.

        Raises:
            RuntimeError: an earlier one did not arrive.
        """
        self._under_way.append((work, x))
        while len(self._under_way) > _MOST_UNDER_WAY or (self._under_way and self._under_way[0][0].is_completed()):
            self._under_way.popleft()[0].wait()

    def finish(self) -> None:
        """Wait until all have arrived.

        Raises:
            RuntimeError: one did not.
        """
        while self._under_way:
            self._under_way.popleft()[0].wait()
