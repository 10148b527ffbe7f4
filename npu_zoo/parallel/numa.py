"""Which CPUs and whose memory a rank uses: the nodes of a machine, the plan of ``--bind``, and its application."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from npu_zoo.core.errors import ConfigError, HardwareError
from npu_zoo.core.hardware import PRODUCTS, chip_of
from npu_zoo.platforms.ascend import VISIBLE_DEVICES, ascend_devices, run_npu_smi, visible_devices

MPOL_BIND = 2
"""Memory of the named nodes alone; set_mempolicy(2)."""

_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237, "riscv64": 237, "loongarch64": 237}
"""The system call's number by machine; the kernel's tables of 64-bit system calls."""

_PCI_ADDRESS = re.compile(r"[0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-7]")
_LARGEST_LIST = 1 << 16


@dataclass(frozen=True)
class NumaNode:
    """A node that has CPUs.

    Attributes:
        number: as in ``/sys/devices/system/node/node0``.
        cores: the CPUs of each physical core; several where a core runs several threads.
    """

    number: int
    cores: tuple[tuple[int, ...], ...]

    @property
    def cpus(self) -> tuple[int, ...]:
        """All CPUs, in order."""
        return tuple(sorted(cpu for core in self.cores for cpu in core))


@dataclass(frozen=True)
class Topology:
    """What binding rests on.

    Attributes:
        nodes: the nodes, with those of their CPUs that this process may use.
        device_files: the numbers of the driver's devices, in order: device 0 of a run is the first of them.
        device_nodes: the node of each device of a run, where the machine tells.
    """

    nodes: tuple[NumaNode, ...]
    device_files: tuple[int, ...] = ()
    device_nodes: Mapping[int, int] | None = None


@dataclass(frozen=True)
class RankBinding:
    """Where one rank runs.

    Attributes:
        local_rank: the rank among those of this machine.
        device: its device, as ``ASCEND_RT_VISIBLE_DEVICES`` counts; None on a CPU.
        nodes: the nodes whose memory it uses; empty where it may use any.
        cpus: the CPUs that it runs on; empty where it may use any.
        reason: why.
    """

    local_rank: int
    device: int | None
    nodes: tuple[int, ...]
    cpus: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class BindPlan:
    """Where the ranks of a machine run.

    Attributes:
        bind: what was asked for: ``auto``, ``none`` or a map.
        bindings: one for each rank of the machine.
        notes: what the plan could not rest on.
    """

    bind: str
    bindings: tuple[RankBinding, ...]
    notes: tuple[str, ...] = ()


def numa_nodes(root: Path = Path("/")) -> list[NumaNode]:
    """The nodes of a machine that have CPUs; none where the kernel shows none.

    Args:
        root: what ``/sys`` is looked up below.
    """
    found = []
    for folder in (root / "sys/devices/system/node").glob("node*"):
        match = re.fullmatch(r"node(\d+)", folder.name, re.ASCII)
        cpus = _read_list(folder / "cpulist") if match else ()
        if match and cpus:
            found.append(NumaNode(int(match.group(1)), _cores(cpus, root)))
    return sorted(found, key=lambda node: node.number)


def bus_ids(npu_smi: str) -> list[str]:
    """PCI addresses of the devices in the table of ``npu-smi info``, in its order: ``0000:C1:00.0``."""
    cells = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in npu_smi.splitlines())
    return [row[1] for row in cells if len(row) == 3 and _PCI_ADDRESS.fullmatch(row[1])]


def device_node(device: int, root: Path = Path("/"), addresses: Sequence[str] = ()) -> int | None:
    """The node of a device, or None where the machine does not tell.

    The driver's own entry in ``/sys/class`` is looked at first, then the PCI address that npu-smi names, as MindIE's
    guide to binding does by hand (``/sys/bus/pci/devices/ADDRESS/numa_node``).

    Args:
        device: its place among the devices of the machine.
        root: what ``/sys`` and ``/dev`` are looked up below.
        addresses: PCI addresses of all devices, in order.
    """
    files = ascend_devices(root / "dev")
    number = files[device] if device < len(files) else device
    paths = [root / f"sys/class/devdrv-class/davinci{number}/device/numa_node"]
    if device < len(addresses):
        paths.append(root / "sys/bus/pci/devices" / addresses[device].lower() / "numa_node")
    return next((node for path in paths if (node := _read_node(path)) is not None), None)


def this_topology(
    npu: bool,
    root: Path = Path("/"),
    npu_smi: Callable[[], str] = run_npu_smi,
    allowed: Collection[int] | None = None,
) -> Topology:
    """What this machine tells of its nodes and, for NPUs, of their devices.

    Args:
        npu: whether to ask for NPUs.
        root: what ``/sys`` and ``/dev`` are looked up below.
        npu_smi: what ``npu-smi info`` prints.
        allowed: the CPUs that this process may use; None asks the kernel.
    """
    usable = frozenset(os.sched_getaffinity(0) if allowed is None else allowed)
    nodes = tuple(_restricted(node, usable) for node in numa_nodes(root))
    files = ascend_devices(root / "dev") if npu else []
    if not files:
        return Topology(nodes)
    addresses = bus_ids(npu_smi())
    if len(addresses) != len(files):  # then the order of one says nothing of the other
        addresses = []
    known = {device: node for device in range(len(files)) if (node := device_node(device, root, addresses)) is not None}
    return Topology(nodes, tuple(files), known)


def plan_binding(
    bind: str, hardware: str, num_ranks: int, environ: Mapping[str, str], topology: Topology | None = None
) -> BindPlan:
    """The plan of a run's ranks on this machine.

    Args:
        bind: ``auto``, ``none`` or a map such as ``0-3:0,4-7:1``.
        hardware: the product that the run is on.
        num_ranks: ranks of this machine.
        environ: the environment, whose ``ASCEND_RT_VISIBLE_DEVICES`` chooses the devices.
        topology: what the machine tells; None asks it.

    Raises:
        ConfigError: ``bind`` is none of the three, or leaves a device out.
        HardwareError: it names a node that the machine has not, or the environment leaves too few devices.
    """
    npu = chip_of(hardware).device == "npu"
    if topology is None:
        topology = Topology(()) if bind == "none" else this_topology(npu)
    if chip_of(hardware).device == "cpu":
        return parse_bind(bind, range(num_ranks), topology, on_cpu=True)
    count = len(topology.device_files) or None
    visible = visible_devices(environ, count) if npu else None
    devices = list(range(num_ranks)) if visible is None else visible[:num_ranks]
    if len(devices) < num_ranks:
        raise HardwareError(
            f"{num_ranks} ranks were asked for on this machine, and {VISIBLE_DEVICES} leaves {len(devices)}; "
            f"name {num_ranks} there, or unset it"
        )
    return parse_bind(bind, devices, topology, full_machine=PRODUCTS[hardware].devices)


def parse_bind(
    text: str, devices: Sequence[int], topology: Topology, *, on_cpu: bool = False, full_machine: int = 0
) -> BindPlan:
    """The plan of ranks whose devices are known.

    Args:
        text: ``auto``, ``none`` or a map of devices to nodes such as ``0-3:0,4-7:1``.
        devices: each rank's device; on a CPU the ranks themselves.
        topology: what the machine tells.
        on_cpu: the ranks run on CPUs, so that those of one node get cores of their own.
        full_machine: devices of one full machine, where that is known.

    Raises:
        ConfigError: ``text`` is none of the three, or leaves a device out.
        HardwareError: it names a node that the machine has not, or that has no CPU which this process may use.
    """
    if text == "none":
        bindings = [RankBinding(r, None if on_cpu else d, (), (), "--bind none") for r, d in enumerate(devices)]
        return BindPlan(text, tuple(bindings))
    if text != "auto":
        return _mapped(text, devices, topology, on_cpu=on_cpu)
    return _spread_cpus(len(devices), topology) if on_cpu else _by_device(devices, topology, full_machine)


def apply(binding: RankBinding) -> list[str]:
    """Bind this process as a plan says: its CPUs, and the nodes that its memory is taken from.

    To be called first in a rank: threads that start later inherit both, threads that run already get the CPUs alone,
    and memory that is touched already stays where it is.

    Returns:
        What could not be done, and why; nothing is raised, as a rank runs without binding too.
    """
    remarks = []
    if binding.cpus:
        try:
            _set_affinity(binding.cpus)
        except OSError as error:
            remarks.append(_remark(binding, f"runs on any CPU: sched_setaffinity failed: {error.strerror}"))
    if binding.nodes:
        try:
            set_memory_policy(binding.nodes)
        except OSError as error:
            hint = "; a container needs --cap-add SYS_NICE for it" if error.errno == errno.EPERM else ""
            failed = f"takes memory of any node: set_mempolicy failed: {error.strerror}{hint}"
            remarks.append(_remark(binding, failed))
    return remarks


def set_memory_policy(nodes: Sequence[int]) -> None:
    """Take this thread's memory from these nodes alone, as ``numactl --membind`` does.

    Raises:
        OSError: the kernel refuses, or has no such call (ENOSYS), as is said of machines that are not known too.
    """
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError(errno.ENOSYS, f"its number is not known on {platform.machine()}")
    width = 64
    words = max(nodes) // width + 1
    mask = (ctypes.c_ulong * words)()
    for node in nodes:
        mask[node // width] |= 1 << node % width
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    # The kernel takes one bit less than it is told of.
    size = ctypes.c_ulong(words * width + 1)
    if libc.syscall(ctypes.c_long(number), ctypes.c_int(MPOL_BIND), mask, size) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def describe(plan: BindPlan) -> list[str]:
    """A plan as lines, a rank each, then what it could not rest on."""
    lines = []
    for binding in plan.bindings:
        who = f"rank {binding.local_rank}" + ("" if binding.device is None else f" (device {binding.device})")
        where = [f"node {describe_cpus(binding.nodes)}"] if binding.nodes else []
        where += [f"CPU{'s' * (len(binding.cpus) > 1)} {describe_cpus(binding.cpus)}"] if binding.cpus else []
        lines.append(f"{who}: {', '.join(where) or 'not bound'}; {binding.reason}")
    return [*lines, *plan.notes]


def describe_cpus(numbers: Sequence[int]) -> str:
    """Numbers as the kernel lists CPUs: ``0-3,8``."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_cpu_list(text: str) -> tuple[int, ...] | None:
    """The numbers of the kernel's ``0-3,8``; none of them where it is empty, None where it is anything else."""
    numbers: set[int] = set()
    for part in text.strip().split(",") if text.strip() else []:
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part, re.ASCII)
        first = int(match.group(1)) if match else 1
        last = int(match.group(2) or first) if match else 0
        if last < first or last >= _LARGEST_LIST:
            return None
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def _by_device(devices: Sequence[int], topology: Topology, full_machine: int) -> BindPlan:
    """Each rank beside its device, on all CPUs of the node; where the machine does not tell, nodes in order."""
    usable = [node for node in topology.nodes if node.cores]
    known = topology.device_nodes or {}
    numbers = {device: _file_number(device, topology) for device in devices}
    total = max(full_machine, len(topology.device_files), *(number + 1 for number in numbers.values()))
    bindings, guessed = [], []
    for rank, device in enumerate(devices):
        node, reason = known.get(device), f"device {device} is at node {known.get(device)}"
        if node is None and len(topology.nodes) == 1:
            node, reason = topology.nodes[0].number, "the machine has one node"
        elif node is None and usable:
            node, reason = _in_order(numbers[device], total, usable), f"the node of device {device} is a guess"
            guessed.append(device)
        bindings.append(_on_node(RankBinding(rank, device, (), (), reason), node, usable))
    notes = []
    if guessed:
        notes.append(
            f"neither /sys nor npu-smi tells the node of device {describe_cpus(guessed)}: the {total} devices of a "
            f"machine are spread over its nodes in order ({_order(total, usable)}); --bind MAP names them"
        )
    return BindPlan("auto", tuple(bindings), (*notes, *_without_nodes(topology)))


def _spread_cpus(num_ranks: int, topology: Topology) -> BindPlan:
    """Ranks over nodes in order, and ranks of one node over its cores; a rank alone uses the whole machine."""
    usable = [node for node in topology.nodes if node.cores]
    if num_ranks == 1 or not usable:
        reason = "a single rank uses the whole machine" if usable else "the kernel shows no node with CPUs to use"
        bindings = [RankBinding(rank, None, (), (), reason) for rank in range(num_ranks)]
        return BindPlan("auto", tuple(bindings), tuple(_without_nodes(topology)))
    if num_ranks <= len(usable):
        shares = [
            usable[rank * len(usable) // num_ranks : (rank + 1) * len(usable) // num_ranks] for rank in range(num_ranks)
        ]
        return BindPlan("auto", tuple(_on_nodes(rank, nodes) for rank, nodes in enumerate(shares)))
    chosen = {rank: usable[rank * len(usable) // num_ranks] for rank in range(num_ranks)}
    return BindPlan("auto", _on_cores(chosen))


def _mapped(text: str, devices: Sequence[int], topology: Topology, *, on_cpu: bool) -> BindPlan:
    """Each rank on the node that the map names for its device."""
    what = "rank" if on_cpu else "device"
    chosen = _parse_map(text)
    missing = [device for device in devices if device not in chosen]
    if missing:
        raise ConfigError(f"--bind {text} names no node for {what} {describe_cpus(missing)}; add {missing[0]}:NODE")
    nodes = {node.number: node for node in topology.nodes}
    for node in dict.fromkeys(chosen[device] for device in devices):
        if node not in nodes:
            has = f"nodes {describe_cpus(list(nodes))}" if nodes else "no NUMA nodes in /sys"
            raise HardwareError(f"--bind {text} names node {node}; this machine has {has}")
        if not nodes[node].cores:
            raise HardwareError(
                f"--bind {text} names node {node}, which has no CPU that this process may use; ask taskset or the "
                "container for CPUs of that node, or name another"
            )
    if on_cpu:
        by_rank = {rank: nodes[chosen[device]] for rank, device in enumerate(devices)}
        return BindPlan(text, tuple(replace(found, reason=f"--bind {text}") for found in _on_cores(by_rank)))
    bindings = [
        _on_node(RankBinding(rank, device, (), (), f"--bind {text}"), chosen[device], topology.nodes)
        for rank, device in enumerate(devices)
    ]
    return BindPlan(text, tuple(bindings))


def _parse_map(text: str) -> dict[int, int]:
    """Nodes by device from ``0-3:0,4-7:1``."""
    chosen: dict[int, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?:(\d{1,4})\s*", part, re.ASCII)
        first = int(match.group(1)) if match else 1
        last = int(match.group(2) or first) if match else 0
        if match is None or last < first:
            raise ConfigError(
                f"--bind {text!r} is neither auto nor none nor a map of devices to nodes like 0-3:0,4-7:1"
            )
        for device in range(first, last + 1):
            if chosen.setdefault(device, int(match.group(3))) != int(match.group(3)):
                raise ConfigError(f"--bind {text} names two nodes for device {device}; name one")
    return chosen


def _on_cores(chosen: Mapping[int, NumaNode]) -> tuple[RankBinding, ...]:
    """Ranks of one node share its cores out, and share cores where there are fewer of these."""
    bindings = []
    for rank, node in chosen.items():
        beside = [other for other, its in chosen.items() if its.number == node.number]
        place, cores = beside.index(rank), node.cores
        if len(beside) <= len(cores):
            own = cores[place * len(cores) // len(beside) : (place + 1) * len(cores) // len(beside)]
            reason = f"{len(own)} of the {len(cores)} cores of node {node.number}"
        else:
            own = (cores[place % len(cores)],)
            reason = f"a core that it shares: {len(beside)} ranks are on the {len(cores)} cores of node {node.number}"
        bindings.append(RankBinding(rank, None, (node.number,), NumaNode(node.number, own).cpus, reason))
    return tuple(bindings)


def _on_nodes(rank: int, nodes: Sequence[NumaNode]) -> RankBinding:
    cpus = tuple(sorted(cpu for node in nodes for cpu in node.cpus))
    numbers = tuple(node.number for node in nodes)
    return RankBinding(rank, None, numbers, cpus, "ranks are spread over the nodes in order")


def _on_node(binding: RankBinding, node: int | None, nodes: Sequence[NumaNode]) -> RankBinding:
    if node is None:
        return replace(binding, reason="the kernel shows no node with CPUs to use")
    found = next((found for found in nodes if found.number == node and found.cores), None)
    if found is None:
        return replace(binding, reason=f"{binding.reason}, which has no CPU that this process may use")
    return replace(binding, nodes=(node,), cpus=found.cpus)


def _in_order(number: int, total: int, nodes: Sequence[NumaNode]) -> int:
    return nodes[number * len(nodes) // total].number


def _order(total: int, nodes: Sequence[NumaNode]) -> str:
    """Which devices the fallback puts on which node: ``0-3 to node 0, 4-7 to node 1``."""
    by_node = {node.number: [d for d in range(total) if _in_order(d, total, nodes) == node.number] for node in nodes}
    return ", ".join(f"{describe_cpus(devices)} to node {node}" for node, devices in by_node.items() if devices)


def _without_nodes(topology: Topology) -> list[str]:
    empty = [node.number for node in topology.nodes if not node.cores]
    return [f"node {describe_cpus(empty)} has no CPU that this process may use (taskset, container)"] if empty else []


def _file_number(device: int, topology: Topology) -> int:
    return topology.device_files[device] if device < len(topology.device_files) else device


def _restricted(node: NumaNode, usable: Collection[int]) -> NumaNode:
    kept = (tuple(cpu for cpu in core if cpu in usable) for core in node.cores)
    return NumaNode(node.number, tuple(core for core in kept if core))


def _cores(cpus: Sequence[int], root: Path) -> tuple[tuple[int, ...], ...]:
    cores: dict[int, tuple[int, ...]] = {}
    for cpu in cpus:
        siblings = _read_list(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or (cpu,)
        own = tuple(sibling for sibling in siblings if sibling in cpus) if cpu in siblings else (cpu,)
        cores.setdefault(own[0], own)
    return tuple(cores[first] for first in sorted(cores))


def _read_list(path: Path) -> tuple[int, ...]:
    try:
        return parse_cpu_list(path.read_text(encoding="ascii", errors="replace")) or ()
    except OSError:
        return ()


def _read_node(path: Path) -> int | None:
    """A node from the kernel's file, which has -1 where the firmware names none."""
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    return int(text) if re.fullmatch(r"\d{1,6}", text, re.ASCII) else None


def _set_affinity(cpus: Collection[int]) -> None:
    os.sched_setaffinity(0, cpus)
    for thread in Path("/proc/self/task").glob("[0-9]*"):
        try:
            os.sched_setaffinity(int(thread.name), cpus)
        except ProcessLookupError:
            continue


def _remark(binding: RankBinding, what: str) -> str:
    return f"rank {binding.local_rank} {what}"
