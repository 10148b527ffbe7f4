"""What workers of the tests do. A payload is the path that they write to, unless a test says more."""

from __future__ import annotations

import ctypes
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any, NoReturn

from npu_zoo.parallel.children import NOT_HEARD
from npu_zoo.parallel.link import Link

FOR_EVER = 600.0


class Unloadable:
    def __setstate__(self, state: dict[str, Any]) -> None:
        raise KeyError("a field of another version")

    def __getstate__(self) -> dict[str, Any]:
        return {"field": 1}


def obey(folder: str, link: Link) -> None:
    """Rests until it is asked to stop, and says that it was."""
    link.send_ready()
    link.stopping.wait()
    Path(folder, f"stopped-{link.rank}").touch()


def report(folder: str, link: Link) -> None:
    """Writes what it sees of its process."""
    seen = {
        "environ": dict(os.environ),
        "path": sys.path,
        "session": os.getsid(0),
        "pid": os.getpid(),
        "input": sys.stdin.read(),
        "arguments": Path("/proc/self/cmdline").read_text().split("\0"),
    }
    Path(folder, f"report-{link.rank}").write_text(json.dumps(seen))
    obey(folder, link)


def measure(payload: tuple[str, bytes], link: Link) -> None:
    folder, data = payload
    Path(folder, f"size-{link.rank}").write_text(f"{len(data)} {sum(data[::4096])}")
    obey(folder, link)


def fail(payload: tuple[int, str], link: Link) -> None:
    """The rank that is named fails in a way that is named, after all are ready; the others rest."""
    rank, way = payload
    link.send_ready()
    if link.rank == rank:
        link.beat("decode step 7")
        if way in ("abort", "be_killed", "leave_silently"):
            time.sleep(0.3)  # for the stage to be heard, as it is not told at the end
        globals()[way]()
    link.stopping.wait()


def raise_an_error() -> NoReturn:
    try:
        raise OSError("the cause")
    except OSError as error:
        raise ValueError("a bad weight") from error


def raise_on_purpose() -> NoReturn:
    from npu_zoo.core.errors import WeightsError

    raise WeightsError("model.safetensors is damaged; download it again")


def raise_at_length() -> NoReturn:
    raise ValueError("x" * 1_000_000)


def raise_without_text() -> NoReturn:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    raise Broken


def recurse() -> NoReturn:
    recurse()


def leave() -> NoReturn:
    sys.exit(3)


def leave_with_a_message() -> NoReturn:
    sys.exit("the disk is gone")


def leave_silently() -> NoReturn:
    os._exit(0)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def abort() -> None:
    import faulthandler

    faulthandler.disable()
    os.abort()


def hang() -> None:
    time.sleep(FOR_EVER)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def raise_while_starting(payload: object, link: Link) -> None:
    with link.working("loading weights"):
        raise RuntimeError("no room for the weights")


def return_at_once(payload: object, link: Link) -> None:
    pass


def load_for_long(late: int, link: Link) -> None:
    """One rank does not become ready."""
    with link.working("reading the index"):
        time.sleep(0.3)
    with link.working("loading weights"):
        link.stopping.wait(FOR_EVER if link.rank == late else 0.3)
    link.send_ready()
    link.stopping.wait()


def load_when_seen(folder: str, link: Link) -> None:
    """Leaves each stage once a file says that it was seen."""

    def wait_until_seen(stage: str) -> None:
        while not Path(folder, f"{link.rank} {stage}").exists() and not link.stopping.wait(0.01):
            pass

    wait_until_seen(NOT_HEARD)
    for stage in ("reading the index", "loading weights"):
        with link.working(stage):
            wait_until_seen(stage)
    link.send_ready()
    link.stopping.wait()


def be_busy(payload: object, link: Link) -> None:
    """One rank works, one loops and one rests, each for longer than the tests' time-out."""
    link.send_ready()
    if link.rank == 1:
        link.beat("step 1")
        with link.working("compiling"):
            time.sleep(1.6)
    for step in range(16 if link.rank == 2 else 0):
        link.beat(f"step {step}")
        time.sleep(0.1)
    if link.rank == 3:
        link.beat("step 1")
        link.rest()
        time.sleep(1.6)


def hang_in_turn(payload: object, link: Link) -> None:
    """Rank 2 hangs first, and rank 1 waits for it."""
    link.send_ready()
    time.sleep(0.0 if link.rank == 2 else 0.3)
    link.beat("all_reduce" if link.rank == 1 else "reading a file")
    time.sleep(FOR_EVER)


def step_in_ways(payload: object, link: Link) -> None:
    """Rank 1 sleeps in its step; the others compute, wait for others, rest, and take short steps."""
    link.send_ready()
    if link.rank == 3:
        link.waiting = lambda: "all_reduce of group tp"
    if link.rank == 4:
        link.stopping.wait()
    while link.rank == 5 and not link.stopping.is_set():
        with link.stepping("decode step"):
            time.sleep(0.01)
    with link.stepping("decode step 7"):
        while link.rank == 2 and not link.stopping.is_set():
            sum(range(1000))
        link.stopping.wait()


def compute_elsewhere(payload: object, link: Link) -> None:
    """A thread computes, and the main one waits for it."""
    link.send_ready()
    with link.stepping("decode step 7"):
        thread = threading.Thread(target=lambda: [sum(range(1000)) for _ in range(200_000)])
        thread.start()
        thread.join()


def raise_after_a_neighbour(payload: tuple[str, str], link: Link) -> None:
    """Rank 3 fails; the others notice by a lock that its end frees, and fail for that."""
    folder, way = payload
    lock = os.open(Path(folder, "lock"), os.O_CREAT | os.O_RDWR)  # closed by the end of the process
    if link.rank == 3:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Path(folder, "held").touch()
        link.send_ready()
        time.sleep(0.3)
        globals()[way]()
    while not Path(folder, "held").exists():
        time.sleep(0.01)
    link.send_ready()
    fcntl.flock(lock, fcntl.LOCK_EX)
    raise ConnectionError("connection closed by peer")


def ignore_everything(folder: str, link: Link) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link.send_ready()
    time.sleep(FOR_EVER)


def freeze(folder: str, link: Link) -> None:
    """Only the kernel can end it."""
    link.send_ready()
    time.sleep(0.2)
    stop()


def forget_the_parent(folder: str, link: Link) -> None:
    """Only a look at its parent can end it, as where Linux does not tell of a parent's death."""
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
    ignore_everything(folder, link)


def clean_up(folder: str, link: Link) -> None:
    """Does not look at ``stopping``, but cleans up where it is terminated."""
    link.send_ready()
    try:
        time.sleep(FOR_EVER)
    finally:
        Path(folder, f"cleaned-{link.rank}").touch()


def leave_a_child(folder: str, link: Link) -> None:
    child = subprocess.Popen(["sleep", str(FOR_EVER)])
    Path(folder, f"child-{link.rank}").write_text(str(child.pid))
    link.send_ready()
    be_killed()


def leave_a_copy(folder: str, link: Link) -> None:
    """Dies while a copy by fork, in a session of its own, keeps its end of the link open."""
    pid = os.fork()
    if not pid:
        os.setsid()
        os.close(1)
        os.close(2)
        time.sleep(FOR_EVER)
    Path(folder, f"copy-{link.rank}").write_text(str(pid))
    link.send_ready()
    time.sleep(0.2)
    be_killed()


def leave_shared_memory(folder: str, link: Link) -> None:
    memory = shared_memory.SharedMemory(create=True, size=4096)
    Path(folder, f"memory-{link.rank}").write_text(memory.name.lstrip("/"))
    multiprocessing.active_children()
    link.send_ready()
    be_killed()
