"""Operations of several ranks that are not done in time, and which ranks did not come to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from npu_zoo.core.errors import WorkerError


class Missing(NamedTuple):
    """A rank that others wait for.

    Attributes:
        rank, host: which it is, and where it runs.
        stage: what it does, such as ``computing a step``.
        position: the line that its main thread is at; empty where it is not known.
    """

    rank: int
    host: str
    stage: str
    position: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class CollectiveTimeout(WorkerError):
    """An operation that several ranks do together was not done in time.

    A rank raises it without knowing who is missing; rank 0's process knows, by the ranks' heartbeats.

    Args:
        operation: such as ``all_reduce of group tp``.
        timeout: seconds.
        ranks: those of the group; empty for all.
        missing: those that did not come to it; None where nobody was asked.
    """

    def __init__(
        self, operation: str, timeout: float, ranks: Sequence[int] = (), missing: Sequence[Missing] | None = None
    ) -> None:
        begin = f"{operation} was not done within {timeout:g} s (--collective-timeout)"
        first = missing[0] if missing else None
        super().__init__(begin + _describe(missing), first.rank if first else None, first.host if first else "")
        self.operation = operation
        self.timeout = timeout
        self.ranks = tuple(ranks)
        self.missing = missing

    def __reduce__(self) -> tuple[type[CollectiveTimeout], tuple[object, ...]]:
        return type(self), (self.operation, self.timeout, self.ranks, self.missing)


def _describe(missing: Sequence[Missing] | None) -> str:
    if missing is None:
        return ""
    if not missing:
        return ": all ranks came to it; one of them or the network is stuck inside, or it needs more time"
    names = ", ".join(map(str, missing))
    places = [f"it is at {found.position or repr(found.stage)}" for found in missing]
    if len(missing) > 1:
        places = [f"rank {found.rank} is at {found.position or repr(found.stage)}" for found in missing]
    return f": {names} did not come to it; {', '.join(places)}"
