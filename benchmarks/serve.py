"""The server at rising load, beside what the machine allows: benchmarks/serve.json.

    python benchmarks/serve.py [--shape 1.3b] [--clients 1,2,4,8,16,32] [--threads 2] [--record benchmarks/serve.json]

As many clients as a level says send streamed completions, one after the other each: random prompts of one length, an
exact number of new tokens. Clients and figures are those of `npu-zoo bench serve`. The floor of a level is what its
decode steps must read (the weights once for all sequences of a step, and their keys and values) over the machine's read
bandwidth, plus what its prompts must compute over the matrix peak, both measured in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import machine
from harness.checkpoint import ensure_checkpoint
from harness.shapes import SHAPES, Shape

from npu_zoo.evaluation.serving.arrivals import ClosedLoop
from npu_zoo.evaluation.serving.client import Client
from npu_zoo.evaluation.serving.figures import Distribution, LevelFigures
from npu_zoo.evaluation.serving.load import Level, run_level
from npu_zoo.evaluation.serving.observation import Observation
from npu_zoo.evaluation.serving.requests import RequestForm
from npu_zoo.evaluation.serving.work import LengthRange, RandomIds
from npu_zoo.protocol.server_address import ServerAddress
from npu_zoo.testing.serving import RunningServer

FOLDER = Path(__file__).parent
PROMPT_TOKENS = 128
OUTPUT_TOKENS = 64
LEAST_REQUESTS = 6
ROUNDS = 3
"""Requests of each client, where that makes more than the least number."""


async def level(url: str, shape: Shape, clients: int, least: int = LEAST_REQUESTS) -> dict[str, Any]:
    """What so many clients see."""
    work = RandomIds(
        LengthRange(PROMPT_TOKENS, PROMPT_TOKENS), LengthRange(OUTPUT_TOKENS, OUTPUT_TOKENS), range(shape.num_tokens)
    )
    planned = Level(ClosedLoop(clients), max(least, clients * ROUNDS), seed=f"{clients} of {least}")
    form = RequestForm("completions", shape.model, ignore_eos=True)
    async with Client(ServerAddress.parse(url, "the server")) as client:
        ran = await run_level(client, planned, form, work.asks(planned.source("work")))
    return {"clients": clients, **figures(ran.observations)}


def figures(observations: Sequence[Observation]) -> dict[str, Any]:
    """A level's figures as the page has them.

    Raises:
        RuntimeError: a request failed, or has another number of tokens than it was to have.
    """
    found = LevelFigures.of(observations)
    if found.failed:
        raise RuntimeError(f"{found.failed} requests failed: {found.failures[0].message}")
    if any(one.output_tokens != OUTPUT_TOKENS for one in observations) or not found.counted_by_server:
        raise RuntimeError(f"asked for {OUTPUT_TOKENS} tokens, and not every answer has them")
    return {
        "requests": found.completed,
        "seconds": round(found.seconds, 2),
        "requests_per_s": round(found.request_throughput, 3),
        "output_tokens_per_s": round(found.output_throughput, 1),
        "ttft_ms": _points(found.ttft),
        "tpot_ms": _points(found.tpot),
    }


def _points(times: Distribution | None) -> dict[str, float]:
    return {"p50": round(times.p50, 1), "p99": round(times.p99, 1)} if times else {}


def floor_tokens_per_s(shape: Shape, clients: int, measured: dict[str, float]) -> float:
    """Output tokens per second that the machine allows at most, with as many sequences in every decode step."""
    context = PROMPT_TOKENS + OUTPUT_TOKENS / 2
    read = (shape.read_parameters(clients) + shape.head_parameters) * shape.itemsize
    step = (read + clients * context * shape.kv_bytes_per_token) / measured["bandwidth"]
    prompt = 2 * shape.linear_parameters * PROMPT_TOKENS / measured["matrix_peak"]
    return OUTPUT_TOKENS * clients / (OUTPUT_TOKENS * step + clients * prompt)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every level, with its floor."""
    shape = SHAPES[options.shape]
    weights = ensure_checkpoint(options.workdir, shape)
    import torch

    torch.set_num_threads(options.threads)
    measured = machine.measure()
    arguments = ["--model", shape.model, "--weights", str(weights), "--dtype", shape.dtype, "--hardware", "cpu"]
    arguments += ["--threads", str(options.threads), "--max-model-len", "1024", "--kv-cache-memory", "3GiB"]
    levels = []
    with RunningServer([*arguments, "--log-level", "error"], timeout=600) as server:
        asyncio.run(level(server.url, shape, 1, least=1))
        for clients in options.clients:
            found = asyncio.run(level(server.url, shape, clients))
            allowed = floor_tokens_per_s(shape, clients, measured)
            found["floor_tokens_per_s"] = round(allowed, 1)
            found["share_of_floor"] = round(found["output_tokens_per_s"] / allowed, 3)
            print(json.dumps(found), file=sys.stderr, flush=True)
            levels.append(found)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {**machine.describe(options.threads), **measured},
        "shape": shape.name,
        "dtype": shape.dtype,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "levels": levels,
    }


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.3b")
    parser.add_argument("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--threads", type=int, default=2, help="of the engine")
    parser.add_argument("--workdir", type=Path, default=FOLDER / "build", help="where checkpoints are kept")
    parser.add_argument("--record", type=Path, help="where the figures go")
    options = parser.parse_args()
    record = run(options)
    text = json.dumps(record, indent=2)
    print(text)
    if options.record:
        options.record.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
