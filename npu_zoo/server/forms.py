"""Which forms of outputs the front end lets through to the engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import sys
from collections import OrderedDict
from dataclasses import asdict, dataclass
from functools import partial

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.errors import EngineError, UsageError
from npu_zoo.core.sampling import StructuredOutputs
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.server.admission import too_many

_PROGRAM = "npu_zoo.server.form_process"
_REMEMBERED = 256  # forms; each is as long as requests may describe one
_MOST_CHECKS = 32  # that run or wait; they come one after the other
_RETRY_S = 5.0
_SECONDS_TO_START = 60.0
_SECONDS_TO_ANSWER = 30.0  # of the clock; CPU time has a limit of its own
_SECONDS_TO_END = 1.0
_TRIES = 2
_BEYOND_LIMITS = {-signal.SIGXCPU, -signal.SIGABRT, -signal.SIGSEGV}  # of time, memory and the stack


class UncheckedForm(Exception):
    """Nothing is known of a form yet; :meth:`FormChecker.check` finds it out."""

    def __init__(self, form: StructuredOutputs) -> None:
        super().__init__(form.kind)
        self.form = form


@dataclass
class _Check:
    """A check of a form.

    Attributes:
        wanted: how many wait for it.
        begun: whether it has had its turn.
    """

    task: asyncio.Task[None]
    wanted: int = 0
    begun: bool = False


class FormChecker:
    """Knows which forms can be kept: each is tried once, in a process of its own that is started at the first of them.

    All of it belongs to one event loop but :meth:`require`, which any thread may call.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._faults: OrderedDict[StructuredOutputs, str | None] = OrderedDict()
        self._checks: dict[StructuredOutputs, _Check] = {}
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    def require(self, form: StructuredOutputs) -> None:
        """Nothing for a form that can be kept.

        Raises:
            UsageError: it cannot be.
            UncheckedForm: that is not known.
        """
        try:
            fault = self._faults[form]
        except KeyError:
            raise UncheckedForm(form) from None
        if fault is not None:
            raise UsageError(fault)

    async def check(self, form: StructuredOutputs) -> None:
        """Find out about a form.

        A check that has begun goes on where its caller is cancelled; one that nobody waits for any more does not begin.

        Raises:
            ApiError: 429 where too many forms wait to be checked.
            EngineError: the process cannot be started.
        """
        check = self._checks.get(form) or self._new_check(form)
        check.wanted += 1
        try:
            await asyncio.shield(check.task)
        finally:
            check.wanted -= 1
            if not check.wanted and not check.begun:
                check.task.cancel()
                self._forget(form, check.task)

    async def close(self) -> None:
        """End the process."""
        checks = [check.task for check in self._checks.values()]
        for task in checks:
            task.cancel()
        await asyncio.gather(*checks, return_exceptions=True)
        await self._end()

    def _new_check(self, form: StructuredOutputs) -> _Check:
        if len(self._checks) >= _MOST_CHECKS:
            message = f"{len(self._checks)} forms of outputs wait to be checked"
            raise too_many(message, code="queue_full", retry_after=_RETRY_S)
        check = self._checks[form] = _Check(asyncio.create_task(self._check(form)))
        check.task.add_done_callback(partial(self._forget, form))
        return check

    def _forget(self, form: StructuredOutputs, task: asyncio.Task[None]) -> None:
        if form in self._checks and self._checks[form].task is task:
            del self._checks[form]
        if task.done() and not task.cancelled():
            task.exception()  # who waited for it has it

    async def _check(self, form: StructuredOutputs) -> None:
        async with self._turn:
            self._checks[form].begun = True
            self._faults[form] = await self._fault(form)
            if len(self._faults) > _REMEMBERED:
                self._faults.popitem(last=False)

    async def _fault(self, form: StructuredOutputs) -> str | None:
        question = json.dumps(asdict(form)).encode() + b"\n"
        for _ in range(_TRIES):
            answer = await _ask(await self._running(), question, _SECONDS_TO_ANSWER)
            if answer:
                fault: str | None = json.loads(answer)
                return fault
            if await self._end() in _BEYOND_LIMITS:
                break  # else the end may have had another reason
        return (
            f"structured_outputs.{form.kind} cannot be used: it takes too much time or memory to compile; simplify it"
        )

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            self._process = await _start()
            if not await _ask(self._process, pickle.dumps(self._config), _SECONDS_TO_START):
                await self._end()
                raise EngineError("the process that checks forms of outputs cannot be started")
        return self._process

    async def _end(self) -> int:
        """End the process; the exit code is that of its own end where it came first."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None
        process.stdin.close()
        try:
            return await asyncio.wait_for(process.wait(), _SECONDS_TO_END)
        except asyncio.TimeoutError:
            process.kill()
            return await process.wait()


class FrontEndEncoder(PromptEncoder):
    """Makes prompts, and leaves forms of outputs to a :class:`FormChecker`."""

    def __init__(self, config: EngineConfig, forms: FormChecker) -> None:
        super().__init__(config)
        self._forms = forms

    def check_form(self, form: StructuredOutputs) -> None:
        """As :meth:`FormChecker.require`."""
        self._forms.require(form)


async def _start() -> asyncio.subprocess.Process:
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []  # the working directory is not where to import from
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *safe_path,
        "-m",
        _PROGRAM,
        str(os.getpid()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,  # out of reach of the terminal's Ctrl-C
    )


async def _ask(process: asyncio.subprocess.Process, question: bytes, seconds: float) -> bytes:
    """A line of answer; empty where the process ends, or takes longer."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
        process.stdin.write(question)
        return await asyncio.wait_for(process.stdout.readline(), seconds)
    return b""
