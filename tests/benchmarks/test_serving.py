"""The benchmarks of the server: their judgements, their arithmetic, and what their records promise."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.shapes import SHAPES

from npu_zoo.evaluation.serving.observation import Failure, Observation, Status

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


def observation(index: int, tokens: int = 64, status: Status = "completed") -> Observation:
    """A request that is sent at its index, in seconds, and takes two: half of one to its first token."""
    failure = Failure(kind="closed", message="it broke") if status == "failed" else None
    sent = float(index)
    return Observation(
        index=index,
        sent=sent,
        arrivals=(sent + 0.5, sent + 2.0),
        characters=(1, 1),
        ended=sent + 2.0,
        status=status,
        failure=failure,
        output_tokens=tokens,
        counted_by_server=True,
    )


def test_the_figures_of_a_level() -> None:
    assert benchmark("serve").figures([observation(index) for index in range(3)]) == {
        "requests": 3,
        "seconds": 4.0,
        "requests_per_s": 0.75,
        "output_tokens_per_s": 48.0,
        "ttft_ms": {"p50": 500.0, "p99": 500.0},
        "tpot_ms": {"p50": 23.8, "p99": 23.8},
    }


@pytest.mark.parametrize(
    ("wrong", "said"), [(observation(1, 63), "asked for 64"), (observation(1, 64, "failed"), "it broke")]
)
def test_a_level_that_is_not_what_was_asked_for_is_no_result(wrong: Observation, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        benchmark("serve").figures([observation(0), wrong])


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
