"""Servers as their users start them, what is asked of them, and what they tell of themselves."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from npu_zoo.testing.serving import RunningServer

from .raw_http import Answer, Connection, wait_until

MODEL = "deepseek_coder"
SMALL = ("--model", "deepseek_coder:demo", "--hardware", "cpu", "--dtype", "float32", "--threads", "1")
SMALL += ("--kv-cache-memory", "8MiB")
PATH = "/v1/completions"

GREEDY = {"model": MODEL, "prompt": "def add(a, b):", "temperature": 0, "ignore_eos": True}
SHORT = {**GREEDY, "max_tokens": 8}
LONG = {**GREEDY, "max_tokens": 1900}
"""Runs for seconds, far longer than a test needs to do something to it."""


def start(*arguments: str, sequences: int = 8, **environ: str) -> RunningServer:
    return RunningServer([*SMALL, "--max-num-seqs", str(sequences), *arguments], environ)


def complete(server: RunningServer, body: dict[str, Any] = SHORT, headers: dict[str, str] | None = None) -> Answer:
    with Connection(server.url) as connection:
        connection.post(PATH, body, headers)
        return connection.answer()


def metric(server: RunningServer, *names: str, **labels: str) -> float:
    """The sum of the metrics' series that have these labels."""
    families = text_string_to_metric_families(server.get("/metrics")[1])
    samples = [sample for family in families for sample in family.samples if sample.name in names]
    assert {sample.name for sample in samples} == set(names), f"/metrics has not all of {names}"
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def running(server: RunningServer) -> float:
    return metric(server, "vllm:num_requests_running")


def is_idle(server: RunningServer) -> bool:
    """Whether nothing runs, waits or holds blocks, and no request is left over."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return metric(server, *names, "npu_zoo_requests_in_flight") == 0


def settle(server: RunningServer) -> None:
    """Wait until the server is done with clients that left, also with those that left before it noticed them."""
    front_end = psutil.Process(server.children["front end"])

    def connections() -> list[Any]:
        return [found for found in front_end.net_connections("tcp") if found.status != psutil.CONN_LISTEN]

    complete(server)  # is behind all of them, whatever it is told
    wait_until(lambda: not connections() and is_idle(server))
    assert complete(server).status == 200
    wait_until(lambda: is_idle(server))


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    """A process does nothing as long as the block lasts."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Client(threading.Thread):
    """One request in a thread of its own, and what came of it.

    Attributes:
        answer: whole; None for a stream, and where none came.
        events: of a stream.
        broken: the connection's end amid the answer, if that is how it ended.
    """

    def __init__(self, url: str, body: dict[str, Any], *, stream: bool = False) -> None:
        super().__init__(daemon=True)
        self.answer: Answer | None = None
        self.events: list[str] = []
        self.broken: Exception | None = None
        self._body, self._stream = {**body, "stream": stream}, stream
        self._connection = Connection(url)
        self.start()

    def run(self) -> None:
        with self._connection as connection:
            try:
                connection.post(PATH, self._body)
                if self._stream:
                    for event in connection.events():
                        self.events.append(event)
                else:
                    self.answer = connection.answer()
            except (OSError, http.client.HTTPException) as error:
                self.broken = error

    def ended(self) -> Client:
        """The client, once its request has ended."""
        self.join(60)
        assert not self.is_alive(), "the request hangs"
        return self


def load(server: RunningServer, body: dict[str, Any] = LONG) -> tuple[list[Client], list[Client]]:
    """Three requests for whole answers and three streams, which have all begun."""
    whole = [Client(server.url, {**body, "prompt": f"def whole{n}"}) for n in range(3)]
    streamed = [Client(server.url, {**body, "prompt": f"def streamed{n}"}, stream=True) for n in range(3)]
    wait_until(lambda: running(server) == 6 and all(client.events for client in streamed))
    return whole, streamed
