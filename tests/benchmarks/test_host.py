"""The benchmark of the host's work: it measures what it says, and its record shows that a step's work does not grow."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.checkpoint import ensure_checkpoint

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RECORD = json.loads((BENCHMARKS / "host.json").read_text())


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("host_benchmark", BENCHMARKS / "host.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def figures(**sizes: Any) -> dict[str, float]:
    (row,) = [row for row in RECORD["rows"] if all(row[name] == value for name, value in sizes.items())]
    found: dict[str, float] = row["microseconds"]
    return found


def test_the_record_has_every_case() -> None:
    module = benchmark()
    due = module.cases([1, 32, 256], [0, 10000], [128, 2048, 8192])
    assert [{k: row[k] for k in vars(due[0])} for row in RECORD["rows"]] == [vars(case) for case in due]
    assert all(set(row["microseconds"]) == set(module.PARTS) for row in RECORD["rows"])


@pytest.mark.parametrize("running", [1, 32, 256])
def test_a_step_costs_no_more_where_thousands_wait(running: int) -> None:
    for context in (128, 2048, 8192):
        nobody, many = (
            sum(figures(running=running, waiting=waiting, context=context, sampling="greedy").values())
            for waiting in (0, 10000)
        )
        assert many < 1.5 * nobody + 50


@pytest.mark.parametrize("running", [1, 32, 256])
def test_only_the_attentions_metadata_knows_how_long_sequences_are(running: int) -> None:
    short, long = (figures(running=running, waiting=0, context=context, sampling="greedy") for context in (128, 8192))
    for part in set(short) - {"attention"}:
        assert long[part] < 1.6 * short[part] + 50


def test_a_case_is_measured(tmp_path: Path) -> None:
    module = benchmark()
    weights = ensure_checkpoint(tmp_path, module.SHAPE)
    found, backend = module.run(module.Case(2, 3, 300, "penalties"), weights, steps=4)
    assert backend
    assert set(found) == set(module.PARTS)
    assert all(figure > 0 for figure in found.values())
