"""Records that pages are made of: comparisons with other engines, and decoding at long contexts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.targets import record_name
from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.machine import better_machine
from npu_zoo.evaluation.offline.results import OfflineBody
from npu_zoo.evaluation.peers.preparation import renewed_floor
from npu_zoo.evaluation.peers.result import ComparisonBody
from npu_zoo.evaluation.record import Machine, ResultRecord, read_record

COMPARISON, CONTEXT = "engine", "long context"
"""What ``arguments["benchmark"]`` says of the records that sections are made of."""


@dataclass(frozen=True)
class Compared:
    """A record of ``engine.py``.

    Attributes:
        name: of the shape, with the group that its cases are of.
    """

    path: Path
    record: ResultRecord
    body: ComparisonBody
    name: str

    @property
    def date(self) -> str:
        """Its day."""
        return self.record.date[:10]

    @property
    def machine(self) -> Machine:
        """That it ran on."""
        return _machine(self.record, self.path)

    @property
    def shape(self) -> dict[str, Any]:
        """Of the model."""
        return _described(self.record, "shape")

    @property
    def group(self) -> str:
        """The form of the weights; empty for weights as they are."""
        return self.name.removeprefix(self.shape["name"]).removeprefix("-")


@dataclass(frozen=True)
class Contexts:
    """A record of ``long_context.py``: one kind of cache."""

    path: Path
    record: ResultRecord
    body: OfflineBody
    cache: str

    @property
    def machine(self) -> Machine:
        """That it ran on."""
        return _machine(self.record, self.path)


@dataclass(frozen=True)
class Records:
    """All of a page's records.

    Attributes:
        comparisons: by name, hardware and processor, the newest first.
        contexts: the newest of each cache and processor.
        others: of kinds or scripts that have no section of their own.
    """

    comparisons: dict[tuple[str, str, str], list[Compared]]
    contexts: list[Contexts]
    others: list[tuple[Path, ResultRecord]]

    @property
    def newest(self) -> list[Compared]:
        """The newest comparison of each name, hardware and processor."""
        return [found[0] for found in self.comparisons.values()]

    @property
    def by_processor(self) -> dict[str, list[Compared]]:
        """The newest comparison of each name on each processor, without those on devices."""
        found: defaultdict[str, list[Compared]] = defaultdict(list)
        for one in self.newest:
            if one.machine.hardware == "cpu":
                found[one.machine.cpu].append(one)
        return dict(found)


def read_records(paths: Iterable[Path]) -> Records:
    """Sort files by what they are records of.

    Raises:
        UsageError: one is no record, or not whole.
    """
    compared: defaultdict[tuple[str, str, str], list[Compared]] = defaultdict(list)
    contexts: dict[tuple[str, str], Contexts] = {}
    others = []
    read = _with_common_roofs([(path, read_record(path)) for path in paths])
    for path, record in sorted(read, key=lambda pair: pair[1].date, reverse=True):
        benchmark = record.arguments.get("benchmark")
        if record.kind == "bench compare" and benchmark == COMPARISON:
            body = ComparisonBody.model_validate(record.body)
            machine = _machine(record, path)
            body = body.model_copy(update={"cases": [renewed_floor(case, machine) for case in body.cases]})
            found = Compared(path, record, body, record_name(record))
            compared[found.name, machine.hardware, machine.cpu].append(found)
        elif record.kind == "bench offline" and benchmark == CONTEXT:
            cache = str(record.arguments.get("cache"))
            machine = _machine(record, path)
            timed = OfflineBody.model_validate(record.body).on(machine)
            contexts.setdefault((cache, machine.cpu), Contexts(path, record, timed, cache))
        else:
            others.append((path, record))
    timed_contexts = [contexts[key] for key in sorted(contexts)]
    return Records(dict(sorted(compared.items(), key=_rank)), timed_contexts, others)


def _with_common_roofs(given: Sequence[tuple[Path, ResultRecord]]) -> list[tuple[Path, ResultRecord]]:
    """The records, each with the best that was measured of its machine on its day."""
    best: dict[tuple[object, ...], Machine] = {}
    for _, record in given:
        if record.machine is not None:
            best[_roof_key(record)] = better_machine(best.get(_roof_key(record)), record.machine)
    found = []
    for path, record in given:
        machine = record.machine
        if machine is not None:
            roof = best[_roof_key(record)]
            machine = machine.model_copy(update={"bandwidth": roof.bandwidth, "peak": roof.peak})
        found.append((path, record.model_copy(update={"machine": machine})))
    return found


def _roof_key(record: ResultRecord) -> tuple[object, ...]:
    machine, dtype = record.machine, record.model.dtype if record.model else ""
    return (record.date[:10], dtype, *((machine.hardware, machine.cpu, machine.threads) if machine else ()))


def _rank(pair: tuple[tuple[str, str, str], Sequence[Compared]]) -> tuple[bool, str, str]:
    (name, hardware, processor), _ = pair
    return hardware != "cpu", processor, name


def _machine(record: ResultRecord, path: Path) -> Machine:
    if record.machine is None:
        raise UsageError(f"{path} names no machine; it was interrupted before that was measured, so remove it")
    return record.machine


def _described(record: ResultRecord, name: str) -> dict[str, Any]:
    found = record.arguments.get(name)
    return found if isinstance(found, dict) else {}
