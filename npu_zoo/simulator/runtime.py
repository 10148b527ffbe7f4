"""The stub libraries as Python sees them: loaded, configured, and asked for what was done."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from npu_zoo.simulator.build import load_order
from npu_zoo.simulator.errors import SimulatorError
from npu_zoo.simulator.products import Machine

COPY_KINDS = ("host_to_host", "host_to_device", "device_to_host", "device_to_device")


class Event(IntEnum):
    """What the runtime tells of; the numbers of ``csrc/runtime.c``."""

    CAPTURE_BEGIN = 0
    CAPTURE_END = 1
    GRAPH_EXECUTE = 2
    GRAPH_DESTROY = 3
    GROUP_BEGIN = 4
    GROUP_END = 5
    UPDATE_BEGIN = 6
    UPDATE_END = 7
    COPY = 8


Listener = Callable[[Event, int, int, int, int], None]
"""Called with the event, its handle, a second handle, a source address and a number of bytes (0 where it has none)."""

_INTERNAL_ERROR = 507899
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64
)


@dataclass(frozen=True)
class Counters:
    """Totals since the start.

    Attributes:
        launches: operator launches by name, those of captured graphs not among them.
        captured: launches that were recorded into graphs.
        synchronisations: how often the host waited for the device.
        replays: launches of whole graphs.
        copies: number and bytes of copies by direction.
    """

    launches: dict[str, int]
    captured: dict[str, int]
    synchronisations: int
    replays: int
    copies: dict[str, tuple[int, int]]


class Runtime:
    """The loaded stub of AscendCL. One per process.

    Attributes:
        machine: what is simulated.
        base: address of the first byte of device memory; device ``i`` starts at ``base + i * machine.memory``.
        size: bytes of device memory of all devices together.
    """

    def __init__(self, folder: Path, machine: Machine) -> None:
        """Load and configure.

        Raises:
            SimulatorError: a library cannot be loaded, or the address space for the memory is not to be had.
        """
        try:
            self._libraries = [ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for path in load_order(folder)]
        except OSError as error:
            raise SimulatorError(f"a stub library cannot be loaded: {error}") from error
        self._lib = self._libraries[0]
        self._declare()
        code = self._lib.sim_configure(
            machine.soc.encode(),
            machine.devices,
            machine.memory,
            machine.ai_cores,
            machine.vector_cores,
            machine.l2_bytes,
        )
        if code:
            gib = machine.devices * machine.memory / (1 << 30)
            raise SimulatorError(
                f"{gib:.0f} GiB of address space cannot be reserved; simulate fewer devices or less memory"
            )
        self.machine = machine
        self.base: int = self._lib.sim_base()
        self.size = machine.devices * machine.memory
        self.enter: Callable[[], None] = self._lib.sim_enter
        self.leave: Callable[[], None] = self._lib.sim_leave
        self._callback: object = None

    def _declare(self) -> None:
        self._lib.sim_configure.argtypes = [
            ctypes.c_char_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64
        ]  # fmt: skip
        self._lib.sim_base.restype = ctypes.c_void_p
        self._lib.sim_launch_count.restype = ctypes.c_char_p
        self._lib.sim_record.argtypes = self._lib.sim_explain.argtypes = [ctypes.c_char_p]
        for name in ("sim_enter", "sim_leave", "sim_record", "sim_explain"):
            getattr(self._lib, name).restype = None

    def listen(self, listener: Listener) -> None:
        """Be told of captures, replays, task groups and of copies while capturing.

        What the listener raises becomes an error of the runtime with its message, which torch_npu raises.
        """

        def forward(what: int, handle: int | None, other: int | None, source: int | None, size: int) -> int:
            try:
                listener(Event(what), handle or 0, other or 0, source or 0, size)
            except Exception as error:
                self._lib.sim_explain(f"{type(error).__name__}: {error}".encode())
                return _INTERNAL_ERROR
            return 0

        self._callback = _CALLBACK(forward)
        self._lib.sim_on_event(self._callback)

    def record(self, name: str) -> None:
        """Count a launch whose kernel is not run through the recorder."""
        self._lib.sim_record(name.encode())

    def counters(self) -> Counters:
        """What was done since the start."""
        totals = (ctypes.c_uint64 * (2 + 2 * len(COPY_KINDS)))()
        self._lib.sim_counters(totals)
        launches, captured = {}, {}
        eager, taped = ctypes.c_uint64(), ctypes.c_uint64()
        for i in range(self._lib.sim_launch_names()):
            name = self._lib.sim_launch_count(i, ctypes.byref(eager), ctypes.byref(taped)).decode()
            launches[name], captured[name] = eager.value, taped.value
        copies = {kind: (totals[2 + 2 * i], totals[3 + 2 * i]) for i, kind in enumerate(COPY_KINDS)}
        return Counters(_present(launches), _present(captured), totals[0], totals[1], copies)


def _present(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in sorted(counts.items()) if count}
