"""Processes of engines: their pipe, their end, and that they need nothing but the engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from npu_zoo.evaluation.peers.engines import InstalledEngine
from npu_zoo.evaluation.peers.process import WORKER, PeerError, PeerProcess, child_environment
from npu_zoo.evaluation.peers.worker.driver import LoadOptions, Request

LLAMA = """
import os, sys
def llama_backend_init():
    print("noise on standard output")
    sys.stderr.write("last words\\n")
    sys.stderr.flush()
    os.kill(os.getpid(), 9) if "die" in os.environ.get("LLAMA_FAKE", "") else None
    raise MemoryError("no room")
"""


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PeerProcess]:
    """A process of an engine that fails when it loads."""
    (tmp_path / "llama_cpp.py").write_text(LLAMA)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("LLAMA_FAKE", "raise")
    with PeerProcess(InstalledEngine("llama.cpp"), 1) as started:
        yield started


def test_a_worker_needs_the_standard_library_alone() -> None:
    command = [sys.executable, "-I", "-S", str(WORKER), "npu-zoo"]
    done = subprocess.run(command, input='{"command": "peak_memory"}\n', capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"] > 2**20


def test_what_an_engine_raises_reaches_the_parent_and_the_process_goes_on(process: PeerProcess) -> None:
    with pytest.raises(PeerError, match="'load' failed: MemoryError: no room"):
        process.load(LoadOptions("x", "float32", 8))
    assert process.peak_memory() > 2**20
    with pytest.raises(PeerError, match="unknown command 'fly'"):
        process.call("fly")


def test_the_end_of_a_process_is_said_with_its_last_words(process: PeerProcess) -> None:
    with pytest.raises(PeerError, match="no room"):
        process.load(LoadOptions("x", "float32", 8))
    os.kill(process.process.pid, signal.SIGKILL)
    with pytest.raises(
        PeerError, match=r"ended by signal 9 \(as when memory runs out\) in 'run'; it last said: .*last"
    ):
        process.run([Request([1], 1)])


def test_nothing_that_a_process_started_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pid"
    (tmp_path / "llama_cpp.py").write_text(
        f"import subprocess\np = subprocess.Popen(['sleep', '60'])\nopen({str(file)!r}, 'w').write(str(p.pid))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with PeerProcess(InstalledEngine("llama.cpp")) as process, pytest.raises(PeerError, match="llama_backend_init"):
        process.load(LoadOptions("x", "float32", 8))
    deadline = time.monotonic() + 30
    while _is_alive(int(file.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_children_get_threads_and_may_cache_byte_code() -> None:
    found = child_environment({"PYTHONDONTWRITEBYTECODE": "1", "HOME": "/home", "PYTHONPATH": "mine"}, 3)
    assert found["OMP_NUM_THREADS"] == "3"
    assert (found["HOME"], found["PYTHONPATH"]) == ("/home", "mine")
    assert "PYTHONDONTWRITEBYTECODE" not in found
    assert "OMP_NUM_THREADS" not in child_environment({}, None)


def test_our_own_interpreter_finds_this_package() -> None:
    found = child_environment({"PYTHONPATH": "mine"}, 1, own=True)["PYTHONPATH"].split(os.pathsep)
    assert (Path(found[0]) / "npu_zoo").is_dir()
    assert found[1:] == ["mine"]
