"""Engines in threads of this process and in processes of their own, clients to them, and whole servers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from npu_zoo import LLM
from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.dispatch import resolve
from npu_zoo.server.engine_process import EngineServer
from npu_zoo.testing.serving import RunningServer

from .real_server import start

DEMO = "deepseek_coder:demo"


def demo_config(**options: object) -> EngineConfig:
    defaults = {"hardware": "cpu", "dtype": "float32", "threads": 1, "kv_cache_memory": "8MiB", "max_num_seqs": 16}
    return resolve(EngineArgs(**{"model": DEMO, **defaults, **options}))


@pytest.fixture(scope="session")
def config() -> EngineConfig:
    return demo_config()


@pytest.fixture(scope="module")
def llm(config: EngineConfig) -> Iterator[LLM]:
    """The demo model in this process, as the oracle."""
    with LLM.from_config(config) as llm:
        yield llm


@contextmanager
def serving(llm: LLM, path: Path) -> Iterator[EngineServer]:
    """The engine of an LLM, served by a thread of this process."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = EngineServer(llm.engine, listener.dup())
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join()


@pytest.fixture
def engine_path(llm: LLM, tmp_path: Path) -> Iterator[Path]:
    """A socket at which the module's LLM is served; nobody else may use it meanwhile."""
    with serving(llm, tmp_path / "engine.sock"):
        yield tmp_path / "engine.sock"


@pytest.fixture(scope="session")
def small_server() -> Iterator[RunningServer]:
    """A server that runs two requests and lets twelve more wait; tests leave it idle and do not end its processes."""
    arguments = ("--max-queue", "12", "--head-timeout", "5", "--body-timeout", "1", "--send-timeout", "2")
    with start(*arguments, sequences=2) as server:
        yield server


SERVED = "deepseek_v3:demo"
PLAIN = ("--dtype", "float32", "--threads", "1", "--log-level", "error")


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """A server of a model that calls tools, for tests that leave it as they found it."""
    with RunningServer(("--model", SERVED, *PLAIN)) as server:
        yield server


@pytest.fixture
def untouched_server() -> Iterator[RunningServer]:
    """Another of them, of which nothing was asked: on the shared one, a client that left may be counted later."""
    with RunningServer(("--model", SERVED, *PLAIN)) as server:
        yield server


@pytest.fixture(scope="session")
def oracle() -> Iterator[LLM]:
    """The same model in this process."""
    with LLM.from_config(demo_config(model=SERVED, kv_cache_memory="32MiB", max_num_seqs=64)) as llm:
        yield llm
