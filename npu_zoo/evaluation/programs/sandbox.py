"""Runs programs that nobody has read, such as those a model wrote, in processes that can reach nothing.

A program runs in a process of its own which the kernel keeps from making processes and threads, from the network, from
writing any file, from reading any but those of Python, from signalling or tracing others, and from more memory and time
than it is given. Each boundary is tried when the sandbox starts; where one does not hold, no program is run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import npu_zoo
from npu_zoo.core.errors import EngineError, HardwareError, UsageError
from npu_zoo.evaluation.programs.syscalls import ARCHITECTURES
from npu_zoo.evaluation.programs.template import frame, take_frames

Status = Literal["passed", "failed", "timed out", "out of memory", "killed"]

SECONDS_TO_LEAVE = 5.0
_TEMPLATE = "import sys; sys.path[0] = sys.argv.pop(1); from npu_zoo.evaluation.programs.template import main; main()"
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


@dataclass(frozen=True)
class Limits:
    """What one program may take.

    Attributes:
        seconds: of wall time.
        cpu_seconds: of processor time, which does not pass while the machine is busy with others.
        memory: bytes of address space, over the interpreter's own.
    """

    seconds: float = 30.0
    cpu_seconds: int = 10
    memory: int = 2**30

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise UsageError(f"a program's limit of {name} is {value}; it has to be above 0")


@dataclass(frozen=True)
class Program:
    """A program, and what it is tested with.

    Attributes:
        tests: source that runs after the program in the same module; with ``entry_point``, before it and in a module of
            its own, and the function ``check`` that it defines is called with what the program has by that name.
    """

    source: str
    tests: str = ""
    entry_point: str = ""


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended.

    Attributes:
        status: ``passed`` where it and its tests ran to their end without an exception.
        message: the exception and the line of the tests that it came through, or what ended the program.
        seconds: of wall time.
        output: the first of what it printed; empty where it was ended from outside.
    """

    status: Status
    message: str
    seconds: float
    output: str = ""

    @property
    def passed(self) -> bool:
        """Whether it and its tests ran to their end."""
        return self.status == "passed"


@dataclass(frozen=True)
class Boundaries:
    """What confines programs on this machine.

    Attributes:
        landlock: the version of Landlock that says which files are read; at 0 the kernel has none, and no file can be
            opened at all, so that programs have the modules that were imported before them.
        numpy: the version that programs can import; empty where there is none.
    """

    landlock: int
    numpy: str

    def describe(self) -> str:
        """In words, for a terminal and for a record."""
        reading = "Python's own files alone can be read (Landlock)" if self.landlock else "no file can be opened"
        modules = f"the standard library and numpy {self.numpy}" if self.numpy else "the standard library"
        return (
            f"programs run in a process each, behind a filter of system calls: no network, no further process or "
            f"thread, nothing is written; {reading}; they have {modules}"
        )


class Sandbox:
    """Runs programs side by side.

    Args:
        limits: of each program.
        workers: programs at a time; the processors that this process may use, where unset.
        landlock: whether to use Landlock where the kernel has it.

    Raises:
        HardwareError: the kernel cannot confine programs here; nothing has been run.
    """

    def __init__(self, limits: Limits | None = None, workers: int | None = None, *, landlock: bool = True) -> None:
        self.limits = limits or Limits()
        self.workers = len(os.sched_getaffinity(0)) if workers is None else workers
        if self.workers < 1:
            raise UsageError(f"{workers} programs at a time; at least one has to run")
        self._landlock = landlock
        self._buffer = bytearray()
        self._sent = 0
        self._folder: Path | None = None
        self._process, self.boundaries = self._start()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: types.TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every program and the process that they are forked from; its folder goes with it."""
        process = self._process
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            process.wait(SECONDS_TO_LEAVE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._folder.rmdir()  # where its owner was killed

    def run(self, programs: Iterable[Program]) -> Generator[tuple[int, ProgramResult], None, None]:
        """Each program's number, from 0, and its result, in the order in which they end.

        Leaving the iterator early, by an interrupt for one, ends the programs that run.

        Raises:
            EngineError: the process that programs are forked from is gone.
        """
        if self._process.poll() is not None:
            self._process, self.boundaries = self._start()
        numbers: dict[int, int] = {}
        waiting = enumerate(programs)
        try:
            while True:
                for number, program in waiting:
                    numbers[self._send(program)] = number
                    if len(numbers) >= self.workers:
                        break
                if not numbers:
                    return
                for result in self._receive():
                    yield numbers.pop(result["id"]), _result(result)
        finally:
            if numbers:
                self.close()

    def run_all(
        self, programs: Iterable[Program], on_result: Callable[[int, ProgramResult], None] | None = None
    ) -> list[ProgramResult]:
        """Every program's result, in the programs' order.

        Args:
            on_result: told each program's number and result when it ends.
        """
        results: dict[int, ProgramResult] = {}
        with contextlib.closing(self.run(programs)) as ended:
            for number, result in ended:
                results[number] = result
                if on_result is not None:
                    on_result(number, result)
        return [results[number] for number in sorted(results)]

    def _start(self) -> tuple[subprocess.Popen[bytes], Boundaries]:
        self._buffer.clear()
        process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-B", "-W", "ignore", "-c", _TEMPLATE, *self._arguments()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,
        )
        try:
            self._process = process
            hello = self._hello()
        except BaseException:
            self.close()
            raise
        return process, Boundaries(landlock=hello["landlock"], numpy=hello["numpy"])

    def _arguments(self) -> list[str]:
        root = str(Path(npu_zoo.__file__).parent.parent)
        found = importlib.util.find_spec("numpy")
        numpy = str(Path(found.origin).parent) if found and found.origin else ""
        return [root, numpy, "1" if self._landlock else "0", tempfile.gettempdir()]

    def _hello(self) -> dict[str, Any]:
        try:
            hello = self._receive()[0]
        except EngineError:
            raise HardwareError("the process that programs are forked from did not start") from None
        self._folder = Path(hello["folder"])
        if hello["breach"]:
            raise HardwareError(
                f"this machine cannot confine programs, so none is run: {hello['breach']}; it takes Linux on "
                f"{' or '.join(ARCHITECTURES)} with filters of system calls (CONFIG_SECCOMP_FILTER), and a container "
                "whose own filter lets programs add theirs"
            )
        return hello

    def _send(self, program: Program) -> int:
        self._sent += 1
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(frame({"id": self._sent, **asdict(program), **asdict(self.limits)}))
            stream.flush()
        except OSError:
            raise EngineError("the process that programs are forked from has ended") from None
        return self._sent

    def _receive(self) -> list[dict[str, Any]]:
        """Wait for at least one frame."""
        stream = self._process.stdout
        assert stream is not None
        frames: list[dict[str, Any]] = []
        while not frames:
            data = os.read(stream.fileno(), 1 << 16)
            if not data:
                raise EngineError("the process that programs are forked from has ended")
            self._buffer += data
            frames = list(take_frames(self._buffer))
        return frames


def _environment() -> dict[str, str]:
    """Nothing of the user's but where shared libraries lie; programs do not see it."""
    own = {"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", **dict.fromkeys(_ONE_THREAD, "1")}
    return own | {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def _result(result: dict[str, Any]) -> ProgramResult:
    if result["status"] == "unconfined":
        raise HardwareError(f"a program could not be confined and was not run: {result['message']}")
    return ProgramResult(result["status"], result["message"], result["seconds"], result["output"])
