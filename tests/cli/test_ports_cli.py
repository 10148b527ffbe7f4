"""``npu-zoo ports``: what a launch takes, and who has it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from npu_zoo.cli.ports import PORTS_KEYS

ROOT = Path(__file__).parents[2]


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Ran]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports of HCCL are the system's choice, so that what else runs here does not count."""
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("HCCL_HOST_SOCKET_PORT_RANGE", "auto")
    monkeypatch.setenv("HCCL_NPU_SOCKET_PORT_RANGE", "auto")


@pytest.fixture
def listener() -> Iterator[int]:
    """A port that this process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_launch_that_can_start(cli: Cli) -> None:
    ran = cli("ports", "--world-size", "4", "--hardware", "atlas_800i_a2")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == "4 ranks on atlas_800i_a2 take on this machine:"
    uses = [line.split("  ")[0] for line in lines[4:]]  # a port that another program happens to use takes more lines
    assert list(filter(None, uses)) == ["the ranks meet", "HCCL, at the host", "HCCL, at the NPU"]
    assert "the system chooses" in lines[4 + uses.index("HCCL, at the host")]
    assert max(map(len, lines)) <= 80


def test_a_port_in_use_names_its_user_and_what_to_do(cli: Cli, listener: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", str(listener))
    ran = cli("ports", "--hardware", "cpu")
    assert ran.code == 4
    words = " ".join(ran.out.split())
    assert f"in use: {listener} by" in words
    assert f"(pid {os.getpid()})" in words
    assert "-> export MASTER_PORT=" in words


def test_json_has_the_documented_keys(cli: Cli, listener: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_HOST_SOCKET_PORT_RANGE", str(listener))
    ran = cli("ports", "--hardware", "atlas_800t_a2", "--json")
    report = json.loads(ran.out)
    assert ran.code == 4
    assert {*report, *(f"ports[].{key}" for port in report["ports"] for key in port)} == set(PORTS_KEYS)
    assert report["world_size"] == 8
    _, host, _ = report["ports"]
    assert (host["ports"], host["taken"], host["source"]) == ([listener], [listener], "HCCL_HOST_SOCKET_PORT_RANGE")
    assert os.getpid() in [user["pid"] for user in host["users"]]
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").split("## `npu-zoo ports`")[1].split("\n## ")[0]
    assert [key for key in PORTS_KEYS if f"`{key}`" not in page] == []


def test_as_many_ranks_as_there_are_devices(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,2,3")
    assert cli("ports", "--hardware", "atlas_800i_a2").out.startswith("3 ranks on atlas_800i_a2")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "all")
    assert cli("ports", "--hardware", "atlas_300i_duo").out.startswith("2 ranks on atlas_300i_duo")
    assert cli("ports", "--world-size", "1").out == "a single rank takes no ports\n"


def test_wrong_values(cli: Cli) -> None:
    hardware = cli("ports", "--hardware", "atlas_900")
    assert (hardware.code, hardware.out) == (2, "")
    assert "unknown hardware 'atlas_900'; known: atlas_800i_a2" in hardware.err
    assert cli("ports", "--world-size", "0").code == 2


def test_neither_command_imports_torch(tmp_path: Path) -> None:
    program = """
import sys
from npu_zoo.cli import main
codes = [main(["ports", "--world-size", "2", "--hardware", "cpu"])]
codes += [main(["ranktable", "write", sys.argv[1], "--server", "a=0"])]
assert not {"torch", "torch_npu", "transformers"} & set(sys.modules)
sys.exit(max(codes))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "rt.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
