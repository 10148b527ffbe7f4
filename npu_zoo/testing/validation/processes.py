"""Judges claims: those of data here, those that run a plugin's code in processes that may hang or end without harm."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import npu_zoo
from npu_zoo.core.errors import HardwareError
from npu_zoo.platforms.detection import available_memory
from npu_zoo.registry import registry_in_place
from npu_zoo.selection import is_importable
from npu_zoo.testing.validation.claims import Claim, Outcome
from npu_zoo.testing.validation.scope import validation_registry
from npu_zoo.testing.validation.simulate import ENVIRONMENT, VARIABLE

_MEMORY_OF_A_JOB = 3 << 29
"""Bytes that a process with torch and a few tiny models may take."""

_THREADS = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Limits:
    """What validation may take of the machine.

    Attributes:
        jobs: processes at once.
        timeout: seconds for one claim.
    """

    jobs: int
    timeout: float = 300.0

    @classmethod
    def of_machine(cls, jobs: int | None = None, timeout: float | None = None) -> Limits:
        """As many processes as there are cores, as far as memory goes."""
        fitting = max(1, available_memory() // _MEMORY_OF_A_JOB)
        return cls(jobs or min(len(os.sched_getaffinity(0)), fitting), timeout or cls.timeout)


def judge(claims: Sequence[Claim], limits: Limits) -> Iterator[tuple[int, Outcome]]:
    """Each claim's place in the sequence with its outcome, as they come in.

    Raises:
        HardwareError: processes are needed, and what runs them is not installed.
    """
    for number, claim in enumerate(claims):
        if not claim.apart:
            yield number, claim.judge()
    apart = [(number, claim) for number, claim in enumerate(claims) if claim.apart]
    for product in dict.fromkeys(claim.simulates for _, claim in apart):
        environment = {VARIABLE: product, **ENVIRONMENT} if product else {}
        of_product = [(number, claim) for number, claim in apart if claim.simulates == product]
        yield from _judge_apart(of_product, limits, environment)


def _judge_apart(
    claims: list[tuple[int, Claim]], limits: Limits, environment: Mapping[str, str]
) -> Iterator[tuple[int, Outcome]]:
    if not is_importable("pebble"):
        raise HardwareError("claims that run code need pebble: pip install 'npu-zoo[testing]'; --level spec runs none")
    from pebble import ProcessPool

    # The simulated runtime reserves whole devices' address space, which the limit would count.
    share = None if VARIABLE in environment else available_memory() // limits.jobs
    context = multiprocessing.get_context("spawn")
    with _variables({**_THREADS, **environment}):
        pool: Any = ProcessPool(min(limits.jobs, len(claims)), initializer=prepare, initargs=(share,), context=context)
        try:
            waiting: dict[concurrent.futures.Future[Outcome], tuple[int, Claim]] = {}
            for number, claim in claims:
                waiting[pool.schedule(_judge, args=[claim], timeout=limits.timeout)] = (number, claim)
            for future in concurrent.futures.as_completed(waiting):
                number, claim = waiting[future]
                yield number, _outcome(future, claim, limits)
            pool.close()
        finally:
            pool.stop()
            pool.join()


def _judge(claim: Claim) -> Outcome:
    return claim.judge()


def prepare(memory: int | None) -> None:
    """Make a process ready to judge: what plugins print goes to stderr, and no claim takes more than its memory.

    Args:
        memory: bytes; None sets no limit.
    """
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    if memory is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    with contextlib.suppress(RuntimeError):  # a claim that needs the simulated runtime says why it is not there
        npu_zoo.simulate()
    _kept.enter_context(registry_in_place(validation_registry()))


_kept = contextlib.ExitStack()


def _outcome(future: concurrent.futures.Future[Outcome], claim: Claim, limits: Limits) -> Outcome:
    from pebble import ProcessExpired

    begin = time.monotonic()
    try:
        return future.result()
    except concurrent.futures.TimeoutError:
        message = f"it did not come back within {limits.timeout:g} s, and its process was ended"
        return Outcome.of(claim, "fails", message, begin=begin - limits.timeout)
    except ProcessExpired as error:
        return Outcome.of(claim, "fails", f"its process ended: {_ending(error.exitcode)}", begin=begin)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


@contextlib.contextmanager
def _variables(changes: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that processes started meanwhile have."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
