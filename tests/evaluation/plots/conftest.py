"""Records of each kind of benchmark, as the commands write them, with figures that follow from a simple model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.evaluation.record import Machine, ResultRecord, write_record

MACHINE = Machine(
    hardware="cpu", cpu="A processor @ 2.5 GHz", cores=4, memory_gib=16, system="Linux", python="3", bandwidth=20e9,
    peak=300e9,
)  # fmt: skip
PAIRS = ((2048, 2048), (1024, 1024), (512, 512), (256, 256))


def offline_case(given: int, output: int, batch: int, speed: float = 1.0) -> dict[str, Any]:
    decode_bytes, decode_operations = 2_700_000_000, 2_700_000_000 * batch
    token_s = (0.14 + 0.02 * batch + 1e-5 * given * batch) / speed
    prefill_s = 2e-3 * given * batch / speed
    total_s = prefill_s + token_s * (output - 1)
    floor = {"seconds": 1.0, "limit": "memory", "bandwidth_share": 0.5, "peak_share": 0.5}
    return {
        "input": given, "output": output, "batch": batch, "total_s": total_s, "prefill_s": prefill_s,
        "prefill_average_s": prefill_s, "non_first_token_s": token_s, "together": True,
        "non_first_token_throughput": batch / token_s, "e2e_throughput": batch * output / total_s,
        "prefill": {"bytes": 2_700_000_000, "operations": 400_000_000 * given * batch, **floor},
        "decode": {"bytes": decode_bytes * (output - 1), "operations": decode_operations * (output - 1), **floor},
        "samples": [
            {"first_tokens": [prefill_s], "steps": [prefill_s, total_s * factor], "tokens": [1, output - 1]}
            for factor in (0.9, 1.0, 1.15)
        ],
    }  # fmt: skip


def _offline_body(speed: float = 1.0, batches: tuple[int, ...] = (1, 2, 4, 8)) -> dict[str, Any]:
    cases = [offline_case(*pair, batch, speed) for pair in PAIRS for batch in batches]
    probes = [offline_case(512, 512, batch, speed) for batch in (1, 2, 4, 8, 6, 5)]
    search = {
        "input": 512,
        "output": 512,
        "under_ms": 250.0,
        "largest_batch": 5,
        "limited_by": "latency",
        "probes": probes,
    }
    return {"cases": cases, "not_run": [], "searches": [search], "complete": True}


def level(
    name: str, ttft: float, tpot: float, *, failed: int = 0, interrupted: bool = False, **more: Any
) -> dict[str, Any]:
    def times(p50: float) -> dict[str, float]:
        return {"count": 9, "mean": p50, "p50": p50, "p90": 1.4 * p50, "p99": 2.1 * p50}

    figures = {"failed": failed, "request_throughput": 1.0, "ttft": times(ttft), "tpot": times(tpot)}
    return {"name": name, "loop": "open", "interrupted": interrupted, "figures": figures, "requests": [], **more}


def serve_body(scale: float = 1.0) -> dict[str, Any]:
    rates = [level(f"rate {r:g}", scale * (80 + 9 * r**3), scale * (40 + 2 * r), rate=r) for r in (0.5, 1, 2, 4, 8)]
    clients = [
        level(f"{n} clients", scale * 60 * n, scale * (40 + 3 * n), concurrency=n, failed=n // 64)
        for n in (1, 4, 16, 64)
    ]
    return {"levels": [*rates, *clients, level("rate inf", 9e4, 90)], "notes": []}


def peers_body() -> dict[str, Any]:
    def rounds(own: float, torch: float, llama: float) -> list[dict[str, float]]:
        return [
            {"npu-zoo": own * f, "transformers": torch, "llama.cpp": llama / f} for f in (0.97, 1.0, 1.02, 1.05, 0.99)
        ]

    work = {"bytes": 2_700_000_000 * 64, "operations": 2_700_000_000 * 64, "tokens": 64}
    wide = {"bytes": 2_700_000_000 * 4, "operations": 2_700_000_000 * 64, "tokens": 64}
    rate = {"unit": "tokens/s", "higher_is_better": True}
    time = {"unit": "s", "higher_is_better": False}
    cases = [
        {"name": "decode-1", "rounds": rounds(6, 5.1, 6.6), "work": work, **rate},
        {"name": "prefill-512", "rounds": rounds(110, 101, 60), "work": None, **rate},
        {"name": "batch-16", "rounds": rounds(60, 12, 41), "work": wide, **rate},
        {"name": "start", "rounds": rounds(3, 9, 1), "work": work, **time},
        {"name": "broken", "rounds": [], "work": None, **time},
    ]
    engines = [{"name": name} for name in ("npu-zoo", "transformers", "llama.cpp")]
    return {"engines": engines, "rounds": 5, "cases": cases}


BODIES: dict[str, Callable[..., dict[str, Any]]] = {
    "bench offline": _offline_body,
    "bench serve": serve_body,
    "bench compare": peers_body,
}


@pytest.fixture
def offline_body() -> Callable[..., dict[str, Any]]:
    """Makes the body of `bench offline`, with other batches."""
    return _offline_body


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Path]:
    """Writes a record of a kind."""

    def write(kind: str, name: str = "a", **changes: Any) -> Path:
        given = {"body": BODIES.get(kind, dict)(), "machine": MACHINE, **changes}
        path = tmp_path / f"{name}.json"
        write_record(ResultRecord(kind=kind, **given), path)  # type: ignore[arg-type]
        return path

    return write
