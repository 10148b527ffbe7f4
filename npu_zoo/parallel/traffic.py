"""What a rank gives to its groups' operations, counted, and which of them it waits in."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Traffic:
    """Counts by ``group:operation``; a captured graph's replays are not seen.

    Attributes:
        calls: how often.
        bytes: of the tensors that the rank gave, or received; how often a byte travels is up to the operation's
            algorithm.
        waiting: the operation that the rank is in, such as ``all_reduce of group tp``; None while it computes.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    waiting: str | None = None

    @contextlib.contextmanager
    def operation(self, group: str, name: str, x: Tensor) -> Iterator[None]:
        """One operation, for as long as the rank waits for it."""
        self.calls[f"{group}:{name}"] += 1
        self.bytes[f"{group}:{name}"] += x.nbytes
        self.waiting = f"{name} of group {group}"
        yield
        # Not after an error, whose message is to tell it.
        self.waiting = None
