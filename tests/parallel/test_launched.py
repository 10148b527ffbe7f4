"""Ranks that somebody else started, as processes of their own: how they join, fail and end."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.core.errors import EngineError, HardwareError, WorkerError
from npu_zoo.parallel import joining
from npu_zoo.parallel.addresses import local_address
from npu_zoo.parallel.environment import LaunchEnvironment
from npu_zoo.parallel.launched import LaunchedGroup, LaunchedPeer, join_store, launched_link
from npu_zoo.parallel.link import Heartbeat

from .launched_rank import Server
from .namespaces import Host, two_hosts

HERE = Path(__file__).parent
HOST = socket.gethostname()
START_S = 60.0
FAILURE_S = 10.0
"""How long it may take until a failure is known and all ranks have ended."""

LINGER_S = 5.0
"""More than that, on a machine that is busy: for processes to be reaped and lines to be read."""


class Rank:
    """One rank's process, and what it has said so far."""

    def __init__(self, number: int, process: subprocess.Popen[str]) -> None:
        self.number = number
        self.process = process
        self.said: list[dict[str, Any]] = []
        self.errors = ""
        self._readers = [threading.Thread(target=target, daemon=True) for target in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def told(self, key: str, seconds: float = START_S) -> Any:
        """What it says under a key, once it does."""
        assert wait_until(lambda: any(key in line for line in self.said), seconds), (key, self.said, self.errors)
        return next(line[key] for line in self.said if key in line)

    def end(self, seconds: float = FAILURE_S + LINGER_S) -> int:
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(LINGER_S)
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(json.loads(line))

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors = self.process.stderr.read()


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def start(
    number: int, size: int, port: str, does: str, timeout: float, host: Host | None = None, master: str = "127.0.0.1"
) -> Rank:
    local = size if host is None else 1
    place = {"RANK": number, "WORLD_SIZE": size, "LOCAL_RANK": number % local, "LOCAL_WORLD_SIZE": local}
    environ = {**os.environ, **{name: str(value) for name, value in place.items()}}
    environ |= {
        "MASTER_ADDR": master,
        "MASTER_PORT": os.environ.get("STORE_PORT", "29500"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, str(HERE / "launched_rank.py"), port, does, str(timeout)]
    process = subprocess.Popen(
        command if host is None else host.command(*command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )
    return Rank(number, process)


@contextlib.contextmanager
def ranks(does: Sequence[str], timeout: float = FAILURE_S) -> Iterator[list[Rank]]:
    """One process per entry, which says what the rank does."""
    store = Server()
    started: list[Rank] = []
    try:
        for number, what in enumerate(does):
            started.append(start(number, len(does), str(store.port), what, timeout))
        yield started
    finally:
        end_all(started)
        store.close()


def end_all(started: Sequence[Rank]) -> None:
    for rank in started:
        with contextlib.suppress(ProcessLookupError):
            rank.process.send_signal(signal.SIGCONT)
            rank.process.kill()
        rank.end()
        for stream in (rank.process.stdout, rank.process.stderr):
            assert stream is not None
            stream.close()


def place(rank: int = 0, size: int = 2) -> LaunchEnvironment:
    return LaunchEnvironment(rank, size, rank, size, "127.0.0.1", 29500, 0)


def test_ranks_join_and_leave_when_all_is_done() -> None:
    with ranks(["end", "rest", "rest"]) as (first, *others):
        assert first.told("ready") == {"1": HOST, "2": HOST}
        assert [rank.end(START_S) for rank in (first, *others)] == [0, 0, 0]
        assert first.said[0]["address"] == "127.0.0.1"
        assert {rank.said[0]["attempt"] for rank in (first, *others)} == {first.said[0]["attempt"]}
        assert not any(rank.errors for rank in (first, *others))


@pytest.mark.long
def test_an_error_of_rank_0_ends_the_others_quietly() -> None:
    with ranks(["raise", "rest", "be_deaf"]) as (first, *others):
        assert first.end(START_S) == 1
        assert "the prompt is empty" in first.errors
        assert [rank.end() for rank in others] == [1, 1]
        assert [rank.errors for rank in others] == ["", ""]


def test_a_killed_rank_is_named_and_the_others_end() -> None:
    with ranks(["wait", "rest", "rest"]) as (first, second, third):
        first.told("ready")
        second.process.kill()
        assert first.told("error", FAILURE_S + LINGER_S).startswith(f"rank 1 on {HOST} ended without a word")
        assert (first.told("rank"), first.told("host")) == (1, HOST)
        assert (first.end(), third.end()) == (0, 1)
        assert third.errors == ""


def test_a_rank_that_raises_is_named_with_its_error() -> None:
    with ranks(["wait", "raise_in_step", "wait_in_step"]) as (first, second, third):
        error = first.told("error")
        assert error.startswith(f"rank 1 on {HOST} raised ValueError: a bad weight, at 'decode step 7'")
        assert "launched_rank.py" in error
        assert (first.end(), second.end()) == (0, 1)
        assert third.end() != 0


def test_a_rank_that_sleeps_in_its_step_is_named_with_its_position() -> None:
    with ranks(["wait", "wait_in_step", "hang_in_step", "compute_in_step"], timeout=2.0) as (first, *_):
        error = first.told("error")
        assert error.startswith(f"rank 2 on {HOST} hangs: its step has neither computed nor waited for others for")
        assert "at 'decode step 7' (launched_rank.py:" in error
        assert "rank 1" not in error


def test_a_stopped_rank_is_named() -> None:
    with ranks(["wait", "rest", "rest"], timeout=2.0) as (first, second, third):
        first.told("ready")
        second.process.send_signal(signal.SIGSTOP)
        error = first.told("error", FAILURE_S + LINGER_S)
        assert error.startswith(f"rank 1 on {HOST} stopped, has locked its interpreter, or its host is out of reach")
        assert third.end() == 1


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_rank_is_named_though_its_main_thread_is_stuck(number: signal.Signals) -> None:
    with ranks(["wait", "wait_in_step", "rest"]) as (first, second, third):
        first.told("ready")
        second.process.send_signal(number)
        assert first.told("error").startswith(f"rank 1 on {HOST} was ended by {number.name}")
        assert (first.end(), second.end(), third.end()) == (0, 128 + number, 1)


def test_a_ctrl_c_that_rank_0_has_too_is_left_to_it() -> None:
    with ranks(["wait", "rest", "rest"]) as (first, *others):
        first.told("ready")
        for rank in (*others, first):
            rank.process.send_signal(signal.SIGINT)
        assert first.end() != 0
        assert "KeyboardInterrupt" in first.errors
        assert [rank.end() for rank in others] == [1, 1]
        assert [rank.errors for rank in others] == ["", ""]


@pytest.mark.parametrize("does", ["rest", "be_deaf", "wait_in_step"])
def test_nobody_outlives_rank_0(does: str) -> None:
    with ranks(["wait", does, does]) as (first, *others):
        first.told("ready")
        first.process.kill()
        assert [rank.end() for rank in others] == [1, 1]
        for rank in others:
            assert rank.errors == f"rank {rank.number} ends: rank 0 on {HOST} is gone (its process ended)\n"


@pytest.mark.long
def test_a_rank_0_that_is_stopped_is_waited_for() -> None:
    with ranks(["wait", "rest"], timeout=1.0) as (first, second):
        first.told("ready")
        first.process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        first.process.send_signal(signal.SIGCONT)
        time.sleep(0.7)
        assert first.process.poll() is None
        assert second.process.poll() is None
        second.process.kill()
        assert "rank 1" in first.told("error", FAILURE_S + LINGER_S)


def test_the_rank_that_did_not_come_is_named() -> None:
    with ranks(["time_out", "wait_in_step", "compute_in_step"]) as (first, *_):
        error = first.told("error")
        begin = f"all_reduce of group tp was not done within 2 s (--collective-timeout): rank 2 on {HOST} did not come"
        assert error.startswith(begin)
        assert "to it; it is at launched_rank.py:" in error
        assert (first.told("rank"), first.told("host")) == (2, HOST)


def test_another_rank_s_time_out_names_who_did_not_come() -> None:
    with ranks(["wait", "time_out_in_step", "compute_in_step"]) as (first, *_):
        assert f"rank 2 on {HOST} did not come to it" in first.told("error")
        assert first.told("rank") == 2


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("greeting", [b"", b"x" * 36, b"GET / HTTP/1.1\r\n\r\n" * 10])
def test_whoever_lacks_the_token_is_not_unpickled(greeting: bytes, tmp_path: Path) -> None:
    store = Server()
    with LaunchedGroup(store, place()) as group:
        meeting = joining.Meeting(**json.loads(store.get("npu_zoo/supervisor")))
        with socket.create_connection((meeting.address, meeting.port)) as stranger:
            stranger.settimeout(START_S)
            with contextlib.suppress(OSError):  # sent away before all of it
                stranger.sendall(greeting + b"\x01h" + pickle.dumps(Bomb(tmp_path / "touched")))
                stranger.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                assert stranger.recv(1) == b""
        assert group.hosts == {}
        group.check()
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_is_not_expected_is_sent_away() -> None:
    store = Server()
    with LaunchedGroup(store, place(size=2)), pytest.raises(WorkerError, match="does not expect this rank"):
        launched_link(store, place(rank=2, size=3), timeout=0.5)
    store.close()


def test_a_rank_does_not_wait_for_ever_for_rank_0() -> None:
    store = Server()
    with LaunchedGroup(store, place()):
        pass
    with pytest.raises(WorkerError, match=r"rank 1 did not reach rank 0 on .* within 0\.5 s: .*refused"):
        launched_link(store, place(rank=1), timeout=0.5)
    store.close()


def test_ranks_that_do_not_join_are_named() -> None:
    store = Server()
    with (
        LaunchedGroup(store, place(size=3)) as group,
        pytest.raises(WorkerError, match=r"rank 1, 2 is not ready(.|\n)*rank 2: not joined yet") as caught,
    ):
        group.wait_ready(0.3)
    assert caught.value.rank == 1
    store.close()


def test_torch_s_store_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Rank] = []
    try:
        port = free_port()
        monkeypatch.setenv("STORE_PORT", port)
        started += [start(number, 2, "torch", does, FAILURE_S) for number, does in enumerate(["end", "rest"])]
        assert [rank.end(START_S) for rank in started] == [0, 0]
        assert started[0].said[0]["attempt"] == started[1].said[0]["attempt"]
    finally:
        end_all(started)


def test_ranks_that_do_not_meet_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    alone = LaunchEnvironment(0, 2, 0, 2, "127.0.0.1", int(port), 0)
    with pytest.raises(EngineError, match=rf"rank 0 of 2 did not meet the others at 127\.0\.0\.1:{port} in 1 s: "):
        join_store(alone, timeout=1)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def test_another_host_s_clock_is_translated() -> None:
    peer = LaunchedPeer(1, threading.Condition(), threading.Event())
    now = time.monotonic()
    peer._take_in(Heartbeat("a step", sent_at=1000.0 + now, last_beat=990.0 + now, position=""))
    assert peer.beat is not None
    assert peer.beat.last_beat is not None
    assert peer.beat.sent_at == pytest.approx(now, abs=START_S)
    assert peer.beat.sent_at - peer.beat.last_beat == pytest.approx(10.0)


def test_local_addresses() -> None:
    assert local_address("127.0.0.1", 1) == "127.0.0.1"
    assert local_address("localhost", 1) in ("127.0.0.1", "::1")
    with pytest.raises(HardwareError, match=r"MASTER_ADDR=nowhere\.invalid means no host here"):
        local_address("nowhere.invalid")


@contextlib.contextmanager
def ranks_of_two_hosts(does: Sequence[str]) -> Iterator[tuple[Rank, Rank, Host]]:
    with two_hosts() as hosts:
        started: list[Rank] = []
        try:
            for number, what in enumerate(does):
                port, master = "serve:29501", hosts[0].address
                started.append(start(number, 2, port, what, 8.0, hosts[number], master))
            yield started[0], started[1], hosts[1]
        finally:
            end_all(started)


def test_both_sides_of_a_cut_cable_end() -> None:
    with ranks_of_two_hosts(["wait", "wait_in_step"]) as (first, second, host):
        first.told("ready")
        assert (first.said[0]["address"], second.said[0]["address"]) == ("10.231.7.1", "10.231.7.2")
        host.unplug()
        cut_at = time.time()
        assert second.end() == 1
        assert time.time() - cut_at < FAILURE_S
        error = first.told("error", FAILURE_S + LINGER_S)
        assert first.told("at") - cut_at < FAILURE_S
        assert error.startswith(f"rank 1 on {HOST} ")
        assert "out of reach" in error
        assert second.errors.startswith(f"rank 1 ends: rank 0 on {HOST} is gone (its host is out of reach")
