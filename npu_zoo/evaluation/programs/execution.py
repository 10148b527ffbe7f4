"""Runs one program and its tests in this process, which is confined, and reports how that ended.

What it needs afterwards it holds before the program runs, since a program may rebind whatever it can name.
"""

from __future__ import annotations

import builtins
import io
import os
import random
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

PROGRAM, TESTS = "<program>", "<tests>"
MESSAGE_LENGTH = 1000
OUTPUT_LENGTH = 4000


class Report(NamedTuple):
    """How a program ended, as it says itself: ``status`` is ``passed``, ``failed`` or ``out of memory``."""

    status: str
    message: str


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


def run_and_report(source: str, tests: str, token: int, channel: int) -> None:
    """Run a program, then its tests in the same module, and end the process.

    Args:
        token: a descriptor with the secret that a report begins with; it is read when the tests have ended.
        channel: the descriptor that the report goes to.
    """
    leave, read, write = os._exit, os.read, os.write
    output = OutputStart()
    execute = _executor(output)
    report = execute(source, tests)
    secret = read(token, 64)
    parts = (report.status, report.message[:MESSAGE_LENGTH], output.kept.decode("utf-8", "replace"))
    write(channel, secret + b"\0".join(part.replace("\0", "").encode("utf-8", "replace") for part in parts))
    leave(0)


def _executor(output: OutputStart) -> Callable[[str, str], Report]:
    """What runs a program; the program can change the names of modules, and this has its own."""
    names = dict(builtins.__dict__)
    restore = _restorer(names)
    describe = _describe

    def execute(source: str, tests: str) -> Report:
        module = _fresh_module(output)
        try:
            exec(compile(source, PROGRAM, "exec", dont_inherit=True), module.__dict__)
            restore()
            exec(compile(tests, TESTS, "exec", dont_inherit=True), module.__dict__)
            return Report("passed", "")
        except MemoryError:
            status, message = "out of memory", "MemoryError"
        except BaseException as error:
            restore()
            status, message = "failed", describe(error, tests)
        restore()
        return Report(status, message)

    return execute


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
    line = _line_of_tests(error, tests)
    return f"{text[: MESSAGE_LENGTH // 2]} at: {line}" if line else text


def _line_of_tests(error: BaseException, tests: str) -> str:
    number, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == TESTS:
            number = trace.tb_lineno
        trace = trace.tb_next
    lines = tests.splitlines()
    return lines[number - 1].strip()[: MESSAGE_LENGTH // 4] if 0 < number <= len(lines) else ""
