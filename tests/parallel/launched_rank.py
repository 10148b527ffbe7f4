"""One rank of the tests, as a launcher starts it: ``python launched_rank.py [serve:]PORT|torch DOES HANG_TIMEOUT``.

Its place comes from torchrun's variables. The store is a few lines of TCP that the tests hold, or rank 0 with
``serve:``. What becomes of a rank is printed as JSON lines.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from npu_zoo.core.errors import WorkerError
from npu_zoo.parallel.collectives import CollectiveTimeout
from npu_zoo.parallel.environment import LaunchEnvironment
from npu_zoo.parallel.launched import LaunchedGroup, LaunchedLink, join_store, launched_link

FOR_EVER = 600.0


class Client:
    """A key-value store over TCP, with the part of torch's TCPStore that is needed."""

    def __init__(self, address: str, port: int) -> None:
        self._place = address, port

    def set(self, key: str, value: str, /) -> None:
        self._ask("set", key, value)

    def get(self, key: str, /) -> bytes:
        return self._ask("get", key, "").encode()

    def _ask(self, *words: str) -> str:
        deadline = time.monotonic() + 60
        while True:
            try:
                with (
                    socket.create_connection(self._place, timeout=60) as connection,
                    connection.makefile("rw") as stream,
                ):
                    stream.write(json.dumps(words) + "\n")
                    stream.flush()
                    return str(json.loads(stream.readline()))
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


class Server:
    """The other end of it."""

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        self.values: dict[str, str] = {}
        self._changed = threading.Condition()
        self._listener = socket.create_server((address, port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, name="store", daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def set(self, key: str, value: str, /) -> None:
        with self._changed:
            self.values[key] = value
            self._changed.notify_all()

    def get(self, key: str, /) -> bytes:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self.values, 60):
                raise RuntimeError(f"wait timeout after 60000ms, keys: {key}")
            return self.values[key].encode()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rw") as stream:
            line = stream.readline()
            if not line:
                return
            word, key, value = json.loads(line)
            if word == "set":
                self.set(key, value)
            stream.write(json.dumps(value if word == "set" else self.get(key).decode()) + "\n")
            stream.flush()


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def lead(store: Any, place: LaunchEnvironment, does: str, hang_timeout: float) -> None:
    with LaunchedGroup(store, place, hang_timeout=hang_timeout) as group:
        tell(pid=os.getpid(), address=group.address, attempt=group.attempt)
        try:
            group.wait_ready(60)
            tell(ready=group.hosts, stages=group.stages())
            if does == "end":
                return
            if does == "raise":
                raise RuntimeError("the prompt is empty")
            if does == "time_out":
                group.check(wait=2.0)
                raise group.timed_out("all_reduce of group tp", 2.0, [0, 1, 2])
            group.check(wait=FOR_EVER)
        except WorkerError as error:
            tell(error=str(error), rank=error.rank, host=error.host, at=time.time())


def work(link: LaunchedLink, does: str) -> None:
    tell(rank=link.rank, pid=os.getpid(), address=link.address, attempt=link.attempt)
    link.send_ready()
    if does == "hang_in_step":
        with link.stepping("decode step 7"):
            time.sleep(FOR_EVER)
    elif does == "raise_in_step":
        with link.stepping("decode step 7"):
            raise ValueError("a bad weight")
    elif does == "time_out_in_step":
        with link.stepping("decode step 7"):
            time.sleep(2)
            raise CollectiveTimeout("all_reduce of group tp", 2.0, [1, 2])
    elif does == "wait_in_step":
        link.waiting = lambda: "all_reduce of group tp"
        with link.stepping("decode step 7"):
            threading.Event().wait()
    elif does == "compute_in_step":
        with link.stepping("decode step 7"):
            while not link.stopping.is_set():
                sum(range(1000))
    elif does == "be_deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Event().wait()
    link.stopping.wait()


def find_store(port: str, place: LaunchEnvironment) -> Any:
    if port == "torch":
        return join_store(place, 60)
    number = int(port.removeprefix("serve:"))
    serves = port.startswith("serve:") and place.rank == 0
    return Server(place.master_addr, number) if serves else Client(place.master_addr, number)


def main(port: str, does: str, hang_timeout: str) -> int:
    place = LaunchEnvironment.from_environ(os.environ)
    assert place is not None
    store = find_store(port, place)
    if place.rank == 0:
        lead(store, place, does, float(hang_timeout))
        return 0
    link = launched_link(store, place, hang_timeout=float(hang_timeout), timeout=60)
    with link.reporting():
        work(link, does)
    return int(link.failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
