"""A run of two stages on two hosts, each started by ``npu-zoo launch``, and what becomes of it without one of them."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.cli import main

_SPEC = importlib.util.spec_from_file_location("namespaces", Path(__file__).with_name("namespaces.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
namespaces = sys.modules.setdefault("namespaces", importlib.util.module_from_spec(_SPEC))
_SPEC.loader.exec_module(namespaces)

ROOT = Path(__file__).parents[2]
MODEL = ["run", "--model", "deepseek_coder", "--dtype", "float32", "--json", "--prompt", "def add(a, b):"]
SHORT = ["--max-tokens", "12", "--ignore-eos"]
LONG = ["--max-tokens", "1900", "--ignore-eos"]
SPLIT = ["--tp", "2", "--pp", "2"]
ZOO = [sys.executable, "-m", "npu_zoo"]


@pytest.fixture
def hosts() -> Iterator[Any]:
    with namespaces.two_hosts() as pair:
        yield pair


@contextmanager
def launched(hosts: Any, *arguments: str, split: Sequence[str] = SPLIT) -> Iterator[list[subprocess.Popen[str]]]:
    """The same command on both hosts; none of it outlives the block."""
    with ExitStack() as stack:
        processes = []
        for number, host in enumerate(hosts):
            where = ["--nnodes", "2", "--node-rank", str(number), "--master-addr", hosts[0].address]
            command = [*ZOO, "launch", *where, "--", *MODEL, *split, *arguments]
            process = subprocess.Popen(
                host.command(*command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip
            stack.enter_context(process)
            stack.callback(_kill_session, process)
            processes.append(process)
        yield processes


def _kill_session(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def processes_of(host: Any) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True, check=True)
    return [int(pid) for pid in found.stdout.split()]


def without_times(line: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(line).items() if key != "timings"}


@pytest.mark.parametrize("split", [["--pp", "2"], pytest.param(SPLIT, marks=pytest.mark.long)], ids=" ".join)
def test_two_hosts_are_one_model(hosts: Any, split: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MODEL, *SHORT]) == 0
    alone = capsys.readouterr().out
    with launched(hosts, *SHORT, split=split) as processes:
        (out, err), (nothing, other_err) = (process.communicate(timeout=120) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], err + other_err
    assert without_times(out) == without_times(alone)
    assert nothing == ""
    assert [processes_of(host) for host in hosts] == [[], []]


def wait_for_steps(hosts: Any) -> None:
    """Until all ranks of both hosts are up and have had time to compute some steps."""
    deadline = time.monotonic() + 90
    while any(len(processes_of(host)) < 3 for host in hosts):  # the launcher and its two ranks
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(8)


@pytest.mark.long
def test_the_loss_of_a_host_ends_the_run_on_the_other(hosts: Any) -> None:
    with launched(hosts, *LONG) as processes:
        wait_for_steps(hosts)
        hosts[1].unplug()
        start = time.monotonic()
        _, err = processes[0].communicate(timeout=60)
        lasted = time.monotonic() - start
        _, other = processes[1].communicate(timeout=60)
    assert processes[0].returncode
    assert processes[1].returncode
    assert lasted < 20, err  # ten seconds, and the end of four processes on a busy machine
    assert "rank 2" in err or "rank 3" in err, err
    assert "is out of reach" in err, err
    assert "rank 0" in other, other
    assert "gone" in other, other
    assert [processes_of(host) for host in hosts] == [[], []]
