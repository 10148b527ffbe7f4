from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.platforms.findings import Finding
from npu_zoo.platforms.ports import PortUser, check_ports, free_port, parse_port_range, port_in_use, port_users


@pytest.fixture(params=[(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::1")])
def listener(request: pytest.FixtureRequest) -> Iterator[int]:
    """A port that this process listens on."""
    family, address = request.param
    try:
        server = socket.socket(family, socket.SOCK_STREAM)
        server.bind((address, 0))
    except OSError as error:
        pytest.skip(f"no {address}: {error}")
    with server:
        server.listen()
        yield server.getsockname()[1]


def test_a_port_that_is_listened_on_is_in_use_and_its_user_is_named(listener: int) -> None:
    assert port_in_use(listener)
    assert os.getpid() in [user.pid for user in port_users(listener)]


def test_a_closed_port_is_free_again_at_once(listener: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server.accept()[0].close()
            client.recv(1)
        assert port_in_use(port)
    assert not port_in_use(port)
    assert port_users(port) == []


def test_the_next_free_port() -> None:
    assert free_port(20, 30, lambda port: port < 25) == 25
    assert free_port(20, 22, lambda port: True) is None


def kernel(proc: Path, lines: list[str]) -> Path:
    (proc / "net").mkdir(parents=True)
    header = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"
    (proc / "net" / "tcp").write_text("\n".join([header, *lines, "garbage"]) + "\n")
    return proc


def row(port: int, state: str, inode: int) -> str:
    return f"   0: 00000000:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 0 0 {inode} 1 0"


def test_users_come_from_the_kernel_s_tables(tmp_path: Path) -> None:
    proc = kernel(tmp_path, [row(60000, "0A", 11), row(60000, "01", 12), row(60001, "0A", 13)])
    for pid, name, inode in ((7, "trainer", 11), (8, "client", 12), (9, "other", 13)):
        (proc / str(pid) / "fd").mkdir(parents=True)
        (proc / str(pid) / "comm").write_text(f"{name}\n")
        (proc / str(pid) / "fd" / "3").symlink_to(f"socket:[{inode}]")
    (proc / "10").mkdir()  # another user's process: no descriptors to be read
    assert port_users(60000, proc) == [PortUser(7, "trainer")]
    assert str(port_users(60001, proc)[0]) == "other (pid 9)"
    assert port_users(1, proc) == []


def test_without_the_kernel_s_tables_nobody_is_named(tmp_path: Path) -> None:
    assert port_users(60000, tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("60000", [60000]),
        ("60000,60050-60052", [60000, 60050, 60051, 60052]),
        ("", None),
        ("60010-60000", None),
        ("0", None),
        ("65536", None),
        ("a-b", None),
        ("1-2-3", None),
    ],
)
def test_lists_of_ports(text: str, ports: list[int] | None) -> None:
    assert parse_port_range(text) == ports


@given(st.text(max_size=20))
def test_any_text_is_a_list_of_ports_or_none(text: str) -> None:
    ports = parse_port_range(text)
    assert ports is None or (ports and all(0 < port <= 65535 for port in ports))


def look(environ: dict[str, str], *taken: int) -> list[Finding]:
    return check_ports(environ, lambda port: port in taken, lambda port: [PortUser(5, "python")])


def test_free_ports_of_a_run_on_several_devices() -> None:
    found = look({})
    assert [finding.status for finding in found] == ["ok", "ok", "ok"]
    assert "port 20030 is free" in found[0].message
    assert "ports 60000 to 60031 are free" in found[1].message
    assert "port 16666 is free" in found[2].message


def test_taken_ports_name_who_has_them_and_another_choice() -> None:
    master, hccl, npu = look({}, 20030, 20031, 60003, 60004, 16666)
    assert (master.status, hccl.status, npu.status) == ("warning", "warning", "warning")
    assert "port 20030 is taken by python (pid 5)" in master.message
    assert master.advice == "export MASTER_PORT=20032"
    assert "60003, 60004 are taken by python (pid 5)" in hccl.message
    assert hccl.advice == "export HCCL_IF_BASE_PORT=60032"
    assert "HCCL_NPU_SOCKET_PORT_RANGE" in npu.advice


def test_the_environment_moves_the_ports() -> None:
    environ = {"MASTER_PORT": "20040", "HCCL_IF_BASE_PORT": "50000", "HCCL_NPU_SOCKET_PORT_RANGE": "61000-61002"}
    assert [f.status for f in look(environ, 20030, 60000, 16666)] == ["ok", "ok", "ok"]
    assert [f.status for f in look(environ, 20040, 50015, 61001)] == ["warning", "warning", "warning"]


def test_a_range_of_the_host_goes_before_the_base_port() -> None:
    environ = {"HCCL_HOST_SOCKET_PORT_RANGE": "50000", "HCCL_IF_BASE_PORT": "60000"}
    assert look(environ, 60000)[1].status == "ok"
    assert look(environ, 50000)[1].status == "warning"
    assert look({"HCCL_HOST_SOCKET_PORT_RANGE": "auto"}, 60000)[1].status == "ok"


@pytest.mark.parametrize(
    ("name", "value", "position"),
    [
        ("MASTER_PORT", "http", 0),
        ("MASTER_PORT", "70000", 0),
        ("HCCL_IF_BASE_PORT", "65530", 1),
        ("HCCL_IF_BASE_PORT", "-1", 1),
        ("HCCL_HOST_SOCKET_PORT_RANGE", "all", 1),
        ("HCCL_NPU_SOCKET_PORT_RANGE", "5-1", 2),
    ],
)
def test_a_variable_that_is_no_port_is_a_problem(name: str, value: str, position: int) -> None:
    finding = look({name: value})[position]
    assert finding.status == "problem"
    assert f"{name}={value}" in finding.message
    assert finding.advice.startswith(f"export {name}=")
