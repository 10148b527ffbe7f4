from __future__ import annotations

import weakref
from typing import Any

import torch

from npu_zoo.core.parallel import Split
from npu_zoo.parallel.groups import Joined
from npu_zoo.parallel.sends import Sends
from npu_zoo.testing.ranks import run_ranks


class Work:
    def __init__(self, *, completed: bool) -> None:
        self.completed, self.waited = completed, False

    def is_completed(self) -> bool:
        return self.completed

    def wait(self) -> None:
        self.waited = True


def test_what_has_arrived_is_let_go() -> None:
    sends = Sends()
    for _ in range(10):
        sends.add(Work(completed=True), torch.empty(1))
        assert not len(sends)


def test_the_oldest_are_waited_for() -> None:
    sends, works = Sends(), [Work(completed=False) for _ in range(10)]
    for work in works:
        sends.add(work, torch.empty(1))
    assert len(sends) == 4
    assert [work.waited for work in works] == [True] * 6 + [False] * 4
    sends.finish()
    assert all(work.waited for work in works)


def test_a_rank_does_not_keep_what_others_have_received() -> None:
    def work(joined: Joined) -> int:
        world = joined.ranks.world
        if joined.ranks.place.rank:
            return int(sum(world.receive((3,), torch.float32, 0) for _ in range(50)).sum())  # type: ignore[union-attr]
        kept: list[Any] = []
        for _ in range(50):
            x = torch.ones(3)
            kept.append(weakref.ref(x))
            world.send(x, 1)
        del x
        return sum(one() is not None for one in kept)

    assert run_ranks(Split(pp=2), work) == [4, 150]
