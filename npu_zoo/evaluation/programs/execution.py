"""Runs one program and its tests in this process, which is confined, and reports how that ended.

What it needs afterwards it holds before the program runs, since a program may rebind whatever it can name.
"""

from __future__ import annotations

import builtins
import io
import mmap
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

PROGRAM, TESTS = "<program>", "<tests>"
MESSAGE_LENGTH = 1000
OUTPUT_LENGTH = 4000
RESERVE = 8 << 20

_traceback_of = BaseException.__dict__["__traceback__"].__get__  # an exception's class may have another


class Job(NamedTuple):
    """A program to run; the fields are those of :class:`npu_zoo.evaluation.programs.sandbox.Program`."""

    source: str
    tests: str
    entry_point: str


class OutputStart(io.RawIOBase):
    """Keeps the first bytes that are written and drops the rest."""

    def __init__(self, length: int = OUTPUT_LENGTH) -> None:
        self.kept = b""
        self._length = length

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: Any) -> int:
        """Take all of it."""
        room = self._length - len(self.kept)
        if room > 0:
            self.kept += bytes(data[:room])
        return len(data)


def set_aside() -> mmap.mmap:
    """Room that a report is made in where a program leaves none; to be taken before memory is limited."""
    return mmap.mmap(-1, RESERVE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def run_and_report(job: Job, token: int, channel: int, reserve: mmap.mmap) -> None:
    """Run a program and its tests and end the process.

    Whatever leaves this function by an exception is the program's doing.

    Args:
        token: a descriptor with the secret that a report begins with; it is read when the tests have ended.
        channel: the descriptor that the report goes to.
        reserve: of :func:`set_aside`.
    """
    output = OutputStart()
    restore, describe = _restorer(dict(builtins.__dict__)), _describe
    finish = _reporter(output, token, channel)
    try:
        _run(job, _fresh_module(output), restore)
        status, message = "passed", ""
        reserve.close()
    except MemoryError:
        reserve.close()
        status, message = "out of memory", "MemoryError"
    except BaseException as error:
        reserve.close()
        restore()
        status, message = "failed", describe(error, job.tests)
    restore()
    finish(status, message)


def _run(job: Job, module: types.ModuleType, restore: Callable[[], None]) -> None:
    execute, names = exec, module.__dict__
    tests = compile(job.tests, TESTS, "exec", dont_inherit=True)
    prepared = _prepared(tests) if job.entry_point else {}
    execute(compile(job.source, PROGRAM, "exec", dont_inherit=True), names)
    restore()
    if not job.entry_point:
        execute(tests, names)
    elif job.entry_point in names:
        prepared["check"](names[job.entry_point])
    else:
        raise NameError(f"name {job.entry_point!r} is not defined")


def _reporter(output: OutputStart, token: int, channel: int) -> Callable[[str, str], None]:
    """What hands over a report and ends the process, with the functions that this takes."""
    leave, read, write = os._exit, os.read, os.write

    def finish(status: str, message: str) -> None:
        parts = (status, message[:MESSAGE_LENGTH], output.kept.decode("utf-8", "replace"))
        report = b"\0".join(part.replace("\0", "").encode("utf-8", "replace") for part in parts)
        write(channel, read(token, 64) + report)
        leave(0)

    return finish


def _prepared(code: types.CodeType) -> dict[str, Any]:
    """The names that tests define in a module of their own, with builtins and modules that are copies."""
    find = _importer()
    for name in _names_of(code):
        if name in sys.modules:
            find(name)
    names: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins.__dict__ | {"__import__": find}}
    exec(code, names)
    return names


def _importer() -> Callable[..., types.ModuleType]:
    """An ``__import__`` that gives copies of modules as they were when they were first asked for."""
    find, make = builtins.__import__, types.ModuleType
    copies: dict[str, types.ModuleType] = {}

    def find_copy(*asked: Any, **more: Any) -> types.ModuleType:
        module = find(*asked, **more)
        name = module.__name__
        if name not in copies:
            copies[name] = make(name)
            copies[name].__dict__.update(module.__dict__)
        return copies[name]

    return find_copy


def _names_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)


def _restorer(names: dict[str, Any]) -> Callable[[], None]:
    clear, update, there = dict.clear, dict.update, builtins.__dict__

    def restore() -> None:
        clear(there)
        update(there, names)

    return restore


def _fresh_module(output: OutputStart) -> types.ModuleType:
    """A module for the program to be, with a process around it that looks new."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    sys.argv = ["program.py"]
    os.environ.clear()
    random.seed(0)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(0)
    sys.stdin = io.StringIO()
    sys.stdout = sys.stderr = io.TextIOWrapper(output, encoding="utf-8", errors="replace", write_through=True)
    return module


def _describe(error: BaseException, tests: str) -> str:
    """An exception's type and text, and the line of the tests that it came through; its own code may do anything."""
    try:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
    except BaseException:
        text = "an exception that cannot be shown"
    try:
        line = _line_of_tests(error, tests)
    except BaseException:
        line = ""
    return f"{text[: MESSAGE_LENGTH // 2]} at: {line}" if line else text


def _line_of_tests(error: BaseException, tests: str) -> str:
    number, trace = 0, _traceback_of(error)
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == TESTS:
            number = trace.tb_lineno
        trace = trace.tb_next
    lines = tests.split("\n")
    return lines[number - 1].strip()[: MESSAGE_LENGTH // 4] if 0 < number <= len(lines) else ""
