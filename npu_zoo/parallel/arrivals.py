"""Which ranks came to a collective operation: told by a key-value store after a time-out.

Each rank counts up a key of its own before it enters a step. After a time-out the counters say who is behind. The
store keeps one key per rank, however many steps there are.
"""

from __future__ import annotations

from typing import Protocol

from npu_zoo.core.errors import WorkerError


class Store(Protocol):
    """What is needed of a key-value store that all ranks share; torch.distributed's TCPStore has it."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter, which begins at 0, and return the sum; must not wait for other ranks."""
        ...


def announce_arrival(store: Store, key: str, rank: int) -> int:
    """Tell that a rank has come to its next step; returns the number of the step, from 1."""
    return store.add(_counter(key, rank), 1)


def missing_ranks(store: Store, key: str, world_size: int) -> list[int]:
    """The ranks that are behind the furthest one; all of them where none has ever arrived.

    Args:
        store: shared by all ranks.
        key: what :func:`announce_arrival` was given.
        world_size: ranks in all.
    """
    steps = [store.add(_counter(key, rank), 0) for rank in range(world_size)]
    furthest = max(steps, default=0)
    return [rank for rank, step in enumerate(steps) if step < furthest or not furthest]


def collective_timeout(store: Store, key: str, world_size: int, timeout: float) -> WorkerError:
    """The error to raise where a collective operation took longer than ``timeout`` seconds; it names who is missing.

    It never raises itself: a store that cannot be asked is part of the message.
    """
    begin = f"a collective operation was not done within {timeout:g} s (its time-out)"
    try:
        missing = missing_ranks(store, key, world_size)
    except Exception as error:  # torch's stores raise their own kinds
        return WorkerError(f"{begin}, and the store of rank 0 does not answer, so rank 0 or its host is gone: {error}")
    if not missing:
        return WorkerError(f"{begin}, though all {world_size} ranks came to it; a rank or the network is stuck inside")
    ranks = ", ".join(map(str, missing))
    return WorkerError(
        f"{begin}: rank {ranks} of {world_size} did not come to it; "
        "look there for the first error, or give it more time",
        missing[0],
    )


def _counter(key: str, rank: int) -> str:
    return f"{key}/{rank}"
