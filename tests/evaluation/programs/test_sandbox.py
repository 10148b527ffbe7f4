from __future__ import annotations

import os
import platform
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from npu_zoo.core.errors import EngineError, HardwareError, UsageError
from npu_zoo.evaluation.programs import template
from npu_zoo.evaluation.programs.sandbox import Limits, Program, ProgramResult, Sandbox

from .hostile import FOREIGN_CALL, PROGRAMS

TESTS = "assert answer() == 42"
RIGHT = Program("def answer(): return 42", TESTS)
ENDLESS = Program("while True: pass")
SHORT = Limits(seconds=1.5, cpu_seconds=2, memory=2**27)
SECRET = "the user's own words"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SHORT, workers=4) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def treasure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("user") / "treasure.txt"
    file.write_text(SECRET)
    file.chmod(0o666)
    return file


@pytest.fixture(scope="module")
def hostile(sandbox: Sandbox, treasure: Path) -> dict[str, ProgramResult]:
    """How all of the hostile programs ended that were run side by side, by their names."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        sources = [one.source.format(treasure=str(treasure), port=port) for one in PROGRAMS.values()]
        results = sandbox.run_all(Program(source, TESTS) for source in sources)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    return dict(zip(PROGRAMS, results, strict=True))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_program_is_contained(hostile: dict[str, ProgramResult], name: str) -> None:
    expected, result = PROGRAMS[name], hostile[name]
    assert result.status == expected.status or (expected.status == "any" and result.status != "passed")
    assert expected.message in result.message
    assert len(result.output) <= 4000
    assert SECRET not in result.output + result.message


def test_hostile_programs_leave_nothing_behind(
    hostile: dict[str, ProgramResult], sandbox: Sandbox, treasure: Path
) -> None:
    assert len(hostile) == len(PROGRAMS)
    assert descendants(sandbox) == []
    assert [path.name for path in treasure.parent.iterdir()] == ["treasure.txt"]
    assert treasure.read_text() == SECRET
    assert treasure.stat().st_mode & 0o777 == 0o666
    assert sandbox.run_all([RIGHT])[0].passed


def test_calls_of_another_architecture_end_the_program(sandbox: Sandbox) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("i386's calls are those of x86-64")
    result = sandbox.run_all([Program(FOREIGN_CALL)])[0]
    assert (result.status, result.message) == ("killed", "it was ended by SIGSYS before its tests had ended")


def test_processor_time_is_limited_by_itself() -> None:
    with Sandbox(Limits(seconds=60, cpu_seconds=1), workers=1) as sandbox:
        result = sandbox.run_all([ENDLESS])[0]
    assert (result.status, result.message) == ("timed out", "it took more than 1 s of processor time")


def test_without_landlock_no_file_is_opened(treasure: Path) -> None:
    names = ["reads a user's file", "appends", "passwords", "environment", "parent's memory", "home"]
    sources = [PROGRAMS[name].source.format(treasure=str(treasure)) for name in names]
    uses = "import math, re, collections, heapq, itertools, random, hashlib\nimport numpy as np\n"
    uses += "def answer(): return int(np.random.default_rng(0).integers(42, 43)) + 'x'.encode('utf-16').count(b'y')"
    with Sandbox(SHORT, landlock=False) as sandbox:
        assert sandbox.boundaries.landlock == 0
        assert "no file can be opened" in sandbox.boundaries.describe()
        results = sandbox.run_all([Program(uses, TESTS), *(Program(source) for source in sources)])
    assert results[0] == ProgramResult("passed", "", results[0].seconds)
    assert all(result.status == "failed" for result in results[1:])
    assert all("PermissionError" in result.message for result in results[1:-1])  # a folder's list has names alone


def test_what_a_program_finds(sandbox: Sandbox) -> None:
    source = textwrap.dedent("""
    from __future__ import annotations
    import dataclasses, os, pickle, sys, wave

    @dataclasses.dataclass
    class Point:
        x: int
        y: list[int] = dataclasses.field(default_factory=list)

    assert dict(os.environ) == {} and os.listdir() == [] and sys.stdin.read() == "" and os.read(0, 1) == b""
    assert pickle.loads(pickle.dumps(Point(1))) == Point(1)
    assert __name__ != "__main__"
    print("seen", file=sys.stderr)
    """)
    assert sandbox.run_all([Program(source)])[0] == ProgramResult("passed", "", pytest.approx(0, abs=2), "seen\n")


def test_draws_come_again(sandbox: Sandbox) -> None:
    program = Program("import random, numpy\nprint(random.random(), numpy.random.rand(), hash('x'))")
    first, second = sandbox.run_all([program, program])
    assert first.output == second.output != ""


def test_results_name_their_programs(sandbox: Sandbox) -> None:
    programs = [Program(f"def answer(): return {n}", TESTS) for n in range(38, 46)]
    seen: list[int] = []
    results = sandbox.run_all(programs, on_result=lambda number, _: seen.append(number))
    assert [result.passed for result in results] == [n == 42 for n in range(38, 46)]
    assert sorted(seen) == list(range(8))


def test_many_programs_at_a_time() -> None:
    programs = [Program(f"import time; time.sleep(0.1)\nanswer = lambda: {40 + n % 4}", TESTS) for n in range(80)]
    with Sandbox(Limits(seconds=60), workers=80) as sandbox:
        assert [result.passed for result in sandbox.run_all(programs)] == [n % 4 == 2 for n in range(80)]


def test_large_programs_and_many_results_do_not_block(sandbox: Sandbox) -> None:
    large = Program("x = '" + "y" * 2_000_000 + "'\nprint('z' * 9999)\nassert False, 'w' * 9999")
    results = sandbox.run_all([large] * 12)
    assert {(result.status, len(result.output)) for result in results} == {("failed", 4000)}


@pytest.mark.parametrize("interrupt", ["callback", "leaving"])
def test_an_interrupt_ends_all_programs(interrupt: str) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with Sandbox(Limits(seconds=60, cpu_seconds=60), workers=3) as sandbox:
        folder = sandbox_folder(sandbox)
        processes = [sandbox_process(sandbox)]
        if interrupt == "callback":
            with pytest.raises(KeyboardInterrupt):
                sandbox.run_all([ENDLESS, RIGHT, ENDLESS], on_result=stop)
        else:
            running = sandbox.run([ENDLESS, RIGHT, ENDLESS])
            next(running)
            processes += descendants(sandbox)
            assert len(processes) == 3
            running.close()
        assert gone(processes)
        assert not folder.exists()
        assert sandbox.run_all([RIGHT])[0].passed


def test_programs_end_with_a_process_that_is_killed() -> None:
    script = """
import sys
from npu_zoo.evaluation.programs.sandbox import Limits, Program, Sandbox
sandbox = Sandbox(Limits(seconds=60, cpu_seconds=60), workers=2)
running = sandbox.run([Program("while True: pass"), Program(""), Program("while True: pass")])
next(running)
print("running", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"running\n"
        processes = psutil.Process(parent.pid).children(recursive=True)
        assert len(processes) >= 2
        parent.kill()
    assert gone(processes)


def test_a_template_that_dies_is_an_error_and_takes_its_programs_along() -> None:
    with Sandbox(Limits(seconds=60, cpu_seconds=60), workers=2) as sandbox:
        running = sandbox.run([RIGHT, ENDLESS, ENDLESS])
        next(running)
        processes, folder = descendants(sandbox), sandbox_folder(sandbox)
        assert processes
        sandbox_process(sandbox).send_signal(signal.SIGKILL)
        with pytest.raises(EngineError, match="has ended"):
            next(running)
        assert gone(processes)
        assert not folder.exists()


def test_a_template_that_does_not_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(template.__file__).parents[3])
    monkeypatch.setattr(Sandbox, "_arguments", lambda _: [root, "", "0", "/no/such/folder"])
    with pytest.raises(HardwareError, match="did not start"):
        Sandbox(SHORT)


def test_boundaries_that_do_not_hold_are_found() -> None:
    script = """
import ctypes, os, socket
from npu_zoo.evaluation.programs import confinement, template
print(template.Template(None).probe())
confinement.this_architecture = lambda: None
print(template.Template(None).probe())
confinement.lock = lambda ruleset: None
print(template.Template(None).probe())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    closed, unknown, open_ = done.stdout.splitlines()
    assert closed == ""
    assert "there is no filter of system calls for" in unknown
    assert "the network is in reach" in open_


def test_a_machine_that_cannot_confine_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [{"landlock": 0, "numpy": "", "folder": "/no/such/folder", "breach": "the network is in reach"}]
    monkeypatch.setattr(Sandbox, "_receive", lambda _: found)
    with pytest.raises(HardwareError, match="cannot confine programs, so none is run: the network is in reach"):
        Sandbox(SHORT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Limits(seconds=0), "seconds is 0"),
        (lambda: Limits(memory=-1), "memory is -1"),
        (lambda: Sandbox(workers=0), "0 programs at a time"),
    ],
)
def test_limits_that_make_no_sense_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def sandbox_process(sandbox: Sandbox) -> psutil.Process:
    return psutil.Process(sandbox._process.pid)


def sandbox_folder(sandbox: Sandbox) -> Path:
    return Path(sandbox_process(sandbox).cwd())


def descendants(sandbox: Sandbox) -> list[psutil.Process]:
    return sandbox_process(sandbox).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    until = time.monotonic() + 20
    while any(alive(process) for process in processes):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_the_numbers_of_system_calls_are_the_kernel_s() -> None:
    from npu_zoo.evaluation.programs.syscalls import AARCH64, X86_64

    headers = {"/usr/include/x86_64-linux-gnu/asm/unistd_64.h": X86_64, "/usr/include/asm-generic/unistd.h": AARCH64}
    found = {path: table for path, table in headers.items() if os.access(path, os.R_OK)}
    if not found:
        pytest.skip("the kernel's headers are not installed")
    for path, table in found.items():
        defined = kernel_numbers(Path(path).read_text())
        assert {name: defined[name] for name in table.numbers} == table.numbers


def kernel_numbers(header: str) -> dict[str, int]:
    found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", header, re.MULTILINE)
    numbers = {name: int(number) for name, number in found}
    return {"newfstatat": numbers.get("fstatat", -1), **numbers}
