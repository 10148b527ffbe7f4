from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.errors import ConfigError, HardwareError
from npu_zoo.parallel import numa
from npu_zoo.parallel.numa import (
    BindPlan,
    NumaNode,
    RankBinding,
    Topology,
    apply,
    bus_ids,
    describe,
    describe_cpus,
    device_node,
    numa_nodes,
    parse_bind,
    parse_cpu_list,
    plan_binding,
    this_topology,
)

A2, DUO = "atlas_800i_a2", "atlas_300i_duo"


def node(number: int, first: int, last: int) -> NumaNode:
    """A node whose cores run one thread each."""
    return NumaNode(number, tuple((cpu,) for cpu in range(first, last + 1)))


TWO = Topology((node(0, 0, 23), node(1, 24, 47)))
ONE = Topology((node(0, 0, 7),))


def sysfs(root: Path, cpulists: dict[int, str], siblings: dict[int, str] | None = None) -> Path:
    """A ``/sys`` with nodes, and with the threads of some cores."""
    for number, text in cpulists.items():
        folder = root / f"sys/devices/system/node/node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(text + "\n")
    for cpu, text in (siblings or {}).items():
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    return root


def driver(root: Path, *numbers: int) -> Path:
    (root / "dev").mkdir(exist_ok=True)
    for number in numbers:
        (root / f"dev/davinci{number}").touch()
    return root


def pci(root: Path, nodes: dict[str, str]) -> Path:
    for address, text in nodes.items():
        folder = root / "sys/bus/pci/devices" / address
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(text + "\n")
    return root


def npu_smi(*addresses: str) -> str:
    """What ``npu-smi info`` prints of devices at these addresses."""
    rows = ["| NPU   Name | Health | Power(W) Temp(C) |", "| Chip | Bus-Id | AICore(%) Memory-Usage(MB) |"]
    for number, address in enumerate(addresses):
        rows += [f"| {number} 910B4 | OK | 88.9 36 0 / 0 |", f"| 0 | {address} | 0 0 / 0 2790 / 32768 |"]
    return "\n".join([*rows, "| No running processes found in NPU 0 |"])


def cpus(plan: BindPlan) -> list[str]:
    return [describe_cpus(binding.cpus) for binding in plan.bindings]


def nodes(plan: BindPlan) -> list[tuple[int, ...]]:
    return [binding.nodes for binding in plan.bindings]


# What the machine tells


def test_nodes_with_their_cores(tmp_path: Path) -> None:
    threads = {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5"}
    root = sysfs(tmp_path, {0: "0-1,4-5", 1: "2-3,6-7", 10: "", 2: "garbage"}, threads)
    (root / "sys/devices/system/node/has_cpu").write_text("0-1\n")
    found = numa_nodes(root)
    assert [(n.number, n.cores) for n in found] == [(0, ((0, 4), (1, 5))), (1, ((2,), (3,), (6,), (7,)))]
    assert found[0].cpus == (0, 1, 4, 5)
    assert numa_nodes(tmp_path / "nowhere") == []


def test_the_nodes_of_this_machine_have_its_cpus() -> None:
    found = {cpu for each in numa_nodes() for cpu in each.cpus}
    if not found:
        pytest.skip("the kernel shows no nodes")
    assert found >= os.sched_getaffinity(0)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0-3,8\n", (0, 1, 2, 3, 8)),
        ("", ()),
        ("5", (5,)),
        ("3-1", None),
        ("a", None),
        ("0,", None),
        ("0-9999999", None),
    ],
)
def test_lists_of_the_kernel(text: str, numbers: tuple[int, ...] | None) -> None:
    assert parse_cpu_list(text) == numbers


@given(st.sets(st.integers(0, 300)))
def test_a_list_and_back(numbers: set[int]) -> None:
    assert parse_cpu_list(describe_cpus(sorted(numbers))) == tuple(sorted(numbers))


@given(st.text(max_size=12))
def test_any_text_is_a_list_or_none(text: str) -> None:
    found = parse_cpu_list(text)
    assert found is None or list(found) == sorted(set(found))


def test_addresses_of_npu_smi() -> None:
    assert bus_ids(npu_smi("0000:C1:00.0", "0000:02:00.0")) == ["0000:C1:00.0", "0000:02:00.0"]
    assert bus_ids("dcmi module initialize failed. ret is -8005") == []


def test_a_device_s_node_by_its_pci_address(tmp_path: Path) -> None:
    root = pci(driver(tmp_path, 0, 1, 2), {"0000:c1:00.0": "1", "0000:c2:00.0": "-1"})
    addresses = ["0000:C1:00.0", "0000:C2:00.0", "0000:C3:00.0"]
    assert [device_node(device, root, addresses) for device in range(4)] == [1, None, None, None]


def test_the_driver_s_own_entry_goes_first(tmp_path: Path) -> None:
    root = pci(driver(tmp_path, 4, 5), {"0000:c1:00.0": "1"})
    own = root / "sys/class/devdrv-class/davinci4/device"
    own.mkdir(parents=True)
    (own / "numa_node").write_text("3\n")
    assert device_node(0, root, ["0000:C1:00.0"]) == 3
    (own / "numa_node").write_text("-1\n")
    assert device_node(0, root, ["0000:C1:00.0"]) == 1


def test_a_machine_s_topology(tmp_path: Path) -> None:
    root = pci(driver(sysfs(tmp_path, {0: "0-3", 1: "4-7"}), 0, 1), {"0000:c1:00.0": "0", "0000:02:00.0": "1"})
    asked: list[int] = []

    def smi() -> str:
        asked.append(1)
        return npu_smi("0000:02:00.0", "0000:C1:00.0")

    found = this_topology(True, root, smi, allowed={0, 1, 2, 3, 4})
    assert [n.cpus for n in found.nodes] == [(0, 1, 2, 3), (4,)]
    assert (found.device_files, found.device_nodes) == ((0, 1), {0: 1, 1: 0})
    assert this_topology(False, root, smi, allowed=range(8)).device_nodes is None
    assert asked == [1]


def test_a_list_of_other_devices_tells_nothing(tmp_path: Path) -> None:
    root = pci(driver(sysfs(tmp_path, {0: "0-3"}), 0, 1), {"0000:c1:00.0": "0"})
    assert this_topology(True, root, lambda: npu_smi("0000:C1:00.0"), allowed=range(4)).device_nodes == {}


# Plans of NPUs


def test_each_rank_is_bound_beside_its_device() -> None:
    topology = Topology(TWO.nodes, (0, 1, 2, 3), {0: 1, 1: 1, 2: 0, 3: 0})
    plan = plan_binding("auto", A2, 4, {}, topology)
    assert nodes(plan) == [(1,), (1,), (0,), (0,)]
    assert cpus(plan) == ["24-47", "24-47", "0-23", "0-23"]
    assert plan.notes == ()
    chosen = plan_binding("auto", A2, 2, {"ASCEND_RT_VISIBLE_DEVICES": "3,0"}, topology)
    assert [(b.device, b.nodes) for b in chosen.bindings] == [(3, (0,)), (0, (1,))]


def test_the_fallback_spreads_a_full_machine_in_order_and_says_so() -> None:
    plan = plan_binding("auto", A2, 8, {}, TWO)
    assert nodes(plan) == [(0,)] * 4 + [(1,)] * 4
    assert "0-3 to node 0, 4-7 to node 1" in plan.notes[0]
    assert "--bind MAP" in plan.notes[0]
    assert all("guess" in binding.reason for binding in plan.bindings)
    assert nodes(plan_binding("auto", A2, 2, {}, TWO)) == [(0,), (0,)]


def test_the_fallback_goes_by_the_driver_s_numbers() -> None:
    container = Topology(TWO.nodes, (4, 5))
    assert nodes(plan_binding("auto", A2, 2, {}, container)) == [(1,), (1,)]
    assert nodes(plan_binding("auto", DUO, 4, {}, Topology(TWO.nodes, (0, 1, 2, 3)))) == [(0,), (0,), (1,), (1,)]


def test_only_devices_that_nobody_tells_of_are_guessed() -> None:
    plan = plan_binding("auto", A2, 2, {}, Topology(TWO.nodes, (0, 1), {0: 1}))
    assert nodes(plan) == [(1,), (0,)]
    assert "node of device 1:" in plan.notes[0]


def test_one_node_needs_no_guess() -> None:
    plan = plan_binding("auto", A2, 2, {}, ONE)
    assert (nodes(plan), plan.notes) == ([(0,), (0,)], ())


def test_a_node_without_usable_cpus_is_told() -> None:
    topology = Topology((node(0, 0, 3), NumaNode(1, ())), (0, 1), {0: 0, 1: 1})
    plan = plan_binding("auto", A2, 2, {}, topology)
    assert nodes(plan) == [(0,), ()]
    assert "has no CPU that this process may use" in plan.bindings[1].reason
    assert "node 1 has no CPU" in plan.notes[0]


def test_too_few_devices_are_left() -> None:
    with pytest.raises(HardwareError, match=r"2 ranks were asked for .* leaves 1; name 2 there"):
        plan_binding("auto", A2, 2, {"ASCEND_RT_VISIBLE_DEVICES": "0"}, TWO)


# Plans of CPUs


def test_ranks_of_a_cpu_have_cores_of_their_own() -> None:
    plan = plan_binding("auto", "cpu", 4, {"ASCEND_RT_VISIBLE_DEVICES": "0"}, TWO)
    assert nodes(plan) == [(0,), (0,), (1,), (1,)]
    assert cpus(plan) == ["0-11", "12-23", "24-35", "36-47"]
    assert [binding.device for binding in plan.bindings] == [None] * 4


def test_threads_of_a_core_stay_together() -> None:
    topology = Topology((NumaNode(0, ((0, 4), (1, 5), (2, 6), (3, 7))),))
    assert cpus(plan_binding("auto", "cpu", 2, {}, topology)) == ["0-1,4-5", "2-3,6-7"]


def test_fewer_ranks_than_nodes_take_several() -> None:
    four = Topology(tuple(node(n, 4 * n, 4 * n + 3) for n in range(4)))
    assert nodes(plan_binding("auto", "cpu", 2, {}, four)) == [(0, 1), (2, 3)]
    assert cpus(plan_binding("auto", "cpu", 3, {}, four)) == ["0-3", "4-7", "8-15"]


def test_a_single_rank_is_left_alone() -> None:
    (binding,) = plan_binding("auto", "cpu", 1, {}, TWO).bindings
    assert (binding.cpus, binding.nodes) == ((), ())


def test_more_ranks_than_cores_share_them_and_say_so() -> None:
    plan = plan_binding("auto", "cpu", 3, {}, Topology((node(0, 0, 1),)))
    assert cpus(plan) == ["0", "1", "0"]
    assert "shares" in plan.bindings[0].reason


def test_without_nodes_nothing_is_bound() -> None:
    for hardware in ("cpu", A2):
        plan = plan_binding("auto", hardware, 2, {}, Topology(()))
        assert (nodes(plan), cpus(plan)) == ([(), ()], ["", ""])
        assert "no node" in plan.bindings[0].reason


@given(st.integers(1, 12), st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_cores_are_given_once_and_fairly(num_ranks: int, sizes: list[int]) -> None:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    topology = Topology(tuple(node(n, s, s + size - 1) for n, (s, size) in enumerate(zip(starts, sizes, strict=True))))
    plan = plan_binding("auto", "cpu", num_ranks, {}, topology)
    assert len(plan.bindings) == num_ranks
    if num_ranks == 1 or not sum(sizes):
        return
    assert all(binding.cpus for binding in plan.bindings)
    by_node = {n: [b for b in plan.bindings if n in b.nodes] for n in range(len(sizes))}
    for number, its in by_node.items():
        given = [cpu for binding in its for cpu in binding.cpus if cpu in topology.nodes[number].cpus]
        if len(its) <= sizes[number]:
            assert len(given) == len(set(given))
            assert not its or len(given) == sizes[number]


# none and maps


def test_none_binds_nothing() -> None:
    for hardware, device in (("cpu", None), (A2, 0)):
        plan = plan_binding("none", hardware, 2, {}, TWO)
        assert (nodes(plan), cpus(plan)) == ([(), ()], ["", ""])
        assert plan.bindings[0].device == device


def test_a_map_names_the_node_of_each_device() -> None:
    plan = plan_binding("0-3:1,4-7:0", A2, 8, {}, TWO)
    assert nodes(plan) == [(1,)] * 4 + [(0,)] * 4
    assert cpus(plan)[0] == "24-47"
    chosen = plan_binding("0-3:1,4-7:0", A2, 1, {"ASCEND_RT_VISIBLE_DEVICES": "5"}, TWO)
    assert nodes(chosen) == [(0,)]


def test_a_map_of_ranks_on_cpus() -> None:
    plan = plan_binding("0:1,1-2:0", "cpu", 3, {}, TWO)
    assert cpus(plan) == ["24-47", "0-11", "12-23"]
    assert {binding.reason for binding in plan.bindings} == {"--bind 0:1,1-2:0"}


@pytest.mark.parametrize(
    "text", ["", "Auto", "0", "0:", ":0", "1-0:0", "0:0,", "0-3:0;4-7:1", "0:0,0:1", "٠:0", "0:-1"]
)
def test_what_is_no_map_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--bind .*(neither auto nor none nor a map|names two nodes for device 0)"):
        parse_bind(text, [0], TWO)


@given(st.text(alphabet="0123456789-:, autonone", max_size=14))
def test_any_text_is_a_plan_or_refused(text: str) -> None:
    try:
        plan = parse_bind(text, [0, 1], TWO)
    except (ConfigError, HardwareError):
        return
    assert len(plan.bindings) == 2
    assert {number for binding in plan.bindings for number in binding.nodes} <= {0, 1}


def test_a_map_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="names no node for device 1-2; add 1:NODE"):
        parse_bind("0:0", [0, 1, 2], TWO)
    with pytest.raises(HardwareError, match="names node 2; this machine has nodes 0-1"):
        parse_bind("0:2", [0], TWO)
    with pytest.raises(HardwareError, match="no NUMA nodes in /sys"):
        parse_bind("0:0", [0], Topology(()))
    with pytest.raises(HardwareError, match="node 1, which has no CPU that this process may use"):
        parse_bind("0:1", [0], Topology((node(0, 0, 1), NumaNode(1, ()))))


def test_a_plan_in_words() -> None:
    assert describe(plan_binding("auto", A2, 8, {}, TWO))[3:5] == [
        "rank 3 (device 3): node 0, CPUs 0-23; the node of device 3 is a guess",
        "rank 4 (device 4): node 1, CPUs 24-47; the node of device 4 is a guess",
    ]
    assert describe(plan_binding("auto", A2, 8, {}, TWO))[8].startswith("neither /sys nor npu-smi")
    assert describe(plan_binding("none", "cpu", 1, {}, TWO)) == ["rank 0: not bound; --bind none"]


# Binding for real, in processes of their own

PROGRAM = """
import json, os, sys, threading
from npu_zoo.parallel.numa import RankBinding, apply
stop = threading.Event()
threading.Thread(target=stop.wait, daemon=True).start()
cpus, nodes = json.loads(sys.argv[1])
remarks = apply(RankBinding(0, None, tuple(nodes), tuple(cpus), ""))
fresh = bytearray(1 << 24)
fresh[::4096] = b"x" * len(fresh[::4096])
affinity = [sorted(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")]
try:
    maps = open("/proc/self/numa_maps").read()
except OSError:
    maps = ""
assert not {"torch", "torch_npu", "transformers"} & set(sys.modules)
print(json.dumps([remarks, affinity, maps]))
"""


def bound(cpus: list[int], nodes: list[int]) -> tuple[list[str], list[list[int]], str]:
    command = [sys.executable, "-c", PROGRAM, json.dumps([cpus, nodes])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    remarks, affinity, maps = json.loads(done.stdout)
    return remarks, affinity, maps


def test_cpus_are_those_of_the_plan_in_every_thread() -> None:
    one = sorted(os.sched_getaffinity(0))[:1]
    remarks, affinity, _ = bound(one, [])
    assert remarks == []
    assert affinity == [one, one]


def test_memory_comes_from_the_node() -> None:
    found = numa_nodes()
    if not found:
        pytest.skip("the kernel shows no nodes")
    number = found[0].number
    remarks, _, maps = bound([], [number])
    if remarks:
        assert re.fullmatch(r"rank 0 takes memory of any node: set_mempolicy failed: .+", remarks[0])
        pytest.skip(remarks[0])
    if maps:
        assert f" bind:{number} " in maps


def test_what_cannot_be_bound_is_told_and_not_raised() -> None:
    remarks, affinity, _ = bound([60_000], [1000])
    assert len(remarks) == 2
    assert remarks[0].startswith("rank 0 runs on any CPU: sched_setaffinity failed: ")
    assert remarks[1].startswith("rank 0 takes memory of any node: set_mempolicy failed: ")
    assert affinity[0] == sorted(os.sched_getaffinity(0))


BOUND = RankBinding(3, None, (0,), (), "")


def test_a_machine_whose_call_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa.platform, "machine", lambda: "s390x")
    (remark,) = apply(BOUND)
    assert remark.startswith("rank 3 takes memory of any node: set_mempolicy failed: its number is not known on s390x")


def test_a_container_that_forbids_it_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(nodes: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(numa, "set_memory_policy", refuse)
    assert apply(BOUND)[0].endswith("Operation not permitted; a container needs --cap-add SYS_NICE for it")


def test_nothing_is_done_without_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_set_affinity", "set_memory_policy"):
        monkeypatch.setattr(numa, name, lambda _: pytest.fail("called"))
    assert apply(RankBinding(0, None, (), (), "")) == []
