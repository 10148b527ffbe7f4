"""The benchmarks of the server: their judgements, their arithmetic, and what their records promise."""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.shapes import SHAPES

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
IDLE = {
    "vllm:num_requests_running": 0.0,
    "vllm:num_requests_waiting": 0.0,
    "vllm:kv_cache_usage_perc": 0.0,
    "npu_zoo_requests_in_flight": 0.0,
    "npu_zoo_engine_restarts_total": 0.0,
    "request_failed_total": 0.0,
    "request_received_total": 7.0,
    "vllm:request_success_total": 7.0,
}


def benchmark(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_an_idle_server_has_no_faults() -> None:
    assert benchmark("soak").what_is_left(IDLE) == []


@pytest.mark.parametrize("name", [name for name, value in IDLE.items() if not value])
def test_whatever_an_idle_server_still_has_is_a_fault(name: str) -> None:
    assert len(benchmark("soak").what_is_left({**IDLE, name: 0.5})) == 1


def test_a_request_without_an_end_is_a_fault() -> None:
    (fault,) = benchmark("soak").what_is_left({**IDLE, "request_received_total": 8.0})
    assert fault == "8 requests were received, and 7 ended"


def test_a_process_that_grows_is_a_fault() -> None:
    soak = benchmark("soak")
    assert soak.what_grew({"engine": (300.0, 300.0 + soak.MOST_GROWTH_MIB), "front end": (70.0, 60.0)}) == []
    (fault,) = soak.what_grew({"engine": (300.0, 301.0 + soak.MOST_GROWTH_MIB), "front end": (70.0, 70.0)})
    assert fault.startswith("the engine process grew from 300.0 to ")


def test_seeded_answers_may_differ_as_often_as_draws_fall_on_borders() -> None:
    soak = benchmark("soak")
    assert soak.what_differed(soak.Tally(seeded=2000, seeded_otherwise=2)) == []
    (fault,) = soak.what_differed(soak.Tally(seeded=2000, seeded_otherwise=3))
    assert fault == "3 of 2000 seeded answers are not what they were alone"


def test_a_margin_is_that_of_the_closest_position() -> None:
    positions = [{"a": -0.5, "b": -2.0, "c": -1.5}, {"a": -3.0, "b": -0.25}]
    assert benchmark("soak").margin(positions) == 1.0


def test_metrics_are_summed_over_their_labels() -> None:
    text = '# TYPE a counter\na_total{x="1"} 2\na_total{x="2"} 3\n# TYPE b gauge\nb 0.5\n'
    assert benchmark("soak").metrics_of(text) == {"a_total": 5.0, "b": 0.5}


def test_percentiles_are_those_of_the_standard_library() -> None:
    serve = benchmark("serve")
    values = [random.Random(0).random() for _ in range(57)]
    expected = statistics.quantiles(values, n=100, method="inclusive")
    for share in (0.5, 0.9, 0.99):
        assert serve.percentile(values, share) == pytest.approx(expected[round(share * 100) - 1])


def test_the_floor_of_one_client_is_the_weights_over_the_bandwidth() -> None:
    serve, shape = benchmark("serve"), SHAPES["1.3b"]
    no_compute = {"bandwidth": 1e10, "matrix_peak": 1e30}
    per_token = (shape.read_parameters(1) + shape.head_parameters) * shape.itemsize / 1e10
    found = serve.floor_tokens_per_s(shape, 1, no_compute)
    assert 0.97 / per_token < found < 1 / per_token  # keys and values are read beside them
    assert found < serve.floor_tokens_per_s(shape, 8, no_compute) < 8 * found


def test_the_record_of_the_soak_has_no_faults() -> None:
    record = json.loads((BENCHMARKS / "soak.json").read_text())
    assert record["faults"] == []
    assert record["minutes"] >= 10
    assert set(record["memory_mib"]) == {"engine", "front end"}
    for before, after in record["memory_mib"].values():
        assert after - before <= record["most_growth_mib"]


def test_the_record_of_rising_load_adds_up() -> None:
    record = json.loads((BENCHMARKS / "serve.json").read_text())
    assert record["shape"] == "1.3b"
    for level in record["levels"]:
        tokens = level["requests"] * record["output_tokens"]
        assert level["output_tokens_per_s"] == pytest.approx(tokens / level["seconds"], rel=0.01)
        assert level["share_of_floor"] == pytest.approx(
            level["output_tokens_per_s"] / level["floor_tokens_per_s"], abs=0.01
        )
        assert level["ttft_ms"]["p50"] <= level["ttft_ms"]["p99"]
        assert level["tpot_ms"]["p50"] <= level["tpot_ms"]["p99"]
