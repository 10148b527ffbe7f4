"""Many requests at once have the outputs that each of them has alone."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx2 as httpx
import pytest

from npu_zoo.testing.serving import RunningServer

MODEL = "deepseek_coder:demo"
AT_ONCE = 40
WORDS = ("def", "add(a, b):", "return", "class Stack:\n", "é", "数", "import os\n", "    ")
FORMS: tuple[dict[str, Any], ...] = (
    {"regex": "[a-f]{2,9}-(yes|no)"},
    {"choice": ["red", "green", "blue"]},
    {"json": {"type": "array", "items": {"enum": [1, "b"]}, "minItems": 2, "maxItems": 4}},
    {"grammar": 'start: "f(" N ("," N)* ")"\nN: /[0-9]{1,2}/'},
)


def requests(seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Paths and bodies of every kind, with prompts and answers of many lengths."""
    draw = random.Random(seed)
    found = []
    for number in range(AT_ONCE):
        prompt = " ".join(draw.choice(WORDS) for _ in range(draw.choice((1, 5, 30, 100))))
        body: dict[str, Any] = {"model": MODEL, "max_tokens": draw.choice((1, 4, 12, 32))}
        body |= {"temperature": 0} if number % 2 else {"seed": number, "n": draw.choice((1, 2, 3))}
        if number % 5 == 0:
            body |= {"structured_outputs": draw.choice(FORMS), "max_tokens": 40}
        if number % 3 == 0:
            found.append(("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]}))
            found[-1][1].update({"logprobs": True, "top_logprobs": 2} if number % 4 == 0 else {})
        else:
            found.append(("/v1/completions", {**body, "prompt": [prompt, "x"] if number % 7 == 0 else prompt}))
            found[-1][1].update({"logprobs": 2} if number % 4 == 0 else {})
    return found


class Answer:
    """What came of a request, however it came."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.ends: dict[int, str | None] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.usage: tuple[int, int] | None = None

    def take(self, data: dict[str, Any]) -> None:
        if data.get("usage"):
            self.usage = (data["usage"]["prompt_tokens"], data["usage"]["completion_tokens"])
        for choice in data["choices"]:
            number = choice["index"]
            said = choice.get("message") or choice.get("delta") or choice
            self.texts[number] = self.texts.get(number, "") + (said.get("content") or said.get("text") or "")
            self.ends[number] = choice["finish_reason"]
            found = choice["logprobs"] or {}
            values = [entry["logprob"] for entry in found.get("content") or []] or found.get("token_logprobs") or []
            self.logprobs.setdefault(number, []).extend(values)

    def same(self, other: Answer) -> None:
        assert self.texts == other.texts
        assert self.ends == other.ends
        assert self.usage == other.usage
        for number, values in self.logprobs.items():
            assert values == pytest.approx(other.logprobs[number], abs=1e-4)


async def ask(http: httpx.AsyncClient, path: str, body: dict[str, Any], *, stream: bool) -> Answer:
    answer = Answer()
    if not stream:
        response = await http.post(path, json=body)
        response.raise_for_status()
        answer.take(response.json())
        return answer
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", path, json=asked) as events:
        events.raise_for_status()
        lines = [line[6:] async for line in events.aiter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    for line in lines:
        answer.take(json.loads(line))
    return answer


async def compare(url: str) -> None:
    asked = requests(seed=0)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as http:
        alone = [await ask(http, path, body, stream=False) for path, body in asked]
        # Backwards, so that the prefix cache is met in another order too.
        together = await asyncio.gather(
            *(ask(http, path, body, stream=bool(number % 2)) for number, (path, body) in reversed([*enumerate(asked)]))
        )
    for one, other in zip(alone, reversed(together), strict=True):
        one.same(other)


def test_outputs_do_not_depend_on_what_runs_beside_them() -> None:
    options = ("--dtype", "float32", "--threads", "1", "--log-level", "error", "--max-num-seqs", "32")
    with RunningServer(("--model", MODEL, "--kv-cache-memory", "6MiB", *options)) as server:
        asyncio.run(compare(server.url))
