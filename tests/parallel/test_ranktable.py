from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.errors import ConfigError
from npu_zoo.parallel.ranktable import (
    RankTable,
    check_rank_table,
    make_rank_table,
    parse_server,
    read_hccn,
    write_rank_table,
)

# The example of HCCL's user guide for Atlas A2 products: two servers of two devices.
DOCUMENTED: dict[str, Any] = {
    "status": "completed",
    "version": "1.0",
    "server_count": "2",
    "server_list": [
        {
            "server_id": "node_0",
            "device": [
                {"device_id": "0", "device_ip": "192.168.1.8", "device_port": "16667", "rank_id": "0"},
                {"device_id": "1", "device_ip": "192.168.1.9", "device_port": "16667", "rank_id": "1"},
            ],
        },
        {
            "server_id": "node_1",
            "device": [
                {"device_id": "0", "device_ip": "192.168.2.8", "device_port": "16667", "rank_id": "2"},
                {"device_id": "1", "device_ip": "192.168.2.9", "device_port": "16667", "rank_id": "3"},
            ],
        },
    ],
}
SINGLE = [("node_0", [(0, None), (1, None)])]


def changed(*changes: tuple[tuple[str | int, ...], Any]) -> str:
    """The documented table with other values at some places; None takes one out."""
    table = json.loads(json.dumps(DOCUMENTED))
    for path, value in changes:
        part = table
        for step in path[:-1]:
            part = part[step]
        if value is None:
            del part[path[-1]]
        else:
            part[path[-1]] = value
    return json.dumps(table)


def device(server: int, position: int, field: str) -> tuple[str | int, ...]:
    return ("server_list", server, "device", position, field)


def faults(text: str, hardware: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        check_rank_table(text, hardware)
    first, *rest = str(refused.value).splitlines()
    assert first == ("the rank table has a fault:" if len(rest) == 1 else f"the rank table has {len(rest)} faults:")
    return [line.strip() for line in rest]


# Checking


@pytest.mark.parametrize("hardware", [None, "atlas_800i_a2", "atlas_800t_a2", "atlas_300i_duo"])
def test_the_documented_example_is_fit(hardware: str | None) -> None:
    table = check_rank_table(json.dumps(DOCUMENTED), hardware)
    assert table.world_size == 4
    assert [[d.rank for d in server.device] for server in table.server_list] == [[0, 1], [2, 3]]
    assert table.server_list[1].device[0].addresses == ["192.168.2.8"]
    assert json.loads(table.to_json()) == DOCUMENTED


def test_what_other_tools_add_is_passed_over() -> None:
    places = [("server_list", 0, "container_ip"), ("server_list", 0, "hardware_type"), device(0, 0, "super_device_id")]
    text = changed(*((place, "x") for place in places), (("server_list", 1, "host_nic_ip"), "reserve"))
    assert check_rank_table(text).world_size == 4
    assert check_rank_table("\ufeff" + text).world_size == 4


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ((("status",), "initializing"), "status is 'initializing'; HCCL takes a table that is 'completed'"),
        ((("server_count",), "3"), "server_count is 3, and server_list has 2"),
        ((("server_list", 1, "server_id"), "node_0"), "server_id node_0 is given to 2 servers"),
        ((device(0, 1, "device_id"), "0"), "server node_0 has device 0 2 times"),
        ((device(0, 1, "device_id"), "16"), "server node_0 has device 16; numbers go from 0 to 15"),
        ((device(0, 1, "device_port"), "0"), "rank 1 has device_port 0; ports go from 1 to 65535"),
        ((device(0, 1, "device_port"), "65536"), "rank 1 has device_port 65536; ports go from 1 to 65535"),
        (
            (device(0, 0, "device_ip"), "192.168.1.256"),
            "device 0 of server node_0 has the address '192.168.1.256', which is none of a network card",
        ),
        (
            (device(0, 0, "device_ip"), "0.0.0.0"),
            "device 0 of server node_0 has the address '0.0.0.0', which is none of a network card",
        ),
        (
            (device(1, 1, "device_ip"), "192.168.1.8"),
            "address 192.168.1.8 is given to device 0 of server node_0 and device 1 of server node_1",
        ),
        ((device(0, 0, "device_ip"), "fe80::1"), "addresses are of IPv4 and of IPv6; HCCL takes one of both"),
        ((device(1, 0, "device_ip"), None), "device_ip is missing of rank 2; servers reach each other by it"),
        ((device(1, 0, "device_ip"), ""), "device_ip is missing of rank 2; servers reach each other by it"),
        (
            (device(1, 0, "device_ip"), "192.168.2.8,192.168.2.7"),
            "devices have different numbers of addresses in device_ip; HCCL takes as many for each",
        ),
        (
            (("server_list", 0, "host_nic_ip"), "eth0"),
            "server node_0 has host_nic_ip 'eth0', which is no address nor 'reserve'",
        ),
    ],
)
def test_a_fault_is_named(change: tuple[tuple[str | int, ...], Any], fault: str) -> None:
    assert faults(changed(change)) == [fault]


def test_ranks_count_from_0_without_a_gap() -> None:
    assert faults(changed((device(1, 1, "rank_id"), "4"))) == [
        "of ranks 0 to 3, 3 is missing",
        "rank 4 is beyond the 4 devices of the table",
    ]
    assert faults(changed((device(1, 1, "rank_id"), "0"))) == [
        "of ranks 0 to 3, 3 is missing",
        "rank 0 is given to 2 devices",
    ]


def test_ranks_of_servers_do_not_mix() -> None:
    assert faults(changed((device(0, 1, "rank_id"), "2"), (device(1, 0, "rank_id"), "1"))) == [
        "server node_0 has ranks 0, 2; by the order of servers its are 0, 1",
        "server node_1 has ranks 1, 3; by the order of servers its are 2, 3",
    ]
    within = changed((device(0, 0, "rank_id"), "1"), (device(0, 1, "rank_id"), "0"))
    assert check_rank_table(within).world_size == 4


def test_every_fault_is_listed_at_once() -> None:
    found = faults(
        changed(
            (("status",), "initializing"),
            (("server_count",), None),
            (device(0, 0, "device_ip"), "nowhere"),
            (device(0, 1, "device_id"), "0"),
            (device(1, 1, "rank_id"), 7),
        )
    )
    for words in (
        "server_count: field required",
        "rank_id: ",
        "status is",
        "'nowhere'",
        "device 0 2 times",
        "rank 7 is",
    ):
        assert any(words in fault for fault in found), (words, found)
    assert len(found) == 7


def test_numbers_must_be_strings_as_hccl_reads_nothing_else() -> None:
    found = faults(changed((device(0, 0, "rank_id"), 0), (("server_count",), 2)))
    assert [fault.split(": ")[0] for fault in found] == ["server_count", "server_list.0.device.0.rank_id"]
    assert all("valid string" in fault for fault in found)


def test_a_single_server_needs_no_addresses_but_all_or_none() -> None:
    assert make_rank_table(SINGLE).server_list[0].device[0].device_ip is None
    with pytest.raises(ConfigError, match="device_ip is missing of rank 1; the other ranks have one"):
        make_rank_table([("node_0", [(0, "10.0.0.1"), (1, None)])])


def test_limits_of_products() -> None:
    nine = [("node_0", [(number, f"10.0.0.{number + 1}") for number in range(9)])]
    assert make_rank_table(nine).world_size == 9
    with pytest.raises(ConfigError, match="server node_0 goes beyond devices 0 to 7, which Atlas 800I A2 has"):
        make_rank_table(nine, "atlas_800i_a2")
    three = [("node_0", [(0, "10.0.0.1"), (1, "10.0.0.2")]), ("node_1", [(0, "10.0.0.3")])]
    assert make_rank_table(three, "atlas_800i_a2").world_size == 3
    with pytest.raises(ConfigError) as refused:
        make_rank_table(three, "atlas_300i_duo")
    assert "server node_1 has 1 device; ranks take whole cards, and one of Atlas 300I Duo has 2" in str(refused.value)
    assert "servers have 1, 2 devices; on Atlas 300I Duo HCCL takes as many of each" in str(refused.value)
    with pytest.raises(ConfigError, match="without device_ip, which Atlas 300I Duo needs on a single server too"):
        make_rank_table(SINGLE, "atlas_300i_duo")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no JSON"),
        ("[]", "no JSON object"),
        ("[" * 100_000, "is no JSON"),
        ('{"version": ' + "9" * 5000 + "}", "is no JSON"),
        ('{"status": "a", "status": "b"}', "'status' more than once"),
        ('{"version": "1.0", // one\n}', "comments, which HCCL's examples have, must go"),
        ('{"version": "1.2"}', "of version 1.2; Atlas A2 products and the 300I Duo take 1.0"),
        ('{"group_count": "1", "group_list": []}', "of the old form, with group_list"),
        ("{}", "server_list: field required"),
        ('{"server_list": []}', "server_list: "),
        ('{"server_list": [{"server_id": "a", "device": []}]}', "server_list.0.device: "),
        (json.dumps({**DOCUMENTED, "server_list": "all"}), "server_list: "),
    ],
)
def test_other_texts_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_rank_table(text)
    assert words in str(refused.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["0", "1", "1.0", "completed"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*DOCUMENTED, "server_id", "device", *DOCUMENTED["server_list"][0]["device"][0]]), inner
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_a_table_or_refused(value: Any) -> None:
    try:
        table = check_rank_table(json.dumps(value))
    except ConfigError:
        return
    assert check_rank_table(table.to_json()) == table


@given(st.text(max_size=40))
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        check_rank_table(text)


@given(
    st.sampled_from([(s, d, f) for s in (0, 1) for d in (0, 1) for f in DOCUMENTED["server_list"][0]["device"][0]]),
    JSON,
)
def test_one_damaged_value(place: tuple[int, int, str], value: Any) -> None:
    text = changed((device(*place), value))
    try:
        table = check_rank_table(text)
    except ConfigError:
        return
    ranks = sorted(d.rank for server in table.server_list for d in server.device)
    assert ranks == list(range(4))
    assert len({address for server in table.server_list for d in server.device for address in d.addresses}) == 4


# Making


@given(st.lists(st.integers(1, 16), min_size=1, max_size=5))
def test_what_is_made_is_fit_and_counts_through(sizes: list[int]) -> None:
    servers = [(f"10.0.0.{n}", [(d, f"10.1.{n}.{d + 1}") for d in range(size)]) for n, size in enumerate(sizes)]
    made = json.loads(make_rank_table(servers).to_json())
    assert made["server_count"] == str(len(sizes))
    listed = [d for server in made["server_list"] for d in server["device"]]
    assert [d["rank_id"] for d in listed] == [str(rank) for rank in range(sum(sizes))]
    assert [d["device_ip"] for d in listed] == [ip for _, devices in servers for _, ip in devices]
    assert (made["version"], made["status"]) == ("1.0", "completed")


def test_servers_from_the_command_line() -> None:
    assert parse_server("10.0.0.1=0-2,6") == ("10.0.0.1", [(0, None), (1, None), (2, None), (6, None)])
    assert parse_server("a=0,1:1.1.1.1, 1.1.1.2") == ("a", [(0, "1.1.1.1"), (1, "1.1.1.2")])
    assert parse_server("fe80::1=0:fe80::2") == ("fe80::1", [(0, "fe80::2")])
    assert parse_server("a=1", {0: "1.1.1.1", 1: "1.1.1.2"}) == ("a", [(1, "1.1.1.2")])


@pytest.mark.parametrize("text", ["", "a", "a=", "=0", "a=x", "a=3-1", "a=0-", "a=-1", "a=0;1", "a=٣"])
def test_a_server_of_another_form(text: str) -> None:
    with pytest.raises(ConfigError, match="ADDRESS=DEVICES"):
        parse_server(text)


def test_addresses_and_devices_are_as_many() -> None:
    with pytest.raises(ConfigError, match="names 2 devices and 1 addresses"):
        parse_server("a=0,1:1.1.1.1")
    with pytest.raises(ConfigError, match=r"hccn.conf has no address of device 1, 2 of server a"):
        parse_server("a=0-2", {0: "1.1.1.1"})


HCCN = """\
address_0=192.168.1.8
netmask_0=255.255.255.0
netdetect_0=192.168.1.1
 address_1 = 192.168.1.9
IPv6address_2=fe80::1
address_10=192.168.1.18
"""


def test_addresses_of_hccn_conf() -> None:
    assert read_hccn(HCCN) == {0: "192.168.1.8", 1: "192.168.1.9", 10: "192.168.1.18"}
    assert read_hccn(HCCN + "address_0=192.168.1.8\n")[0] == "192.168.1.8"
    with pytest.raises(ConfigError, match=r"device 0 two addresses, 192\.168\.1\.8 and 192\.168\.1\.7"):
        read_hccn(HCCN + "address_0=192.168.1.7\n")
    with pytest.raises(ConfigError, match="no line such as address_0="):
        read_hccn("netmask_0=255.255.255.0\n")


# Writing


@pytest.fixture
def table() -> RankTable:
    return make_rank_table(SINGLE)


def test_a_file_is_written_whole_and_readable_to_others(tmp_path: Path, table: RankTable) -> None:
    before = os.umask(0o022)
    try:
        write_rank_table(table, tmp_path / "rt.json")
    finally:
        os.umask(before)
    assert check_rank_table((tmp_path / "rt.json").read_text()) == table
    assert stat.S_IMODE((tmp_path / "rt.json").stat().st_mode) == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["rt.json"]


def test_no_file_is_overwritten(tmp_path: Path, table: RankTable) -> None:
    path, link = tmp_path / "rt.json", tmp_path / "link.json"
    path.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    for there in (path, link, tmp_path):
        with pytest.raises(ConfigError, match="it exists; delete it or choose another name"):
            write_rank_table(table, there)
    assert path.read_text() == "mine"
    assert {found.name for found in tmp_path.iterdir()} == {"rt.json", "link.json"}


def test_a_folder_that_is_missing(tmp_path: Path, table: RankTable) -> None:
    with pytest.raises(ConfigError, match="No such file or directory; choose another directory"):
        write_rank_table(table, tmp_path / "no" / "rt.json")


@pytest.mark.parametrize("call", ["fsync", "link"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(
    call: str, error: BaseException, tmp_path: Path, table: RankTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ConfigError if isinstance(error, OSError) else KeyboardInterrupt):
        write_rank_table(table, tmp_path / "rt.json")
    assert list(tmp_path.iterdir()) == []
