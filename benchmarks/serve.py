"""The server at rising load, beside what the machine allows: benchmarks/serve.json.

    python benchmarks/serve.py [--shape 1.3b] [--clients 1,2,4,8,16,32] [--threads 2] [--record benchmarks/serve.json]

As many clients as a level says send streamed completions, one after the other each: random prompts of one length, an
exact number of new tokens. Times are the clients' own. The floor of a level is what its decode steps must read (the
weights once for all sequences of a step, and their keys and values) over the machine's read bandwidth, plus what its
prompts must compute over the matrix peak, both measured in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
from harness import machine
from harness.checkpoint import ensure_checkpoint
from harness.shapes import SHAPES, Shape

from npu_zoo.testing.serving import RunningServer

FOLDER = Path(__file__).parent
PROMPT_TOKENS = 128
OUTPUT_TOKENS = 64
LEAST_REQUESTS = 6
ROUNDS = 3
"""Requests of each client, where that makes more than the least number."""


@dataclass(frozen=True)
class Times:
    """One request's: seconds on the client's clock from its sending, one for each event with text."""

    tokens: list[float]
    total: float

    @property
    def first(self) -> float:
        """To the first token."""
        return self.tokens[0]

    @property
    def per_token(self) -> float:
        """Of a token after the first, on average."""
        return (self.total - self.first) / (OUTPUT_TOKENS - 1)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that a share of them does not exceed, between neighbours in proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


async def ask(http: httpx.AsyncClient, model: str, prompt: list[int]) -> Times:
    """One request."""
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    body |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    start = time.perf_counter()
    arrived: list[float] = []
    usage: dict[str, int] = {}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                arrived.append(time.perf_counter() - start)
                usage = json.loads(line[6:]).get("usage") or usage
    if usage.get("completion_tokens") != OUTPUT_TOKENS:
        raise RuntimeError(f"asked for {OUTPUT_TOKENS} tokens and got {usage}")
    return Times(arrived, arrived[-1])


async def level(url: str, shape: Shape, clients: int, seed: int, least: int = LEAST_REQUESTS) -> dict[str, Any]:
    """What so many clients see."""
    source = random.Random(seed)
    count = max(least, clients * ROUNDS)
    prompts = [[source.randrange(shape.num_tokens) for _ in range(PROMPT_TOKENS)] for _ in range(count)]
    times: list[Times] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:

        async def client() -> None:
            while prompts:
                times.append(await ask(http, shape.model, prompts.pop()))

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds = time.perf_counter() - start
    first, per_token = [t.first * 1e3 for t in times], [t.per_token * 1e3 for t in times]
    return {
        "clients": clients,
        "requests": count,
        "seconds": round(seconds, 2),
        "requests_per_s": round(count / seconds, 3),
        "output_tokens_per_s": round(count * OUTPUT_TOKENS / seconds, 1),
        "ttft_ms": {"p50": round(statistics.median(first), 1), "p99": round(percentile(first, 0.99), 1)},
        "tpot_ms": {"p50": round(statistics.median(per_token), 1), "p99": round(percentile(per_token, 0.99), 1)},
    }


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
        asyncio.run(level(server.url, shape, 1, -1, least=1))
        for clients in options.clients:
            found = asyncio.run(level(server.url, shape, clients, clients))
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
