"""Checks of forms: one after the other, no more than may wait, and none that nobody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.errors import UsageError
from npu_zoo.core.sampling import StructuredOutputs
from npu_zoo.protocol.errors import ApiError
from npu_zoo.server.forms import FormChecker, UncheckedForm


def form(number: int) -> StructuredOutputs:
    return StructuredOutputs(regex=f"a{{{number}}}")


class HeldChecker(FormChecker):
    """Has its answers as soon as a test says so."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.tried: list[StructuredOutputs] = []
        self.go = asyncio.Event()

    async def _fault(self, form: StructuredOutputs) -> str | None:
        self.tried.append(form)
        await self.go.wait()
        return None


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def waiting(checker: FormChecker, numbers: range) -> list[asyncio.Task[None]]:
    return [asyncio.create_task(checker.check(form(number))) for number in numbers]


def test_what_nobody_waits_for_is_not_checked(config: EngineConfig) -> None:
    async def run() -> None:
        checker = HeldChecker(config)
        first, given_up, shared, shared_too = waiting(checker, range(3)) + waiting(checker, range(2, 3))
        await until(lambda: checker.tried)
        for task in (first, given_up, shared):
            task.cancel()
        await asyncio.wait({first, given_up, shared})
        again = asyncio.create_task(checker.check(form(3)))
        checker.go.set()
        await asyncio.gather(shared_too, again)
        assert checker.tried == [form(0), form(2), form(3)]
        checker.require(form(0))  # it had begun
        with pytest.raises(UncheckedForm):
            checker.require(form(1))
        await checker.close()

    asyncio.run(run())


def test_a_form_that_was_given_up_can_be_asked_for_anew(config: EngineConfig) -> None:
    async def run() -> None:
        checker = HeldChecker(config)
        first, given_up = waiting(checker, range(2))
        await until(lambda: checker.tried)
        given_up.cancel()
        await asyncio.sleep(0)
        anew = asyncio.create_task(checker.check(form(1)))
        checker.go.set()
        await asyncio.gather(first, anew)
        assert given_up.cancelled()
        checker.require(form(1))
        await checker.close()

    asyncio.run(run())


def test_no_more_checks_wait_than_may(config: EngineConfig) -> None:
    async def run() -> None:
        checker = HeldChecker(config)
        tasks = waiting(checker, range(32))
        await until(lambda: checker.tried)
        with pytest.raises(ApiError, match="32 forms") as refused:
            await checker.check(form(32))
        assert (refused.value.status, refused.value.code) == (429, "queue_full")
        same = asyncio.create_task(checker.check(form(31)))
        checker.go.set()
        await asyncio.gather(*tasks, same)
        await checker.check(form(32))
        checker.require(form(32))
        await checker.close()

    asyncio.run(run())


def test_a_form_that_cannot_be_kept_is_known_from_then_on(config: EngineConfig) -> None:
    async def run() -> None:
        checker = FormChecker(config)
        broken = StructuredOutputs(regex="(")
        with pytest.raises(UncheckedForm):
            checker.require(broken)
        await checker.check(broken)
        with pytest.raises(UsageError, match="regex"):
            checker.require(broken)
        await checker.close()

    asyncio.run(run())
