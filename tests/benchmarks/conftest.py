"""The benchmarks are scripts beside the package, so their folder goes on the path as it does when one is run."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.evaluation.machine import describe_machine
from npu_zoo.evaluation.peers.cases import CATALOGUE
from npu_zoo.evaluation.peers.result import CaseResult, ComparisonBody, EngineEntry, NeededWork
from npu_zoo.evaluation.record import ResultRecord

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

Samples = dict[str, list[float]]
"""Figures of each round by engine; shorter lists are of engines that took part in fewer rounds."""


def _case(name: str, samples: Samples, work: tuple[int, int, int], model_seconds: float | None) -> CaseResult:
    case = CaseResult.of(CATALOGUE[name])
    for number in range(max(map(len, samples.values()))):
        took_part = {engine: values[number] for engine, values in samples.items() if number < len(values)}
        case.rounds.append(took_part)
        # A run of two seconds, half of them before the last first token.
        times: dict[str, Any] = {"start": 0.0, "all_started": 1.0, "end": 2.0}
        told = {"model_seconds": [model_seconds, model_seconds]} if model_seconds is not None else {}
        case.runs.append({engine: times | (told if engine == "npu-zoo" else {}) for engine in took_part})
    case.work = NeededWork(bytes=work[0], operations=work[1], tokens=work[2])
    return case


@pytest.fixture
def make_record() -> Callable[..., ResultRecord]:
    """A record of some cases by name, each with figures, on a machine of 100 bytes/s and 1,000 operations/s."""

    def make(
        cases: dict[str, Samples],
        *,
        shape: str = "1.3b",
        group: str = "plain",
        date: str = "2026-01-01",
        work: tuple[int, int, int] = (100, 10, 50),
        model_seconds: float | None = 0.75,
        weight_bytes: int = 2**30,
        **machine: Any,
    ) -> ResultRecord:
        from harness.shapes import SHAPES

        names = list(dict.fromkeys(engine for samples in cases.values() for engine in samples))
        body = ComparisonBody(
            engines=[EngineEntry(name=name, python="python", versions={name: "1"}) for name in names],
            rounds=3,
            cases=[_case(name, samples, work, model_seconds) for name, samples in cases.items()],
        )
        described = describe_machine("cpu", 2).model_copy(update={"bandwidth": 100.0, "peak": 1000.0, **machine})
        arguments = {
            "benchmark": "engine",
            "shape": json.loads(json.dumps(dataclasses.asdict(SHAPES[shape]))),
            "group": group,
            "weight_bytes": weight_bytes,
        }
        return ResultRecord(
            kind="bench compare",
            date=f"{date}T00:00:00+00:00",
            machine=described,
            arguments=arguments,
            body=body.model_dump(mode="json"),
        )

    return make
