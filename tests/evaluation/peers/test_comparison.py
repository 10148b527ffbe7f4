"""The comparison's own logic, with workers that only keep a diary."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
import pytest
from harness.cases import CASES, Request
from harness.shapes import SHAPES, Shape
from harness.systems import LoadOptions
from harness.timeline import Run
from harness.worker import WorkerError

Diary = list[tuple[str, list[Request]]]
SECONDS = {"npu-zoo": 1.0, "transformers": 2.0}


class FakeWorker:
    """Answers as a worker of a system would that is as fast as :data:`SECONDS` says."""

    diary: Diary = []  # noqa: RUF012
    options: dict[str, LoadOptions] = {}  # noqa: RUF012
    cached_tokens = 0
    spoiled = ""

    def __init__(self, system: str, threads: int) -> None:
        self.system, self.started = system, 100.0

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def load(self, options: LoadOptions) -> None:
        self.options[self.system] = options

    def call(self, command: str, **_: Any) -> Any:
        answers = {"checkpoint": "folder", "measure": {"bandwidth": 1e9, "matrix_peak": 1e9}, "peak_memory": 2**31}
        sizes = {"cache_bytes": 2**10 * SECONDS.get(self.system, 0), "full_head_bytes": 2**13}
        return {**answers, **sizes}[command]

    def run(self, requests: list[Request], static_batch: int = 0) -> Run:
        self.diary.append((self.system, requests))
        seconds, lengths = SECONDS[self.system], [request.max_tokens for request in requests]
        token_ids = [[int(self.system == self.spoiled)] * length for length in lengths]
        cached = self.cached_tokens if self.system == "npu-zoo" else 0
        moments = [100.0 + seconds * part for part in (0, 1, 1, 3)]
        return Run(moments[0], moments[1], moments[2], len(lengths), moments[3], lengths, cached, token_ids)


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs cases of the tiny shape; returns what was saved, one record per time of saving."""
    monkeypatch.setattr(FakeWorker, "diary", [])
    monkeypatch.setattr(engine, "Worker", FakeWorker)

    def run(*names: str, rounds: int = 2, shape: Shape = SHAPES["tiny"]) -> list[dict[str, Any]]:
        saved: list[dict[str, Any]] = []
        options = argparse.Namespace(threads=1, rounds=rounds, workdir=tmp_path, experts="eager")
        comparison = engine.Comparison(shape, options, lambda record: saved.append(json.loads(json.dumps(record))))
        comparison.run([CASES[name].scaled(shape.divisor) for name in names])
        return saved

    return run


def test_both_run_the_same_requests_in_changing_order(compare: Callable[..., Any]) -> None:
    compare("decode-8", rounds=3)
    measured = FakeWorker.diary[4:]
    own, peer = "npu-zoo", "transformers"
    assert [name for name, _ in FakeWorker.diary[2:4]] == [own, peer]
    assert [name for name, _ in measured] == [own, peer, peer, own, own, peer]
    for (_, first), (_, second) in zip(measured[::2], measured[1::2], strict=True):
        assert first == second
    assert measured[0][1] != measured[2][1]


def test_the_record_is_saved_after_every_case(compare: Callable[..., Any]) -> None:
    saved = compare("decode-1", "start", "mixed")
    assert [len(record["cases"]) for record in saved] == [1, 2, 3, 3]
    assert len(saved[-1]["measurements"]) == 2


@pytest.mark.parametrize(
    ("name", "own", "peer"),
    [("decode-1", 3 / 2, 3 / 4), ("prefill-8x512", 256.0, 128.0), ("start", 1.0, 2.0), ("memory", 2.0, 2.0)],
)
def test_samples(name: str, own: float, peer: float, compare: Callable[..., Any]) -> None:
    rounds = compare(name)[-1]["cases"][0]["rounds"]
    assert [(sample["npu-zoo"], sample["transformers"]) for sample in rounds] == [(own, peer)] * 2


@pytest.mark.parametrize("name", ["tiny", "tiny-mla"])
def test_cache_sizes_are_taken_once_and_full_heads_only_of_latents(name: str, compare: Callable[..., Any]) -> None:
    full = {"full heads": 8.0} if SHAPES[name].latent else {}
    case = compare("cache", rounds=3, shape=SHAPES[name])[-1]["cases"][0]
    assert case["rounds"] == [{"npu-zoo": 1.0, "transformers": 2.0, **full}]
    assert not case["higher_is_better"]


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_the_record_names_the_peers_experts(name: str, compare: Callable[..., Any]) -> None:
    record = compare("decode-1", shape=SHAPES[name])[-1]
    assert record["experts_implementation"] == ("eager" if SHAPES[name].experts else None)


def test_a_case_that_hits_the_prefix_cache_is_refused(
    compare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeWorker, "cached_tokens", 16)
    compare("shared-prefix")
    with pytest.raises(WorkerError, match="16 tokens of decode-1 from its prefix cache"):
        compare("decode-1")


def test_differing_greedy_tokens_end_the_benchmark(
    compare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeWorker, "spoiled", "npu-zoo")
    with pytest.raises(WorkerError, match="differ in 8 of 8 requests"):
        compare("decode-1")


def test_the_memory_case_caches_no_more_than_its_work_needs(compare: Callable[..., Any]) -> None:
    compare("memory")
    requests, options = FakeWorker.diary[-1][1], FakeWorker.options["npu-zoo"]
    tokens = sum(len(request.prompt) + request.max_tokens for request in requests)
    per_token = SHAPES["tiny"].kv_bytes_per_token
    assert tokens * per_token < options.kv_cache_memory < SHAPES["tiny"].kv_cache_memory
