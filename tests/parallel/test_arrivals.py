from __future__ import annotations

import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.errors import WorkerError
from npu_zoo.parallel.arrivals import announce_arrival, collective_timeout, missing_ranks


class MemoryStore:
    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()

    def add(self, key: str, amount: int, /) -> int:
        self.counters[key] += amount
        return self.counters[key]


class SilentStore:
    def add(self, key: str, amount: int, /) -> int:
        raise ConnectionError("broken pipe")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=16))
def test_those_behind_the_furthest_are_missing(steps: list[int]) -> None:
    store = MemoryStore()
    for rank, step in enumerate(steps):
        assert [announce_arrival(store, "tp", rank) for _ in range(step)] == list(range(1, step + 1))
    expected = list(range(len(steps))) if max(steps) == 0 else [r for r, s in enumerate(steps) if s != max(steps)]
    assert missing_ranks(store, "tp", len(steps)) == expected
    assert missing_ranks(store, "tp", len(steps)) == expected  # asking changes nothing
    assert len(store.counters) == len(steps)


def test_groups_do_not_meet() -> None:
    store = MemoryStore()
    announce_arrival(store, "tp", 1)
    assert missing_ranks(store, "tp", 2) == [0]
    assert missing_ranks(store, "pp", 2) == [0, 1]


def test_the_message_names_the_missing_ranks() -> None:
    store = MemoryStore()
    for rank in (0, 1, 3):
        announce_arrival(store, "tp", rank)
    error = collective_timeout(store, "tp", 5, 90)
    assert isinstance(error, WorkerError)
    assert error.rank == 2
    assert str(error).startswith(
        "a collective operation was not done within 90 s (its time-out): rank 2, 4 of 5 did not"
    )


def test_the_message_where_all_arrived() -> None:
    store = MemoryStore()
    for rank in range(2):
        announce_arrival(store, "tp", rank)
    error = collective_timeout(store, "tp", 2, 0.5)
    assert error.rank is None
    assert "all 2 ranks came to it" in str(error)


def test_a_store_that_is_gone_is_part_of_the_message() -> None:
    assert "the store of rank 0 does not answer" in str(collective_timeout(SilentStore(), "tp", 2, 1))


def test_torch_s_store_fits() -> None:
    distributed = pytest.importorskip("torch.distributed")
    stores = [distributed.TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False)]
    stores += [distributed.TCPStore("127.0.0.1", stores[0].port, 3, wait_for_workers=False) for _ in range(2)]
    for _ in range(2):
        threads = [threading.Thread(target=announce_arrival, args=(stores[rank], "tp", rank)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert missing_ranks(stores[2], "tp", 3) == []
    announce_arrival(stores[0], "tp", 0)
    announce_arrival(stores[1], "tp", 1)
    assert missing_ranks(stores[0], "tp", 3) == [2]
    assert collective_timeout(stores[1], "tp", 3, 30).rank == 2
