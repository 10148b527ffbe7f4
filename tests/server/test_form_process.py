"""The process that forms of outputs are tried in: what it says, what ends it, and what its end means."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.errors import EngineError, UsageError
from npu_zoo.core.sampling import StructuredOutputs
from npu_zoo.server import forms
from npu_zoo.server.forms import FormChecker, UncheckedForm

GOOD = StructuredOutputs(regex="[a-f]+")
WRONG = StructuredOutputs(regex="(")
DOUBLED = "start: T14\nT0: /a*/\n" + "\n".join(f"T{n}: T{n - 1} T{n - 1}" for n in range(1, 15))
TOO_MUCH = StructuredOutputs(grammar=DOUBLED)


@asynccontextmanager
async def checking(config: EngineConfig) -> AsyncIterator[FormChecker]:
    checker = FormChecker(config)
    try:
        yield checker
    finally:
        await checker.close()


def run(config: EngineConfig, act: Callable[[FormChecker], Awaitable[None]]) -> None:
    async def main() -> None:
        async with checking(config) as checker:
            await act(checker)

    asyncio.run(main())
    assert not processes()


def processes() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if "npu_zoo.server.form_process" in child.cmdline()]


def test_forms_are_tried_once(config: EngineConfig) -> None:
    async def act(checker: FormChecker) -> None:
        for form in (GOOD, WRONG):
            with pytest.raises(UncheckedForm) as caught:
                checker.require(form)
            assert caught.value.form == form
        assert not processes()
        await asyncio.gather(*(checker.check(form) for form in (GOOD, WRONG, GOOD)))
        checker.require(GOOD)
        with pytest.raises(UsageError, match=r"structured_outputs\.regex cannot be used: .*unclosed group"):
            checker.require(WRONG)
        assert len(processes()) == 1

    run(config, act)


def test_a_form_that_takes_too_much_ends_the_process_alone(config: EngineConfig) -> None:
    async def act(checker: FormChecker) -> None:
        await asyncio.gather(checker.check(TOO_MUCH), checker.check(GOOD))
        with pytest.raises(UsageError, match="too much time or memory"):
            checker.require(TOO_MUCH)
        checker.require(GOOD)

    run(config, act)


def test_an_end_that_is_not_the_forms_fault(config: EngineConfig) -> None:
    async def act(checker: FormChecker) -> None:
        await checker.check(GOOD)
        (process,) = processes()
        process.kill()
        other = StructuredOutputs(choice=("a", "b"))
        await checker.check(other)
        checker.require(other)

    run(config, act)


def test_who_gives_up_waiting_takes_nothing_from_others(config: EngineConfig) -> None:
    async def act(checker: FormChecker) -> None:
        hasty = asyncio.create_task(checker.check(GOOD))
        patient = asyncio.create_task(checker.check(GOOD))
        await asyncio.sleep(0)
        hasty.cancel()
        await patient
        checker.require(GOOD)

    run(config, act)


def test_a_process_that_hangs_is_ended(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_SECONDS_TO_ANSWER", 0.2)
    monkeypatch.setattr(forms, "_SECONDS_TO_END", 0.1)

    async def act(checker: FormChecker) -> None:
        await checker.check(GOOD)
        (process,) = processes()
        os.kill(process.pid, signal.SIGSTOP)
        await checker.check(WRONG)
        assert process.pid not in [other.pid for other in processes()]
        with pytest.raises(UsageError, match="unclosed group"):
            checker.require(WRONG)

    run(config, act)


def test_a_process_that_cannot_be_started(
    config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "_PROGRAM", "npu_zoo.server.no_such_program")

    async def act(checker: FormChecker) -> None:
        with pytest.raises(EngineError, match="cannot be started"):
            await checker.check(GOOD)
        with pytest.raises(UncheckedForm):
            checker.require(GOOD)

    run(config, act)


def test_few_forms_are_remembered(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_REMEMBERED", 3)

    async def act(checker: FormChecker) -> None:
        several = [StructuredOutputs(regex=f"a{{{number}}}") for number in range(1, 6)]
        for form in several:
            await checker.check(form)
        for form in several[-3:]:
            checker.require(form)
        with pytest.raises(UncheckedForm):
            checker.require(several[0])

    run(config, act)
