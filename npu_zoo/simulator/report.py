"""What a run did on the simulated device. Counts and bytes are exact; there is no time in it, for none is meant here.

Steps are separated by marks: ``torch.npu.mstx.mark(name)``, the call that a profiler of real hardware reads, ends a
step of that name.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from npu_zoo.simulator.activation import runtime

_MIB = 1 << 20


@dataclass
class Report:
    """What was done between two points of a run.

    Attributes:
        name: the product, or the name of the step.
        launches: operator launches by kernel name (``aclnn…``, ``aclop:…``, or the operator's own name where its
            kernel cannot be run); those of captured graphs not among them.
        captured: launches that were recorded into graphs, or that gave one of their tasks other arguments.
        replays: launches of whole graphs.
        synchronisations: how often the host waited for the device.
        copies: number and bytes of copies by direction, such as ``host_to_device``.
        cpu_fallbacks: operators that torch_npu has no kernel for and computes on the host, a defect on hardware.
        undocumented: uses of operators that no document allows and the field makes, as ``operator rule``.
        golden_only: operators whose own kernel could not be run, so that only their golden semantics spoke.
        peak_bytes: most memory that tensors held at once, on the device that held most.
        steps: the same, step by step, where the run marked any.
    """

    name: str = ""
    launches: dict[str, int] = field(default_factory=dict)
    captured: dict[str, int] = field(default_factory=dict)
    replays: int = 0
    synchronisations: int = 0
    copies: dict[str, tuple[int, int]] = field(default_factory=dict)
    cpu_fallbacks: dict[str, int] = field(default_factory=dict)
    undocumented: dict[str, int] = field(default_factory=dict)
    golden_only: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    steps: list[Report] = field(default_factory=list)

    @property
    def num_launches(self) -> int:
        """All operator launches outside of graphs."""
        return sum(self.launches.values())

    def to_json(self) -> str:
        """The whole report as JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def to_text(self) -> str:
        """The report as a table for a terminal."""
        lines = [
            f"simulated {self.name}: {self.num_launches} operator launches, {self.replays} graph replays, "
            f"{self.synchronisations} synchronisations, peak {self.peak_bytes / _MIB:.1f} MiB",
            *(
                f"  {n:>8}  copies {kind.replace('_', ' ')}, {size} bytes"
                for kind, (n, size) in self.copies.items()
                if n
            ),
            *_table("operator launches", self.launches),
            *_table("launches captured into graphs", self.captured),
            *_table("computed on the host, as torch_npu does without a kernel of its own", self.cpu_fallbacks),
            *_table("uses that no document allows", self.undocumented),
            *_table("golden semantics alone, their kernel cannot run here", self.golden_only),
        ]
        if self.steps:
            lines += ["steps:       launches  replays    syncs   copies  peak MiB", *map(_step_line, self.steps)]
        return "\n".join(lines) + "\n"


@contextlib.contextmanager
def measure() -> Iterator[Report]:
    """Count what happens inside. The report is filled in when the block ends, also where it ends with an exception.

    Raises:
        SimulatorError: nothing is simulated in this process.
    """
    import torch  # noqa: F401  (brings the device)

    report = Report(runtime().machine.name)
    _gather_peaks()
    recorder = _Recorder(report, _snapshot())
    _ACTIVE.append(recorder)
    try:
        yield report
    finally:
        _gather_peaks()
        _ACTIVE.remove(recorder)
        recorder.finish()


def report_at_exit(target: str) -> None:
    """Count from now on, and write the report when the process ends.

    Args:
        target: ``-`` prints a table on standard error; anything else is the path of a JSON file.
    """
    import atexit
    import sys

    stack = contextlib.ExitStack()
    report = stack.enter_context(measure())

    def finish() -> None:
        stack.close()
        if target == "-":
            sys.stderr.write(report.to_text())
        else:
            Path(target).write_text(report.to_json())

    atexit.register(finish)


def listen_to_marks() -> None:
    """Let ``torch.npu.mstx.mark`` end a step of every report that is being made; there is no profiler here to tell."""
    import torch_npu

    def mark(message: str, stream: object = None, domain: str = "default") -> None:
        _gather_peaks()
        for recorder in _ACTIVE:
            recorder.end_step(message)

    torch_npu.npu.mstx.mark = staticmethod(mark)


class _Recorder:
    """A report that is being made. Several can be at once, and all share the device's one record of its peak."""

    def __init__(self, report: Report, start: _Snapshot) -> None:
        self.report, self._start, self._previous = report, start, start
        self._peak = self._step_peak = 0

    def see_peak(self, peak: int) -> None:
        self._step_peak = max(self._step_peak, peak)
        self._peak = max(self._peak, peak)

    def end_step(self, name: str) -> None:
        now = _snapshot()
        self.report.steps.append(_between(name, self._previous, now, self._step_peak))
        self._previous, self._step_peak = now, 0

    def finish(self) -> None:
        total = _between(self.report.name, self._start, _snapshot(), self._peak)
        total.steps = self.report.steps
        self.report.__dict__.update(total.__dict__)


_ACTIVE: list[_Recorder] = []


def _gather_peaks() -> None:
    """Give every recorder the peak since the last call, and start the device's record of it anew."""
    import torch

    npu: Any = torch.get_device_module("npu")
    devices = range(npu.device_count()) if npu.is_initialized() else ()
    peak = max((int(npu.max_memory_allocated(device)) for device in devices), default=0)
    for recorder in _ACTIVE:
        recorder.see_peak(peak)
    for device in devices:
        npu.reset_peak_memory_stats(device)


@dataclass(frozen=True)
class _Snapshot:
    counts: dict[str, dict[str, int]]
    copies: dict[str, tuple[int, int]]
    synchronisations: int
    replays: int


def _snapshot() -> _Snapshot:
    from npu_zoo.simulator.overrides import install

    overrides = install(runtime())
    counters = runtime().counters()
    counts = {
        "launches": counters.launches,
        "captured": counters.captured,
        "cpu_fallbacks": dict(overrides.cpu_fallbacks),
        "golden_only": dict(overrides.golden_only),
        "undocumented": {" ".join(key): count for key, count in overrides.rules.undocumented.items()},
    }
    return _Snapshot(counts, counters.copies, counters.synchronisations, counters.replays)


def _between(name: str, before: _Snapshot, after: _Snapshot, peak: int) -> Report:
    counts: dict[str, Any] = {kind: _difference(before.counts[kind], after.counts[kind]) for kind in after.counts}
    copies = {
        kind: (number - before.copies[kind][0], size - before.copies[kind][1])
        for kind, (number, size) in after.copies.items()
    }
    return Report(
        name,
        replays=after.replays - before.replays,
        synchronisations=after.synchronisations - before.synchronisations,
        copies=copies,
        peak_bytes=peak,
        **counts,
    )


def _difference(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    changed = {name: count - before.get(name, 0) for name, count in after.items()}
    return {name: count for name, count in sorted(changed.items()) if count}


def _table(title: str, counts: Mapping[str, int]) -> list[str]:
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return [f"{title}:", *(f"  {count:>8}  {name}" for name, count in ordered)] if counts else []


def _step_line(step: Report) -> str:
    copies = sum(number for number, _ in step.copies.values())
    return (
        f"  {step.name:<10} {step.num_launches:>8} {step.replays:>8} {step.synchronisations:>8} {copies:>8} "
        f"{step.peak_bytes / _MIB:>9.1f}"
    )
