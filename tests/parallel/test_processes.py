"""Real worker processes: how they start, fail and end. What they do stands in stand_in_workers.py."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.core.errors import EngineError, WorkerError
from npu_zoo.parallel import children, peers
from npu_zoo.parallel.collectives import CollectiveTimeout, Missing
from npu_zoo.parallel.link import Heartbeat, Setup
from npu_zoo.parallel.processes import WorkerGroup, exit_on_sigterm
from npu_zoo.parallel.supervision import Supervisor

HERE = Path(__file__).parent
HOST = socket.gethostname()
START_S = 30.0
"""How long the start of a worker may take on a machine that is busy."""

FAILURE_S = 10.0
"""How long it may take until a failure is known and all ranks have ended."""

WAYS = {
    "raise_an_error": "raised ValueError: a bad weight, at 'decode step 7'",
    "raise_on_purpose": "raised WeightsError: model.safetensors is damaged; download it again, at 'decode step 7'",
    "raise_at_length": "raised ValueError: xxx",
    "raise_without_text": "raised Broken",
    "recurse": "raised RecursionError: maximum recursion depth exceeded",
    "leave": "exited with code 3, at 'decode step 7'",
    "leave_with_a_message": "raised SystemExit: the disk is gone, at 'decode step 7'",
    "leave_silently": "exited with code 0, at 'decode step 7'",
    "be_killed": "was killed (SIGKILL), perhaps for memory: see dmesg, at 'decode step 7'",
    "abort": "was ended by SIGABRT (aborted), at 'decode step 7'",
    "hang": "hangs: its step has not got on for",
    "stop": "stopped or has locked its interpreter: no heartbeat for",
}
SILENT = {"hang", "stop"}


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which only waits for its parent, does not."""
    return state(pid)[0] not in "ZX"


def state(pid: int) -> list[str]:
    """State, parent, process group and session of a process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except (FileNotFoundError, ProcessLookupError):
        return ["X", "0", "0", "0"]


def children_of(parent: int) -> set[int]:
    processes = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return {process for process in processes if state(process)[1] == str(parent)}


def descriptors() -> dict[str, str]:
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the folder
            found[path.name] = str(path.readlink())
    return found


def wait_until(condition: Callable[[], bool], seconds: float = FAILURE_S) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers can import their functions; no child and no descriptor is there after a test that was not before it."""
    monkeypatch.syspath_prepend(str(HERE))
    before = children_of(os.getpid()), descriptors()
    yield
    assert (children_of(os.getpid()), descriptors()) == before


def failing(rank: int, way: str, count: int = 3, hang_timeout: float = START_S) -> WorkerGroup:
    return WorkerGroup("stand_in_workers:fail", [(rank, way)] * count, hang_timeout=hang_timeout)


def failure_of(group: WorkerGroup, seconds: float = FAILURE_S) -> WorkerError:
    with pytest.raises(WorkerError) as caught:
        group.check(wait=seconds)
    return caught.value


def test_eight_workers_start_and_stop_when_asked(tmp_path: Path) -> None:
    with WorkerGroup("stand_in_workers:obey", [str(tmp_path)] * 8) as group:
        group.wait_ready(START_S)
        assert sorted(group.pids) == list(range(1, 9))
        assert all(alive(pid) for pid in group.pids.values())
        group.check()
        begin = time.monotonic()
    assert time.monotonic() - begin < 3.0
    assert group.pids == {}
    assert {path.name for path in tmp_path.iterdir()} == {f"stopped-{rank}" for rank in range(1, 9)}
    group.check()


def test_no_worker_is_a_group_too() -> None:
    with WorkerGroup("stand_in_workers:obey", []) as group:
        group.wait_ready(0.0)
        group.check()


def test_a_worker_sees_what_its_parent_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("SHARED", "the parent's")
    environs = [{"DEVICE": "4"}, {"DEVICE": "5", "SHARED": "its own"}]
    targets = [str(tmp_path)] * 2
    with WorkerGroup("stand_in_workers:report", targets, environs=environs, first_rank=4) as group:
        group.wait_ready(START_S)
        pids = group.pids
    seen = {rank: json.loads((tmp_path / f"report-{rank}").read_text()) for rank in (4, 5)}
    for rank, report in seen.items():
        expected = {**os.environ, **environs[rank - 4]}
        assert {name: value for name, value in report["environ"].items() if name != "LC_CTYPE"} == expected
        assert report["path"] == [entry or str(Path.cwd()) for entry in sys.path]
        assert report["pid"] == report["session"] == pids[rank] != os.getsid(0)
        assert report["input"] == ""
        assert "npu_zoo.parallel.worker" in report["arguments"]
        assert not any(str(tmp_path) in argument for argument in report["arguments"])


def test_large_payloads_arrive_whole(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(10 << 20)
    with WorkerGroup("stand_in_workers:measure", [(str(tmp_path), data)] * 2) as group:
        group.wait_ready(START_S)
    assert [(tmp_path / f"size-{rank}").read_text() for rank in (1, 2)] == [f"{10 << 20} {sum(data[::4096])}"] * 2


@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_failure_ends_all_ranks_with_its_reason(way: str) -> None:
    with failing(2, way, hang_timeout=1.0 if way in SILENT else START_S) as group:
        pids = group.pids
        with contextlib.suppress(WorkerError):  # where the failure is known before all are seen to be ready
            group.wait_ready(START_S)
        begin = time.monotonic()
        error = failure_of(group)
        if way in SILENT:
            group.shutdown(grace=0.3)
    assert time.monotonic() - begin < FAILURE_S
    assert str(error).startswith(f"rank 2 on {HOST} {WAYS[way]}")
    assert (error.rank, error.host) == (2, HOST)
    assert isinstance(error, EngineError)
    assert len(str(error)) < 20_000
    assert not any(alive(pid) for pid in pids.values())
    assert failure_of(group) is error


def test_a_traceback_is_told_with_its_cause() -> None:
    with failing(1, "raise_an_error", 1) as group:
        lines = str(failure_of(group, START_S)).splitlines()
    assert "  OSError: the cause" in lines
    assert "  ValueError: a bad weight" in lines
    assert any("stand_in_workers.py" in line and "in raise_an_error" in line for line in lines)


def test_an_error_raised_on_purpose_needs_no_traceback() -> None:
    with failing(1, "raise_on_purpose", 1) as group:
        assert len(str(failure_of(group, START_S)).splitlines()) == 1


def test_ranks_that_wait_for_the_hanging_one_are_named_after_it() -> None:
    with WorkerGroup("stand_in_workers:hang_in_turn", [None] * 2, hang_timeout=1.0) as group:
        group.wait_ready(START_S)
        assert wait_until(lambda: "all_reduce" in group.stages().values())
        error = failure_of(group)
        group.shutdown(grace=0.3)
    assert error.rank == 2
    assert "at 'reading a file' (stand_in_workers.py:" in str(error)
    assert "in hang_in_turn)" in str(error)


def test_long_work_and_rest_are_no_hang() -> None:
    with WorkerGroup("stand_in_workers:be_busy", [None] * 3, hang_timeout=1.2) as group:
        group.wait_ready(START_S)
        assert wait_until(lambda: not group.pids)
        group.check(wait=0.3)


def test_a_step_that_neither_computes_nor_waits_is_a_hang() -> None:
    with WorkerGroup("stand_in_workers:step_in_ways", [None] * 5, hang_timeout=2.0) as group:
        group.wait_ready(START_S)
        error = failure_of(group, START_S)
        assert {1, 2} <= {found.rank for found in group.missing()} <= {1, 2, 5}
    assert str(error).startswith(f"rank 1 on {HOST} hangs: its step has neither computed nor waited for others for ")
    assert len(str(error).splitlines()) == 1


def test_a_device_is_waited_for_without_a_cpu() -> None:
    group = WorkerGroup("stand_in_workers:step_in_ways", [None], hang_timeout=0.5, idle_is_hanging=False)
    with group:
        group.wait_ready(START_S)
        group.check(wait=2.0)


def test_a_step_that_computes_in_another_thread_is_no_hang() -> None:
    with WorkerGroup("stand_in_workers:compute_elsewhere", [None], hang_timeout=1.0) as group:
        group.wait_ready(START_S)
        assert wait_until(lambda: not group.pids, START_S)
        group.check(wait=0.3)


@pytest.mark.parametrize("way", ["raise_an_error", "be_killed", "leave"])
def test_the_first_failure_is_told_not_those_that_follow_from_it(way: str, tmp_path: Path) -> None:
    with WorkerGroup("stand_in_workers:raise_after_a_neighbour", [(str(tmp_path), way)] * 4) as group:
        error = failure_of(group, START_S)
    assert error.rank == 3
    assert str(error).startswith(f"rank 3 on {HOST} {WAYS[way].rpartition(',')[0]}")


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("stand_in_workers:raise_while_starting", "raised RuntimeError: no room for the weights, at 'loading weights'"),
        ("stand_in_workers:be_killed", "raised TypeError: be_killed() takes 0 positional arguments"),
        ("stand_in_workers:nothing", "raised AttributeError: module 'stand_in_workers' has no attribute 'nothing'"),
        ("no_such_module:f", "raised ModuleNotFoundError: No module named 'no_such_module'"),
        ("stand_in_workers:return_at_once", "is not ready"),
    ],
)
def test_a_failing_start_is_told_at_once(target: str, what: str) -> None:
    begin = time.monotonic()
    with WorkerGroup(target, [None]) as group, pytest.raises(WorkerError) as caught:
        group.wait_ready(10 * START_S)
    assert str(caught.value).startswith(f"rank 1 on {HOST} {what}")
    assert caught.value.rank == 1
    assert time.monotonic() - begin < START_S


def test_a_payload_that_cannot_be_unpickled_is_the_worker_s_failure() -> None:
    import stand_in_workers  # type: ignore[import-not-found,unused-ignore]

    with WorkerGroup("stand_in_workers:obey", [stand_in_workers.Unloadable()]) as group:
        assert "raised KeyError: 'a field of another version'" in str(failure_of(group, START_S))


def test_a_payload_that_cannot_be_pickled_starts_nothing() -> None:
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        WorkerGroup("stand_in_workers:obey", [threading.Lock()])


def test_a_late_rank_is_named_with_what_it_does() -> None:
    seen: list[dict[int, str]] = []

    def progress(stages: Mapping[int, str]) -> None:
        seen.append(dict(stages))

    with WorkerGroup("stand_in_workers:load_for_long", [2] * 3) as group:
        assert wait_until(lambda: not {1, 3} & {peer.rank for peer in group._unready()}, START_S)
        with pytest.raises(WorkerError, match=r"rank 2 on .* is not ready") as caught:
            group.wait_ready(0.5, progress)
    assert caught.value.rank == 2
    assert "rank 2: loading weights" in str(caught.value)
    assert "rank 1" not in str(caught.value)
    assert seen[-1][2] == "loading weights"


def test_progress_comes_with_every_stage(tmp_path: Path) -> None:
    seen: list[dict[int, str]] = []

    def progress(stages: Mapping[int, str]) -> None:
        seen.append(dict(stages))
        for rank, stage in stages.items():
            (tmp_path / f"{rank} {stage}").touch()

    with WorkerGroup("stand_in_workers:load_when_seen", [str(tmp_path)] * 2) as group:
        group.wait_ready(START_S, progress)
    assert {stages[1] for stages in seen} >= {children.NOT_HEARD, "reading the index", "loading weights"}
    assert all(before != after for before, after in itertools.pairwise(seen))


def test_a_watcher_is_called_once_and_may_end_the_group() -> None:
    told: list[WorkerError] = []
    group = failing(3, "be_killed")

    def on_failure(error: WorkerError) -> None:
        told.append(error)
        group.shutdown()

    group.watch(on_failure)
    assert wait_until(lambda: bool(told) and not group.pids, START_S)
    group.shutdown()
    assert [error.rank for error in told] == [3]
    late: list[WorkerError] = []
    group.watch(late.append)
    assert wait_until(lambda: late == told)


def test_a_watcher_hears_nothing_of_a_group_that_ends_well(tmp_path: Path) -> None:
    told: list[WorkerError] = []
    with WorkerGroup("stand_in_workers:obey", [str(tmp_path)] * 2) as group:
        group.watch(told.append)
        group.wait_ready(START_S)
    assert wait_until(lambda: not any(thread.name == "watch of the ranks" for thread in threading.enumerate()))
    assert told == []


def test_shutdown_twice_and_from_two_threads(tmp_path: Path) -> None:
    group = WorkerGroup("stand_in_workers:obey", [str(tmp_path)] * 2)
    group.wait_ready(START_S)
    threads = [threading.Thread(target=group.shutdown) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(FAILURE_S)
    begin = time.monotonic()
    group.shutdown()
    assert time.monotonic() - begin < 0.5
    assert len(list(tmp_path.iterdir())) == 2


def test_shutdown_right_after_the_start_leaves_nothing() -> None:
    WorkerGroup("stand_in_workers:ignore_everything", ["x" * (1 << 20)] * 3).shutdown(grace=0.0)


def test_a_worker_that_ignores_sigterm_is_killed_after_the_grace() -> None:
    group = WorkerGroup("stand_in_workers:ignore_everything", [""] * 2)
    group.wait_ready(START_S)
    begin = time.monotonic()
    group.shutdown(grace=0.6)
    assert 0.6 <= time.monotonic() - begin < 3.0


def test_a_worker_that_does_not_listen_can_still_clean_up(tmp_path: Path) -> None:
    group = WorkerGroup("stand_in_workers:clean_up", [str(tmp_path)] * 2)
    group.wait_ready(START_S)
    group.shutdown(grace=6)  # a third of it is for cleaning up, however busy the machine is
    assert {path.name for path in tmp_path.iterdir()} == {"cleaned-1", "cleaned-2"}


def test_ctrl_c_during_shutdown_cuts_the_grace_short_not_the_end() -> None:
    group = WorkerGroup("stand_in_workers:ignore_everything", [""] * 2)
    group.wait_ready(START_S)
    begin = time.monotonic()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        group.shutdown(grace=START_S)
    assert time.monotonic() - begin < FAILURE_S
    assert group.pids == {}
    timer.join()


def test_workers_live_on_where_the_thread_that_made_the_group_ends(tmp_path: Path) -> None:
    made: list[WorkerGroup] = []
    thread = threading.Thread(target=lambda: made.append(WorkerGroup("stand_in_workers:obey", [str(tmp_path)] * 2)))
    thread.start()
    thread.join()
    with made.pop() as group:
        group.wait_ready(START_S)
        time.sleep(0.2)
        group.check()
        assert len(group.pids) == 2


def test_a_forgotten_group_ends(tmp_path: Path) -> None:
    group = WorkerGroup("stand_in_workers:obey", [str(tmp_path)] * 2)
    group.wait_ready(START_S)
    del group
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_dead_worker_started_ends_with_it(tmp_path: Path) -> None:
    with WorkerGroup("stand_in_workers:leave_a_child", [str(tmp_path)]) as group:
        assert failure_of(group, START_S).rank == 1
    assert not alive(int((tmp_path / "child-1").read_text()))


def test_a_death_is_seen_though_a_copy_of_the_worker_holds_the_link(tmp_path: Path) -> None:
    with WorkerGroup("stand_in_workers:leave_a_copy", [str(tmp_path)]) as group:
        group.wait_ready(START_S)
        copy = int((tmp_path / "copy-1").read_text())
        try:
            assert "was killed" in str(failure_of(group))
            assert alive(copy)  # it left the session on purpose, and so is not the group's
        finally:
            os.kill(copy, signal.SIGKILL)


def test_shared_memory_of_a_killed_worker_is_removed(tmp_path: Path) -> None:
    with WorkerGroup("stand_in_workers:leave_shared_memory", [str(tmp_path)]) as group:
        assert failure_of(group, START_S).rank == 1
    name = (tmp_path / "memory-1").read_text()
    assert name
    assert not Path("/dev/shm", name).exists()


def test_a_process_that_cannot_be_started_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    spawn = children.Child._spawn

    def refuse(self: children.Child) -> subprocess.Popen[bytes]:
        if self.rank == 2:
            self._theirs.close()
            raise BlockingIOError(11, "Resource temporarily unavailable")
        begun.append(self.rank)
        return spawn(self)

    monkeypatch.setattr(children.Child, "_spawn", refuse)
    with pytest.raises(EngineError, match=r"cannot start the process of rank 2 on .*temporarily unavailable.*ulimit"):
        WorkerGroup("stand_in_workers:ignore_everything", [""] * 3)
    assert begun


@pytest.mark.parametrize(
    ("thread", "what"),
    [
        ("rank 1", "the process of rank 1"),
        ("link to rank 1", "the process of rank 1"),
        ("ranks", "the thread that watches the ranks"),
    ],
)
def test_a_thread_that_cannot_be_started_leaves_no_process(
    thread: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == thread:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(EngineError, match=rf"cannot start {what} on .*can't start new thread"):
        WorkerGroup("stand_in_workers:ignore_everything", [""] * 2)


def test_a_missing_interpreter_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(EngineError, match="cannot start the process of rank 1"):
        WorkerGroup("stand_in_workers:obey", [""])


def test_too_few_descriptors_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = iter([socket.socketpair(), OSError(24, "Too many open files")])

    def socketpair() -> tuple[socket.socket, socket.socket]:
        pair = next(pairs)
        if isinstance(pair, OSError):
            raise pair
        return pair

    monkeypatch.setattr(children.socket, "socketpair", socketpair)
    with pytest.raises(EngineError, match=r"cannot start the process of rank 2 on .*Too many open files"):
        WorkerGroup("stand_in_workers:ignore_everything", [""] * 2)


def test_a_copy_of_the_parent_by_fork_ends_nobody(tmp_path: Path) -> None:
    with WorkerGroup("stand_in_workers:obey", [str(tmp_path)]) as group:
        group.wait_ready(START_S)
        owner = group._supervisor._owner
        group._supervisor._owner = owner + 1  # as a copy sees it
        group.shutdown()
        group._supervisor._owner = owner
        assert all(alive(pid) for pid in group.pids.values())
        assert len(group.pids) == 1


PARENT = """
import os, sys, time
from npu_zoo.parallel.processes import WorkerGroup, exit_on_sigterm
import contextlib
target, payload, gentle, timeout = sys.argv[1:]
with exit_on_sigterm() if gentle == "gentle" else contextlib.nullcontext():
    group = WorkerGroup(f"stand_in_workers:{target}", [payload] * 3, hang_timeout=float(timeout))
    group.wait_ready(60)
    print(*group.pids.values(), flush=True)
    if gentle == "leaves":
        sys.exit(5)
    while True:
        group.check(wait=0.1)
"""


@contextlib.contextmanager
def parent(
    target: str, folder: Path, how: str, timeout: float = 30.0
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    command = [sys.executable, "-c", PARENT, target, str(folder), how, str(timeout)]
    path = os.pathsep.join([str(HERE), *sys.path])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        assert process.stdout is not None
        pids: list[int] = []
        try:
            pids += [int(word) for word in process.stdout.readline().split()]
            assert len(pids) == 3
            yield process, pids
        finally:
            process.kill()
            for pid in filter(alive, pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("target", ["obey", "freeze", "forget_the_parent"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_a_parent_that_is_killed(number: signal.Signals, target: str, tmp_path: Path) -> None:
    with parent(target, tmp_path, "plain") as (process, pids):
        assert target != "freeze" or wait_until(lambda: all(state(pid)[0] == "T" for pid in pids))
        process.send_signal(number)
        assert process.wait(FAILURE_S) == -number
        assert wait_until(lambda: not any(alive(pid) for pid in pids), 3.0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_an_interrupted_parent_asks_its_workers(number: signal.Signals, code: int, tmp_path: Path) -> None:
    with parent("obey", tmp_path, "gentle") as (process, pids):
        begin = time.monotonic()
        process.send_signal(number)
        assert process.wait(FAILURE_S) == code
        assert time.monotonic() - begin < 3.0
        assert not any(alive(pid) for pid in pids)
    assert len(list(tmp_path.glob("stopped-*"))) == 3


def test_a_parent_that_exits_without_shutdown_asks_its_workers(tmp_path: Path) -> None:
    with parent("obey", tmp_path, "leaves") as (process, pids):
        assert process.wait(FAILURE_S) == 5
        assert not any(alive(pid) for pid in pids)
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert len(list(tmp_path.glob("stopped-*"))) == 3


def test_a_parent_that_was_stopped_takes_no_silence_amiss(tmp_path: Path) -> None:
    with parent("obey", tmp_path, "plain", timeout=0.5) as (process, pids):
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.8)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.6)
        assert process.poll() is None
        assert all(alive(pid) for pid in pids)


def test_sigterm_s_meaning_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as left, exit_on_sigterm(), contextlib.suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
        assert left.value.code == 143  # though something inside has caught it, as an import of a library may
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        signal.signal(signal.SIGTERM, own)
        with exit_on_sigterm():
            assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_neither_side_needs_torch() -> None:
    modules = ("processes", "worker", "launched", "environment")
    program = f"import sys, {', '.join(f'npu_zoo.parallel.{name}' for name in modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert {"torch", "torch_npu", "transformers", "pydantic"} & set(done.stdout.split()) == set()


def test_unequal_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        WorkerGroup("stand_in_workers:obey", ["", ""], environs=[{}])


def test_what_comes_first_is_decided_by_time_and_cause() -> None:
    supervisor = Supervisor(1.0)
    raised = peers.Failure(1, 10.0, "raised ConnectionError")
    killed = peers.Failure(2, 10.1, "was killed", sudden=True)
    earlier = peers.Failure(3, 9.0, "raised ValueError")
    assert supervisor._first([raised, killed]).rank == 2
    assert supervisor._first([raised, killed, earlier]).rank == 3
    late = peers.Failure(4, 12.0, "was killed", sudden=True)
    assert supervisor._first([late, raised]).rank == 1


def test_silence_from_before_a_standstill_of_the_parent_is_forgiven() -> None:
    supervisor = Supervisor(30.0)
    child = children.Child(Setup(1, "", b"", (), None, 1.0), {}, supervisor.changed)
    supervisor.peers.append(child)
    now = time.monotonic()
    child._heartbeat = Heartbeat("all_reduce", sent_at=now, last_beat=now - 100, position="")
    child._heard_at = now - 50
    assert supervisor._forgive_a_standstill(now - 0.5, 0.25) >= now
    assert "no heartbeat for 50 s" in getattr(child.silence(now, 30.0), "what", "")
    resumed = supervisor._forgive_a_standstill(now - 50, 0.25)
    assert child.silence(resumed, 30.0) is None
    child._hear(Heartbeat("all_reduce", sent_at=resumed + 29, last_beat=now - 100, position=""))
    assert child.silence(resumed + 29, 30.0) is None
    child._hear(Heartbeat("all_reduce", sent_at=resumed + 31, last_beat=now - 100, position=""))
    assert "has not got on for 31 s" in getattr(child.silence(time.monotonic(), 30.0), "what", "")
    supervisor.end(0)


class StandIn(peers.Peer):
    def ask(self) -> None: ...

    def send_signal(self, number: signal.Signals) -> None: ...


def heard(*beats: Heartbeat) -> peers.Peer:
    peer = StandIn(1, "node7", "starting", threading.Condition())
    for beat in beats:
        peer._hear(beat)
    return peer


def beat(at: float, **state: Any) -> Heartbeat:
    return replace(Heartbeat("step", at, None, "model.py:12 in forward", stepping=True), **state)


@pytest.mark.parametrize(
    ("state", "hangs"),
    [
        ({}, True),
        ({"cpu_time": 0.1, "main_cpu_time": 0.04}, True),  # threads of idle process groups look around
        ({"main_cpu_time": 0.06}, False),
        ({"cpu_time": 2.0}, False),
        ({"steps": 1}, False),
        ({"position": "model.py:13 in forward"}, False),
        ({"stage": "another"}, False),
        ({"stepping": False}, False),
        ({"waiting": "all_reduce"}, False),
    ],
)
def test_what_shows_that_a_step_gets_on(state: dict[str, Any], hangs: bool) -> None:
    now = time.monotonic()
    peer = heard(beat(now), *(beat(now + second, **(state if second >= 5 else {})) for second in range(1, 10)))
    assert (peer.silence(now, 7.5) is not None) == hangs
    assert peer.silence(now, 8.5, idle_is_hanging=False) is None
    assert peer.silence(now, 9.5) is None


def test_a_host_that_stood_still_is_no_hang() -> None:
    now = time.monotonic()
    peer = heard(beat(now), beat(now + 1), beat(now + 60))
    assert peer.silence(now, 8.0) is None


def test_who_is_missing_is_told_in_one_line() -> None:
    late = heard(beat(0.0))
    assert late.missing() == Missing(1, "node7", "step", "model.py:12 in forward")
    assert heard(beat(0.0, waiting="all_reduce")).missing() is None
    assert heard(beat(0.0, stepping=False)).missing() is None
    assert heard().missing() is None
    error = CollectiveTimeout(
        "all_reduce of group tp", 5, missing=[Missing(2, "hostB", "step", "model.py:12 in forward")]
    )
    assert str(error) == (
        "all_reduce of group tp was not done within 5 s (--collective-timeout): "
        "rank 2 on hostB did not come to it; it is at model.py:12 in forward"
    )
    assert (error.rank, error.host) == (2, "hostB")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.rank, copy.missing) == (str(error), 2, error.missing)
    several = CollectiveTimeout(
        "send", 0.5, missing=[Missing(1, "a", "step", ""), Missing(2, "b", "step", "x.py:1 in f")]
    )
    assert "rank 1 on a, rank 2 on b did not come to it; rank 1 is at 'step', rank 2 is at x.py:1 in f" in str(several)
    assert "all ranks came to it" in str(CollectiveTimeout("send", 0.5, missing=[]))
    assert str(CollectiveTimeout("send", 0.5)) == "send was not done within 0.5 s (--collective-timeout)"


def test_rank_0_itself_may_be_missing() -> None:
    supervisor = Supervisor(8.0)
    supervisor.peers.append(heard(beat(0.0, waiting="all_reduce")))
    assert supervisor.missing(own=True) == []
    supervisor.waiting = lambda: None
    assert [found.rank for found in supervisor.missing(own=True)] == [0]
    assert supervisor.missing([1], own=True) == supervisor.missing() == []
    supervisor.waiting = lambda: "all_reduce"
    assert supervisor.missing(own=True) == []


def test_a_rank_that_gets_on_in_time_has_not_failed() -> None:
    supervisor = Supervisor(30.0)
    supervisor._settle([])
    assert supervisor.failure is None


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_whoever_fails_in_whatever_way_all_end(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 6)
    rank, way = draw.randint(1, count), draw.choice(sorted(WAYS))
    with failing(rank, way, count, hang_timeout=1.5) as group:
        pids = group.pids
        error = failure_of(group, START_S)
        begin = time.monotonic()
    assert error.rank == rank, (way, str(error))
    assert WAYS[way] in str(error)
    assert time.monotonic() - begin < FAILURE_S
    assert not any(alive(pid) for pid in pids.values())
