"""A server under mixed load for minutes: nothing may be lost, answered wrongly, or kept: benchmarks/soak.json.

    python benchmarks/soak.py [--minutes 2] [--clients 24] [--record benchmarks/soak.json] [--check]

Clients send completions and chats of random lengths, whole and streamed, sampled and greedy, some of a given form, and
beside them requests that are called off, cut in the middle, or wrong. What each greedy or seeded request has to answer
is asked for first, one at a time. At the end the server must be idle, its cache empty, its counts equal to the
clients', and its memory where it was after the first third. `--check` exits with 1 where any of this does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
from harness import machine
from prometheus_client.parser import text_string_to_metric_families

from npu_zoo.testing.serving import RunningServer

MODEL = "deepseek_coder"
SERVER = (
    "--model", MODEL, "--dtype", "float32", "--threads", "1", "--max-num-seqs", "16", "--max-queue", "8",
    "--kv-cache-memory", "16MiB", "--max-model-len", "512", "--log-level", "error", "--head-timeout", "5",
    "--min-priority", "-1",
)  # fmt: skip
LENGTHS = (1, 3, 17, 60)
"""Tokens of an answer."""
LEAST_MARGIN = 1e-3
"""Between the two most likely tokens of a greedy answer; sums of a batch are rounded by some 1e-5."""

MOST_SEEDED_OTHERWISE = 1e-3
"""The share of seeded answers that may differ: a draw within rounding of the border between two tokens."""

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
SECONDS_BETWEEN_SAMPLES = 1.0
SECONDS_TO_BE_IDLE = 30.0
MOST_GROWTH_MIB = 16.0
"""Of a process, from the first third of the load to its end; allocators keep some of what a larger batch took."""

WRONG: tuple[tuple[str, bytes, int], ...] = (
    ("/v1/completions", b"{", 400),
    ("/v1/completions", b"\xff\xfe", 400),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": -1}', 400),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400),
    ("/v1/completions", b'{"prompt": "\\ud800"}', 400),
    ("/v1/completions", b'{"prompt": "a", "n": 1000000}', 400),
    ("/v1/completions", json.dumps({"prompt": "a", "stop": [str(n) for n in range(1000)]}).encode(), 400),
    ("/v1/completions", json.dumps({"prompt": "word " * 2000}).encode(), 400),
    ("/v1/completions", b'{"model": "another", "prompt": "a"}', 404),
    ("/v1/chat/completions", b'{"messages": "no list"}', 400),
    ("/v1/chat/completions", b'{"messages": []}', 400),
    ("/v1/chat/completions", b"[" * 5000, 400),
    ("/nowhere", b"{}", 404),
    ("/health", b"{}", 405),
)


@dataclass
class Expected:
    """A request and what the server answers to it alone.

    Attributes:
        seeded: whether its tokens are drawn; the others are the most likely ones by a margin.
    """

    body: dict[str, Any]
    texts: list[str]
    seeded: bool


@dataclass
class Tally:
    """What has come of the load so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    tokens: int = 0
    retries: int = 0
    seeded: int = 0
    seeded_otherwise: int = 0

    def fault(self, what: str) -> None:
        """Note something that must not be, and say so at once."""
        self.faults.append(what)
        print(f"fault: {what}", file=sys.stderr, flush=True)


class Soak:
    """Clients of one server."""

    def __init__(self, server: RunningServer, seed: int) -> None:
        self.tally = Tally()
        self._random = random.Random(seed)
        self._server = server
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
        self._http = httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits)
        self._expected: list[Expected] = []
        self._kinds: list[tuple[int, str, Callable[[], Awaitable[None]]]] = [
            (40, "whole", self._whole),
            (25, "streamed", self._streamed),
            (8, "of a form", self._formed),
            (10, "called off", self._called_off),
            (5, "vanished", self._vanished),
            (4, "cut", self._cut),
            (8, "wrong", self._wrong),
        ]

    async def close(self) -> None:
        """End the clients' connections."""
        await self._http.aclose()

    async def learn(self) -> None:
        """Ask for every answer once, one at a time."""
        for number in range(10):
            prompt = " ".join(self._random.choice(("def", "f(x):", "return", "é", "数")) for _ in range(1 + number * 9))
            for length in LENGTHS:
                body = {"model": MODEL, "prompt": prompt, "max_tokens": length}
                await self._learn({**body, "temperature": 0, "ignore_eos": True}, seeded=False)
                await self._learn({**body, "seed": number, "n": 2}, seeded=True)

    async def _learn(self, body: dict[str, Any], *, seeded: bool) -> None:
        answer = await self._http.post("/v1/completions", json=body if seeded else {**body, "logprobs": 2})
        answer.raise_for_status()
        choices = answer.json()["choices"]
        if seeded or margin(choices[0]["logprobs"]["top_logprobs"]) > LEAST_MARGIN:
            self._expected.append(Expected(body, [choice["text"] for choice in choices], seeded))

    async def client(self, until: float) -> None:
        """One client's requests, one after the other."""
        weights = [weight for weight, *_ in self._kinds]
        while time.monotonic() < until:
            _, name, send = self._random.choices(self._kinds, weights)[0]
            try:
                await send()
                self.tally.outcomes[name] += 1
            except Exception as error:
                self.tally.fault(f"{name}: {type(error).__name__}: {error}")

    async def _whole(self) -> None:
        expected = self._random.choice(self._expected)
        extra = {"priority": self._random.randint(-1, 1)}
        answer = await self._post("/v1/completions", {**expected.body, **extra})
        self._compare(expected, [choice["text"] for choice in answer["choices"]])
        self.tally.tokens += answer["usage"]["completion_tokens"]

    async def _streamed(self) -> None:
        expected = self._random.choice(self._expected)
        texts = ["" for _ in expected.texts]
        finished: set[int] = set()
        body = {**expected.body, "stream": True, "stream_options": {"include_usage": True}}
        while not await self._stream(body, texts, finished):
            await asyncio.sleep(0.2)
        self._compare(expected, texts)
        if len(finished) != len(texts):
            self.tally.fault("streamed: a choice has no finish_reason")

    async def _stream(self, body: dict[str, Any], texts: list[str], finished: set[int]) -> bool:
        """Whether the request was let in."""
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code == 429:
                self.tally.retries += 1
                return False
            response.raise_for_status()
            last = ""
            async for line in response.aiter_lines():
                last = line or last
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                self.tally.tokens += (chunk.get("usage") or {}).get("completion_tokens", 0)
                for choice in chunk["choices"]:
                    texts[choice["index"]] += choice["text"]
                    if choice["finish_reason"]:
                        finished.add(choice["index"])
            if last != "data: [DONE]":
                raise RuntimeError("the stream ended early")
        return True

    async def _formed(self) -> None:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 200,
            "seed": self._random.randrange(50),
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        }
        answer = await self._post("/v1/chat/completions", body)
        choice = answer["choices"][0]
        if choice["finish_reason"] == "stop" and json.loads(choice["message"]["content"])["a"] not in (1, 2):
            self.tally.fault(f"of a form: {choice['message']['content']!r}")

    async def _called_off(self) -> None:
        body = {"model": MODEL, "prompt": "def f(x):", "max_tokens": 400, "ignore_eos": True, "stream": True}
        wanted = self._random.randrange(8)
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                wanted -= 1
                if wanted < 0:
                    return

    async def _vanished(self) -> None:
        body = json.dumps({"model": MODEL, "prompt": "def f(x):", "max_tokens": 400, "ignore_eos": True}).encode()
        await self._raw(body, len(body))
        await asyncio.sleep(self._random.random() / 2)

    async def _cut(self) -> None:
        body = json.dumps({"prompt": "def f(x):"}).encode()
        await self._raw(body[: len(body) // 2], len(body))

    async def _raw(self, body: bytes, declared: int) -> None:
        """Send something, and close the connection without reading."""
        url = httpx.URL(self._server.url)
        _, writer = await asyncio.open_connection(url.host, url.port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {declared}\r\n\r\n".encode() + body)
        await writer.drain()
        await asyncio.sleep(self._random.random() / 5)
        writer.transport.abort()

    async def _wrong(self) -> None:
        path, body, status = self._random.choice(WRONG)
        answer = await self._http.post(path, content=body, headers={"Content-Type": "application/json"})
        if answer.status_code not in (status, 429):
            self.tally.fault(f"wrong: {path} {body[:60]!r} was answered with {answer.status_code}: {answer.text[:200]}")

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """An answer; a request that the queue has no room for is sent again, as its answer asks."""
        while True:
            answer = await self._http.post(path, json=body)
            if answer.status_code != 429:
                answer.raise_for_status()
                found: dict[str, Any] = answer.json()
                return found
            self.tally.retries += 1
            await asyncio.sleep(0.2)

    def _compare(self, expected: Expected, texts: list[str]) -> None:
        self.tally.seeded += expected.seeded
        if texts != expected.texts and expected.seeded:
            self.tally.seeded_otherwise += 1
        elif texts != expected.texts:
            self.tally.fault(f"{expected.body} gave {texts!r} and not {expected.texts!r}")


def margin(positions: list[dict[str, float]]) -> float:
    """The least distance between the two most likely tokens of a position, in natural-log probability."""
    return min(abs(first - second) for first, second in (sorted(top.values())[-2:] for top in positions))


def metrics_of(text: str) -> dict[str, float]:
    """Metrics by name, summed over their labels."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] += sample.value
    return dict(found)


def anonymous_mib(pid: int) -> float:
    """A process's resident memory that no file stands behind."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


class Memory:
    """Resident memory of a server's processes over time, in MiB, but for that of files.

    What is mapped of a library is shared as long as another process has it, too, and says nothing of this one.
    """

    def __init__(self, server: RunningServer) -> None:
        self._processes = server.children
        self.samples: dict[str, list[float]] = {name: [] for name in self._processes}

    async def watch(self, until: float) -> None:
        """Take samples until a moment."""
        while time.monotonic() < until:
            for name, pid in self._processes.items():
                self.samples[name].append(anonymous_mib(pid))
            await asyncio.sleep(SECONDS_BETWEEN_SAMPLES)

    def growth(self) -> dict[str, tuple[float, float]]:
        """Each process's median after the first third of the samples, and at their end."""
        found = {}
        for name, samples in self.samples.items():
            window = max(1, len(samples) // 10)
            third = len(samples) // 3
            found[name] = (statistics.median(samples[third : third + window]), statistics.median(samples[-window:]))
        return found


async def idle_metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """The metrics once nothing runs any more, or those of the last look."""
    deadline = time.monotonic() + SECONDS_TO_BE_IDLE
    while True:
        found = metrics_of((await http.get("/metrics")).text)
        busy = found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"]
        if not (busy or found["npu_zoo_requests_in_flight"]) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.2)


async def load(server: RunningServer, minutes: float, clients: int, seed: int) -> dict[str, Any]:
    """Run the load and say what came of it."""
    soak = Soak(server, seed)
    await soak.learn()
    memory = Memory(server)
    start = time.monotonic()
    until = start + minutes * 60
    report = asyncio.create_task(tell(soak, start, until))
    await asyncio.gather(memory.watch(until), *(soak.client(until) for _ in range(clients)))
    seconds = time.monotonic() - start
    report.cancel()
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        left = await idle_metrics(http)
    await soak.close()
    growth = memory.growth()
    faults = [*soak.tally.faults, *what_is_left(left), *what_grew(growth), *what_differed(soak.tally)]
    return {
        "minutes": round(seconds / 60, 2),
        "clients": clients,
        "most_growth_mib": MOST_GROWTH_MIB,
        "requests": dict(sorted(soak.tally.outcomes.items())),
        "requests_per_s": round(sum(soak.tally.outcomes.values()) / seconds, 1),
        "tokens_of_whole_answers": soak.tally.tokens,
        "seeded_answers": soak.tally.seeded,
        "seeded_answers_otherwise": soak.tally.seeded_otherwise,
        "turned_away_and_sent_again": soak.tally.retries,
        "preemptions": left["vllm:num_preemptions_total"],
        "engine_restarts": left["npu_zoo_engine_restarts_total"],
        "memory_mib": {name: [round(value, 1) for value in pair] for name, pair in growth.items()},
        "faults": faults,
    }


async def tell(soak: Soak, start: float, until: float) -> None:
    """Say how far it has come, now and then."""
    while True:
        await asyncio.sleep(10)
        done, now = sum(soak.tally.outcomes.values()), time.monotonic()
        rate, left = done / (now - start), max(0.0, until - now)
        print(f"{done} requests, {rate:.1f}/s, {len(soak.tally.faults)} faults, {left:.0f} s left", file=sys.stderr)


def what_is_left(metrics: dict[str, float]) -> list[str]:
    """What an idle server must not have."""
    zero = (
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "npu_zoo_requests_in_flight", "npu_zoo_engine_restarts_total", "request_failed_total",
    )  # fmt: skip
    found = [f"{name} is {metrics[name]:g} at the end" for name in zero if metrics[name]]
    ended = metrics["vllm:request_success_total"]
    if metrics["request_received_total"] != ended:
        found.append(f"{metrics['request_received_total']:g} requests were received, and {ended:g} ended")
    return found


def what_differed(tally: Tally) -> list[str]:
    """More seeded answers that differ than draws fall on borders."""
    if tally.seeded_otherwise <= MOST_SEEDED_OTHERWISE * tally.seeded:
        return []
    return [f"{tally.seeded_otherwise} of {tally.seeded} seeded answers are not what they were alone"]


def what_grew(growth: dict[str, tuple[float, float]]) -> list[str]:
    """Processes whose memory has grown by more than allocators account for."""
    return [
        f"the {name} process grew from {before:.1f} to {after:.1f} MiB"
        for name, (before, after) in growth.items()
        if after - before > MOST_GROWTH_MIB
    ]


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="of load")
    parser.add_argument("--clients", type=int, default=24, help="at once")
    parser.add_argument("--seed", type=int, default=0, help="of what the clients do")
    parser.add_argument("--record", type=Path, help="where the figures go")
    parser.add_argument("--check", action="store_true", help="exit with 1 where something was lost, wrong or kept")
    options = parser.parse_args()
    with RunningServer(SERVER) as server:
        figures = asyncio.run(load(server, options.minutes, options.clients, options.seed))
        log = server.log
    record = {"date": time.strftime("%Y-%m-%d"), "machine": machine.describe(1), "seed": options.seed, **figures}
    text = json.dumps(record, indent=2)
    print(text)
    if options.record:
        options.record.write_text(text + "\n")
    if figures["faults"]:
        print(f"what the server wrote:\n{log[-4000:]}", file=sys.stderr)
    return int(options.check and bool(figures["faults"]))


if __name__ == "__main__":
    sys.exit(main())
