"""Ranks that are threads of one process, over real groups: several ranks without several processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

from npu_zoo.core.parallel import Split
from npu_zoo.parallel.groups import LOOPBACK, Host, Joined, join, lead_store, open_store

T = TypeVar("T")

_TIMEOUT = timedelta(seconds=120)


def run_ranks(split: Split, work: Callable[[Joined], T]) -> list[T]:
    """Run a function on every rank of a split, each in a thread with its groups.

    Returns:
        What each gave, by rank.

    Raises:
        Exception: the first that a rank raised.
    """
    store = lead_store(0, split.world_size, _TIMEOUT)
    kept: list[Joined] = []  # a group that is gone takes with it what another rank has yet to receive
    failures: list[BaseException] = []

    def rank(number: int) -> T:
        client = open_store(store.port, split.world_size, _TIMEOUT)
        joined = join(client, split.place(number), Host(number, split.world_size, LOOPBACK), _TIMEOUT)
        kept.append(joined)
        try:
            return work(joined)
        except BaseException as error:
            failures.append(error)
            joined.abort()  # or the others would wait for it
            raise

    with ThreadPoolExecutor(split.world_size) as pool:
        futures = [pool.submit(rank, number) for number in range(split.world_size)]
    if failures:
        raise failures[0]
    for joined in kept:
        joined.close()
    return [future.result() for future in futures]
