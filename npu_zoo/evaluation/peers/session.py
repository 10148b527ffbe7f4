"""One comparison from its request to its record."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.core.errors import UsageError
from npu_zoo.dispatch import resolve
from npu_zoo.evaluation.machine import better_machine, describe_machine, measure_apart
from npu_zoo.evaluation.peers.cases import Case
from npu_zoo.evaluation.peers.comparison import Comparison, Conditions, Step, lasting_settings
from npu_zoo.evaluation.peers.engines import InstalledEngine
from npu_zoo.evaluation.peers.preparation import (
    cache_notes,
    fitting_cases,
    load_options,
    ordinary_tokens,
    renewed_floor,
    usable_cores,
    with_floor,
)
from npu_zoo.evaluation.peers.result import CaseResult, ComparisonBody, EngineEntry
from npu_zoo.evaluation.peers.worker.driver import LoadOptions
from npu_zoo.evaluation.record import Machine, ModelUnderTest, ResultRecord
from npu_zoo.evaluation.work import ModelWork
from npu_zoo.platforms.detection import is_simulated

_STARTED_TWICE = "each start is timed right after another of the same engine"
_PREFAULTED = (
    "npu-zoo takes the memory of its cache when it is loaded, as vLLM does (prefault_kv_cache); starts and memory are "
    "measured without"
)


def checked_request(args: EngineArgs) -> tuple[EngineArgs, EngineConfig]:
    """What was asked with the threads filled in, and as the matrix accepts it.

    Raises:
        NpuZooError: it does not.
        UsageError: it is for a simulated device.
    """
    args = args.model_copy(update={"threads": args.threads or len(os.sched_getaffinity(0))})
    config = resolve(args)
    if is_simulated(config.device):
        raise UsageError("a simulated device has no speed to compare; unset NPU_ZOO_SIMULATE, or give --hardware cpu")
    return args, config


@dataclass
class Session:
    """A comparison that can start.

    Attributes:
        machine: the best that was measured of it before the first case and after the last; None before :meth:`run`.
        cases: those that are still to be run.
        asked: the names of all, in the order of the record.
        body: grows with every case.
    """

    args: EngineArgs
    config: EngineConfig
    engines: list[InstalledEngine]
    options: dict[str, LoadOptions]
    cases: list[Case]
    conditions: Conditions
    body: ComparisonBody
    machine: Machine | None = None
    asked: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.asked = tuple(case.name for case in self.cases)

    @classmethod
    def prepare(
        cls,
        args: EngineArgs,
        config: EngineConfig,
        engines: Sequence[InstalledEngine],
        cases: Sequence[Case],
        *,
        rounds: int = 3,
        fewer: Mapping[tuple[str, str], int] | None = None,
        gguf: Path | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Session:
        """Choose what fits, and how each engine is started; nothing is loaded yet.

        Args:
            args, config: see :func:`checked_request`.
            engines: the first is the one that the others are compared with.
            fewer: see :class:`~npu_zoo.evaluation.peers.comparison.Conditions`.
            gguf, overrides: see :func:`~npu_zoo.evaluation.peers.preparation.load_options`.

        Raises:
            UsageError: no case fits, or there are fewer cores than threads.
        """
        kept, skipped = fitting_cases(cases, config)
        options = load_options(engines, args, config, kept, gguf=gguf, overrides=overrides)
        conditions = Conditions(
            rounds,
            ordinary_tokens(config),
            config.threads,
            usable_cores(config.threads or 1) if config.device == "cpu" else (),
            ModelWork.of(config).cache_per_token,
            fewer or {},
        )
        entries = [
            EngineEntry(
                name=e.name,
                python=e.python,
                versions=e.versions,
                options=dataclasses.asdict(options[e.name]),
                lasting_settings=lasting_settings(e.name, options[e.name]),
            )
            for e in engines
        ]
        notes = cache_notes(kept, config, max(option.kv_cache_memory for option in options.values()))
        if config.device == "cpu" and not all(case.fresh for case in kept):
            notes.append(_PREFAULTED)
        if any(case.metric == "start" for case in kept):
            notes.append(_STARTED_TWICE)
        body = ComparisonBody(engines=entries, rounds=rounds, skipped=skipped, notes=notes)
        return cls(args, config, list(engines), options, kept, conditions, body)

    def resume(self, earlier: ResultRecord) -> None:
        """Take over the cases that an earlier record of the same comparison has, so that only the others are run.

        Raises:
            UsageError: it is of another model, machine, or set of engines, or one was started otherwise.
        """
        body, model = ComparisonBody.model_validate(earlier.body), ModelUnderTest.of(self.config)
        differing = [
            what
            for what, same in (
                ("model", earlier.model is not None and _lasting(earlier.model) == _lasting(model)),
                ("machine", earlier.machine is not None and _same_machine(earlier.machine, self._described())),
                ("engines or how they are started", body.engines == self.body.engines),
                ("rounds", body.rounds == self.body.rounds),
            )
            if not same
        ]
        if differing:
            raise UsageError(
                f"the record is of other {', other '.join(differing)}, and cannot be gone on with; start another"
            )
        self.machine, self.body.cases = earlier.machine, body.cases
        self.body.notes = list(dict.fromkeys([*body.notes, *self.body.notes]))
        done = {case.name for case in body.cases}
        self.cases = [case for case in self.cases if case.name not in done]

    def _described(self) -> Machine:
        return describe_machine(self.config.hardware, self.config.threads)

    def run(self, on_step: Callable[[Step], None] = lambda step: None, *, divisor: int = 1) -> Iterator[CaseResult]:
        """Measure the machine, yield each case when it is over and in the body, and measure the machine again.

        Args:
            divisor: makes the measurement of the machine smaller.
        """
        cases = {case.name: case for case in self.cases}
        order = {name: number for number, name in enumerate(self.asked)}
        machine = self._measure_machine(divisor)
        comparison = Comparison(self.engines, self.options, self.conditions, on_step)
        with contextlib.closing(comparison.run(self.cases)) as results:
            for found in results:
                result = with_floor(found, cases[found.name], self.config, machine)
                self.body.cases.append(result)
                self.body.cases.sort(key=lambda case: order.get(case.name, -1))
                yield result
        self._measure_machine(divisor)

    def _measure_machine(self, divisor: int) -> Machine:
        """Take the better of what is known and what is measured now, and tell all floors by it."""
        found = measure_apart(self.config, self.conditions.cores, divisor=divisor)
        self.machine = machine = better_machine(self.machine, found)
        self.body.cases = [renewed_floor(case, machine) for case in self.body.cases]
        return machine

    def record(self, arguments: Mapping[str, Any]) -> ResultRecord:
        """What is known so far."""
        return ResultRecord(
            kind="bench compare",
            versions={k: v for engine in reversed(self.engines) for k, v in engine.versions.items()},
            machine=self.machine,
            model=ModelUnderTest.of(self.config),
            arguments=dict(arguments),
            body=self.body.model_dump(mode="json"),
            figures=self.body.figures(),
        )


def _lasting(model: ModelUnderTest) -> dict[str, Any]:
    """What of a model must be the same; its code may have changed in places that do not matter here."""
    return model.model_dump(exclude={"code", "row"})


def _same_machine(one: Machine, other: Machine) -> bool:
    names = ("hardware", "cpu", "instructions", "threads")
    return all(getattr(one, name) == getattr(other, name) for name in names)
