from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.errors import HardwareError, UsageError
from npu_zoo.parallel.ports import (
    LaunchPort,
    PortChoice,
    choose_master_port,
    describe_ports,
    launch_ports,
    require_launch,
)
from npu_zoo.platforms.ports import PortUser, port_in_use

A2, DUO = "atlas_800i_a2", "atlas_300i_duo"


def busy(*ports: int) -> Callable[[int], bool]:
    return frozenset(ports).__contains__


def trainer(port: int) -> list[PortUser]:
    return [PortUser(5, "trainer")]


def choose(environ: dict[str, str], *taken: int, reserved: tuple[int, ...] = ()) -> PortChoice:
    return choose_master_port(environ, busy(*taken), trainer, reserved)


def launch(environ: dict[str, str], *taken: int, hardware: str = A2, world_size: int = 8) -> list[LaunchPort]:
    return launch_ports(world_size, hardware, environ, busy(*taken), trainer)


@pytest.fixture
def listener() -> Iterator[int]:
    """A port that this process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


# The port on which the ranks meet


def test_the_default_where_it_is_free() -> None:
    assert choose({}) == PortChoice(20030, "default")
    assert choose({"MASTER_PORT": "  "}) == PortChoice(20030, "default")


def test_a_port_that_was_asked_for_is_taken_as_it_is() -> None:
    assert choose({"MASTER_PORT": "29500"}, 20030) == PortChoice(29500, "MASTER_PORT")


@pytest.mark.parametrize(
    ("taken", "port"),
    [
        (range(20030, 20033), 20033),
        (range(20030, 20051), 20000),
        (range(20000, 20051), 20051),
        (range(20000, 65536), 1024),
    ],
)
def test_another_is_found_near_by_first_and_reported(taken: range, port: int) -> None:
    choice = choose({}, *taken)
    assert (choice.port, choice.source) == (port, "found")
    assert "port 20030 is taken by trainer (pid 5)" in choice.note
    assert f"MASTER_PORT={port}" in choice.note


def test_without_any_free_port_it_says_so() -> None:
    with pytest.raises(HardwareError, match=r"20030 is taken by trainer .* and no other TCP port"):
        choose({}, *range(1, 65536))


@pytest.mark.parametrize("value", ["http", "0", "65536", "-1", "٢٠٠٣٠", "9" * 5000])
def test_what_is_no_port_is_refused(value: str) -> None:
    with pytest.raises(HardwareError, match="is no port; export MASTER_PORT=20030"):
        choose({"MASTER_PORT": value})


def test_ports_that_hccl_takes_are_left_to_it() -> None:
    assert choose({}, reserved=(20030, 20031)).port == 20032
    with pytest.raises(
        HardwareError, match="MASTER_PORT=60005 is one of those that HCCL takes; export MASTER_PORT=20030"
    ):
        choose({"MASTER_PORT": "60005"}, reserved=tuple(range(60000, 60032)))


def test_a_port_that_is_really_in_use_names_its_user(listener: int) -> None:
    with pytest.raises(HardwareError) as refused:
        choose_master_port({"MASTER_PORT": str(listener)})
    text = str(refused.value)
    assert f"MASTER_PORT={listener} is taken by" in text
    assert f"(pid {os.getpid()})" in text
    advised = int(text.split("export MASTER_PORT=")[1].split(",")[0])
    assert not port_in_use(advised)


@given(st.sets(st.integers(19990, 20060)), st.sets(st.integers(20025, 20035)), st.text(max_size=6))
def test_whatever_is_chosen_is_free(taken: set[int], reserved: set[int], asked: str) -> None:
    try:
        choice = choose({"MASTER_PORT": asked}, *taken, reserved=tuple(reserved))
    except HardwareError:
        assert asked.strip()
        return
    assert choice.port not in taken | reserved
    assert bool(choice.note) == (choice.source == "found")


# What a launch takes


def test_a_launch_on_npus() -> None:
    master, host, npu = launch({})
    assert (master.ports, master.source) == ((20030,), "default")
    assert (host.ports, host.source) == (tuple(range(60000, 60032)), "default")
    assert (npu.ports, npu.source) == ((16666,), "default")
    assert not any(port.problem or port.taken or port.note for port in (master, host, npu))


@pytest.mark.parametrize("hardware", ["cpu", "cuda"])
def test_elsewhere_the_ranks_only_meet(hardware: str) -> None:
    (master,) = launch({"HCCL_IF_BASE_PORT": "no port"}, hardware=hardware)
    assert master.ports == (20030,)


def test_a_single_rank_takes_none() -> None:
    assert launch({"MASTER_PORT": "no port"}, world_size=1) == []
    with pytest.raises(UsageError, match="1 rank at least"):
        launch({}, world_size=0)


def test_the_environment_names_the_ports() -> None:
    environ = {"MASTER_PORT": "20040", "HCCL_IF_BASE_PORT": "50000", "HCCL_NPU_SOCKET_PORT_RANGE": "61000-61002,61010"}
    master, host, npu = launch(environ, 20030, 60000, 16666)
    assert (master.ports, master.source) == ((20040,), "MASTER_PORT")
    assert (host.ports[0], host.ports[-1], host.source) == (50000, 50031, "HCCL_IF_BASE_PORT")
    assert (npu.ports, npu.source) == ((61000, 61001, 61002, 61010), "HCCL_NPU_SOCKET_PORT_RANGE")
    require_launch([master, host, npu])


def test_the_highest_base_ends_with_the_last_port() -> None:
    assert launch({"HCCL_IF_BASE_PORT": "65520"})[1].ports == tuple(range(65520, 65536))


def test_a_range_of_the_host_goes_before_the_base() -> None:
    environ = {"HCCL_HOST_SOCKET_PORT_RANGE": "50000-50001", "HCCL_IF_BASE_PORT": "nonsense"}
    assert launch(environ)[1].ports == (50000, 50001)
    auto = launch({"HCCL_HOST_SOCKET_PORT_RANGE": "auto"}, *range(60000, 60032))[1]
    assert (auto.ports, auto.problem, auto.note) == ((), "", "the system chooses")


def test_a_range_fails_where_all_of_it_is_taken() -> None:
    environ = {"HCCL_HOST_SOCKET_PORT_RANGE": "50000-50001"}
    some, every = launch(environ, 50000)[1], launch(environ, 50000, 50001)[1]
    assert (some.taken, some.problem) == ((50000,), "")
    assert "50000-50001 are taken by trainer (pid 5)" in every.problem
    assert every.advice == "export HCCL_HOST_SOCKET_PORT_RANGE=auto"


def test_the_base_fails_where_one_port_is_taken_and_another_base_is_offered() -> None:
    host = launch({}, 60003, 60031, 60040)[1]
    assert host.taken == (60003, 60031)
    assert host.users == (PortUser(5, "trainer"),)
    assert host.problem == "HCCL needs 60000-60031, and ports 60003, 60031 are taken by trainer (pid 5)"
    assert host.advice == "export HCCL_IF_BASE_PORT=60064"
    assert launch({"HCCL_IF_BASE_PORT": host.advice.partition("=")[2]}, 60003, 60031, 60040)[1].problem == ""
    assert launch({}, *range(1024, 65536))[1].advice == "end what listens on them"


def test_a_duo_card_reads_no_ranges() -> None:
    environ = {"HCCL_HOST_SOCKET_PORT_RANGE": "auto", "HCCL_NPU_SOCKET_PORT_RANGE": "auto"}
    _, host, npu = launch(environ, 60000, 16666, hardware=DUO)
    assert host.ports[0] == 60000
    assert "does not read HCCL_HOST_SOCKET_PORT_RANGE on this chip" in host.note
    assert host.problem
    assert npu.ports == (16666,)
    assert "export" not in npu.note


def test_a_listener_at_the_host_does_not_hold_the_npu_s_port() -> None:
    npu = launch({}, 16666)[2]
    assert (npu.taken, npu.problem) == ((16666,), "")
    assert "16666 is taken by trainer (pid 5) at the host" in npu.note
    assert "export HCCL_NPU_SOCKET_PORT_RANGE=auto in every rank" in npu.note


def test_the_ranks_do_not_meet_on_a_port_of_hccl() -> None:
    master, host, _ = launch({"HCCL_IF_BASE_PORT": "20020"})
    assert 20030 in host.ports
    assert master.ports == (20000,)
    assert not set(master.ports) & set(host.ports)


@pytest.mark.parametrize(
    ("name", "value", "position"),
    [
        ("MASTER_PORT", "http", 0),
        ("HCCL_IF_BASE_PORT", "80", 1),
        ("HCCL_IF_BASE_PORT", "65521", 1),
        ("HCCL_HOST_SOCKET_PORT_RANGE", "2-1", 1),
        ("HCCL_NPU_SOCKET_PORT_RANGE", "off", 2),
    ],
)
def test_a_value_that_is_none_is_a_problem_of_its_ports(name: str, value: str, position: int) -> None:
    found = launch({name: value})
    assert [bool(port.problem) for port in found] == [index == position for index in range(3)]
    assert f"{name}={value}" in found[position].problem
    assert found[position].advice.startswith(f"export {name}=")


def test_every_problem_is_told_before_the_start() -> None:
    found = launch({"MASTER_PORT": "20040", "HCCL_NPU_SOCKET_PORT_RANGE": "x"}, 20040, 60000)
    with pytest.raises(HardwareError) as refused:
        require_launch(found)
    lines = str(refused.value).splitlines()
    assert len(lines) == 4
    assert "MASTER_PORT=20040 is taken by trainer (pid 5); export MASTER_PORT=20030, or unset it" in lines[1]
    assert "export HCCL_IF_BASE_PORT=60032" in lines[2]
    assert found[0].taken == (20040,)
    require_launch([])


def test_ports_as_runs() -> None:
    assert describe_ports([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"
    assert describe_ports([]) == ""
