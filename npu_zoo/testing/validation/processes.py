"""Judges claims: those of data here, those that run a plugin's code in processes that may hang or end without harm."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import contextlib
import importlib
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import npu_zoo
from npu_zoo.core.errors import HardwareError
from npu_zoo.parallel.worker import die_with_parent
from npu_zoo.platforms.detection import available_memory
from npu_zoo.registry import registry_in_place
from npu_zoo.selection import is_importable
from npu_zoo.testing.validation.claims import Claim, Outcome, error_text
from npu_zoo.testing.validation.scope import validation_registry
from npu_zoo.testing.validation.simulate import ENVIRONMENT, VARIABLE

_MEMORY_OF_A_JOB = 3 << 29
"""Bytes that a process with torch and a few tiny models may take."""

_VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # without CANN torch_npu breaks `import torch`
}


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
    apart = [(number, claim) for number, claim in enumerate(claims) if claim.apart]
    if apart and not is_importable("pebble"):
        raise HardwareError("claims that run code need pebble: pip install 'npu-zoo[testing]'")
    for number, claim in enumerate(claims):
        if not claim.apart:
            yield number, claim.judge()
    for product in dict.fromkeys(claim.simulates for _, claim in apart):
        environment = {VARIABLE: product, **ENVIRONMENT} if product else {}
        of_product = [(number, claim) for number, claim in apart if claim.simulates == product]
        yield from _judge_apart(of_product, limits, environment)


def _judge_apart(
    claims: list[tuple[int, Claim]], limits: Limits, environment: Mapping[str, str]
) -> Iterator[tuple[int, Outcome]]:
    """Judge in pools until each claim is: a process that ends between two claims takes its pool along."""
    waiting = dict(claims)
    with tempfile.TemporaryDirectory(prefix="npu-zoo-validate-", ignore_cleanup_errors=True) as scratch:
        variables = {**_VARIABLES, **environment, "TMPDIR": scratch}  # a process that is killed leaves its files behind
        while waiting:
            before = len(waiting)
            with environment_of_children(variables), contextlib.closing(_judge_in_pool(waiting, limits)) as judged:
                for number, outcome in judged:
                    del waiting[number]
                    yield number, outcome
            if len(waiting) == before:
                yield from ((number, _unjudged(claim)) for number, claim in waiting.items())
                return


def _judge_in_pool(waiting: Mapping[int, Claim], limits: Limits) -> Generator[tuple[int, Outcome], None, None]:
    """The outcomes of all claims, or of those that were judged before the pool broke."""
    from pebble import ProcessPool

    context = multiprocessing.get_context("spawn")
    # The simulated runtime reserves whole devices' address space, which the limit would count.
    simulates = any(claim.simulates for claim in waiting.values())
    share = None if simulates else max(_MEMORY_OF_A_JOB, available_memory() // limits.jobs)
    heavy = any(claim.level != "spec" for claim in waiting.values())
    workers = min(limits.jobs, len(waiting))
    pool: Any = ProcessPool(workers, initializer=prepare, initargs=(share, os.getpid(), heavy), context=context)
    try:
        futures: dict[concurrent.futures.Future[Outcome], int] = {}
        for number, claim in waiting.items():
            futures[pool.schedule(_judge, args=[claim], timeout=limits.timeout)] = number
        for future in concurrent.futures.as_completed(futures):
            number = futures[future]
            outcome = _outcome(future, waiting[number], limits)
            if outcome is not None:
                yield number, outcome
    finally:
        pool.stop()
        pool.join()


def _unjudged(claim: Claim) -> Outcome:
    message = "it was not judged: processes end before they are given a claim, see what they say above"
    return Outcome.of(claim, "fails", message, begin=time.monotonic())


def _judge(claim: Claim) -> Outcome:
    """Judge in a process of its own, where even what ends a process is the claim's failure alone."""
    begin = time.monotonic()
    try:
        return claim.judge()
    except BaseException as error:
        return Outcome.of(claim, "fails", error_text(error), begin=begin)


def prepare(memory: int | None, parent: int, heavy: bool) -> None:
    """Make a process ready to judge: what plugins print goes to stderr, and no claim takes more than its memory.

    Args:
        memory: the most bytes of data that the process may have; None sets no limit.
        parent: the process that started it, with which it ends.
        heavy: whether models are built; what that takes is imported now, and not within the time of a claim.
    """
    die_with_parent(parent)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    if memory is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    with contextlib.suppress(RuntimeError):  # a claim that needs the simulated runtime says why it is not there
        npu_zoo.simulate()
    if heavy and is_importable("torch"):
        for module in ("npu_zoo.engine.llm", "transformers"):
            importlib.import_module(module)
    _kept.enter_context(registry_in_place(validation_registry()))


_kept = contextlib.ExitStack()


def _outcome(future: concurrent.futures.Future[Outcome], claim: Claim, limits: Limits) -> Outcome | None:
    """What came of a claim; None where its pool broke before it was judged."""
    from pebble import ProcessExpired

    begin = time.monotonic()
    try:
        return future.result()
    except concurrent.futures.TimeoutError:
        message = f"it did not come back within {limits.timeout:g} s, or ended its process with code 0"
        return Outcome.of(claim, "fails", message, begin=begin - limits.timeout)
    except ProcessExpired as error:
        return Outcome.of(claim, "fails", f"its process ended: {_ending(error.exitcode)}", begin=begin)
    except (concurrent.futures.process.BrokenProcessPool, concurrent.futures.CancelledError):
        return None
    except Exception as error:  # the claim or its outcome does not travel between processes
        return Outcome.of(claim, "fails", f"it cannot be judged elsewhere: {error_text(error)}", begin=begin)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


@contextlib.contextmanager
def environment_of_children(changes: Mapping[str, str]) -> Iterator[None]:
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
