"""The cases: what is asked of every engine, how a run of it becomes one figure, and what that takes at least."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.peers.worker.driver import Request
from npu_zoo.evaluation.peers.worker.timeline import Run
from npu_zoo.evaluation.work import ModelWork, Work, total

Metric = Literal["decode", "prefill", "total", "start", "memory", "cache"]
UNITS: dict[Metric, str] = {
    "decode": "tokens/s",
    "prefill": "tokens/s",
    "total": "tokens/s",
    "start": "s",
    "memory": "GiB",
    "cache": "KiB",
}
START_PROMPT = "# Return the n-th Fibonacci number.\ndef fibonacci(n):\n"
START_ROOM = 128
"""Tokens that a sequence needs at most for :data:`START_PROMPT`, whatever the tokenizer, and one more."""
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Case:
    """One line of the result.

    Attributes:
        metric: ``decode``: output tokens per second after every request has its first token; ``prefill``: prompt
            tokens per second until then; ``total``: prompt and output tokens per second; ``start``: seconds from
            process start to the first token; ``memory``: peak resident memory of a process that does the work;
            ``cache``: cache for a token of context, in all layers.
        prompt, output: lengths in tokens, drawn uniformly from [low, high]; ``prompt`` comes after ``shared_prefix``.
        static_batch: rows of one batch where an engine's driver cannot batch continuously; 0 takes all at once.
    """

    name: str
    title: str
    metric: Metric
    count: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    shared_prefix: int = 0
    static_batch: int = 0

    @property
    def unit(self) -> str:
        """Of the figure."""
        return UNITS[self.metric]

    @property
    def higher_is_better(self) -> bool:
        """Rates are; seconds, memory and cache are not."""
        return self.metric in ("decode", "prefill", "total")

    @property
    def fresh(self) -> bool:
        """Whether each run needs a process of its own."""
        return self.metric in ("start", "memory", "cache")

    def scaled(self, divisor: int) -> Case:
        """The same case with shorter prompts and outputs."""
        if divisor == 1:
            return self
        low, high = self.prompt
        shortest, longest = self.output
        return replace(
            self,
            title=f"{self.title} (lengths / {divisor})",
            prompt=(max(1, low // divisor), max(1, high // divisor)),
            output=(min(shortest, max(2, shortest // divisor)), min(longest, max(2, longest // divisor))),
            shared_prefix=self.shared_prefix // divisor,
        )

    def requests(self, num_tokens: int, round_number: int) -> list[Request]:
        """A round's requests: the same for all engines, of tokens that no other round has used.

        Args:
            num_tokens: prompts hold ids below it.
            round_number: -1 is the warm-up.
        """
        if self.metric == "start":
            return [Request(START_PROMPT, 1)]
        lengths = random.Random(self.name)
        tokens = random.Random(f"{self.name}/{round_number}")

        def draw(length: int) -> list[int]:
            return [tokens.randrange(num_tokens) for _ in range(length)]

        prefix = draw(self.shared_prefix)
        return [
            Request(prefix + draw(lengths.randint(*self.prompt)), lengths.randint(*self.output))
            for _ in range(self.count)
        ]

    def warm_up(self, num_tokens: int) -> list[Request]:
        """Requests of the same form that are not measured: one batch, few tokens."""
        requests = self.requests(num_tokens, -1)[: self.static_batch or None]
        return [replace(request, max_tokens=min(request.max_tokens, WARM_UP_TOKENS)) for request in requests]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that it may have."""
        return START_ROOM if self.metric == "start" else self.shared_prefix + self.prompt[1] + self.output[1]

    def value(self, run: Run, requests: list[Request]) -> float:
        """The figure of a run, in :attr:`unit`; for the rates only."""
        prompt = sum(len(request.prompt) for request in requests)
        output = sum(run.output_lengths)
        if self.metric == "decode":
            return (output - run.tokens_at_all_started) / (run.end - run.all_started)
        if self.metric == "prefill":
            return prompt / (run.all_started - run.start)
        if self.metric == "total":
            return (prompt + output) / (run.end - run.start)
        raise ValueError(f"{self.name}: a run alone does not tell its {self.metric}")


def _decode(batch: int) -> Case:
    # 64 tokens follow the first one, which belongs to the prefill.
    return Case(f"decode-{batch}", f"decode, batch {batch}", "decode", batch, (128, 128), (65, 65))


def _prefill(batch: int, length: int) -> Case:
    name, title = f"prefill-{batch}x{length}", f"prefill, {batch} x {length:,}"
    return Case(name, title, "prefill", batch, (length, length), (1, 1))


CATALOGUE: dict[str, Case] = {
    case.name: case
    for case in (
        _decode(1),
        _decode(8),
        _decode(32),
        _prefill(1, 512),
        _prefill(1, 2048),
        _prefill(8, 512),
        Case(
            "mixed",
            "64 requests, prompts 16..512, outputs 8..128",
            "total",
            64,
            (16, 512),
            (8, 128),
            static_batch=16,
        ),
        Case(
            "shared-prefix",
            "32 requests sharing 1,024 tokens + 32 own, 16 new",
            "total",
            32,
            (32, 32),
            (16, 16),
            shared_prefix=1024,
            static_batch=16,
        ),
        Case("start", "process start to first token", "start", 1, (1, 1), (1, 1)),
        Case("memory", "peak memory, 8 x 512 prompt, 16 new", "memory", 8, (512, 512), (16, 16)),
        Case("memory-1", "peak memory, 1 x 128 prompt, 64 new", "memory", 1, (128, 128), (64, 64)),
        Case("cache", "cache per token of context", "cache", 2, (128, 128), (16, 16)),
    )
}

DEFAULT_CASES = ("decode-1", "decode-8", "prefill-1x512", "prefill-8x512", "mixed")


def named_cases(text: str) -> list[Case]:
    """Cases of the catalogue, as ``decode-1,mixed``.

    Raises:
        UsageError: one is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in CATALOGUE]
    if unknown or not names:
        raise UsageError(f"no case {', '.join(unknown) or text!r}; there are {', '.join(CATALOGUE)}")
    return [CATALOGUE[name] for name in dict.fromkeys(names)]


def cases_of_lengths(wanted: Iterable[tuple[int, int, int]]) -> list[Case]:
    """Prefill and decode for each (prompt length, output length, batch); a prefill that several have comes once."""
    cases = [case for prompt, output, batch in wanted for case in _of_lengths(prompt, output, batch)]
    return list({case.name: case for case in cases}.values())


def _of_lengths(prompt: int, output: int, batch: int) -> list[Case]:
    """Without a second token there is no decoding to be seen."""
    decode = Case(
        f"decode-{batch}x{prompt}+{output}",
        f"decode, {batch} x {prompt:,} + {output:,}",
        "decode",
        batch,
        (prompt, prompt),
        (output, output),
    )
    return [_prefill(batch, prompt), *([decode] if output > 1 else [])]


def work_of(case: Case, model: ModelWork, requests: Sequence[Request]) -> tuple[Work, int]:
    """What a case's measured part needs at least, and the tokens that its rate counts; for the rates only.

    A shared prefix is computed once; steps are as few as batching allows.
    """
    own = [(len(request.prompt) - case.shared_prefix, request.max_tokens) for request in requests]
    prefix = case.shared_prefix
    shared = [(0, prefix)] if prefix else []
    prefill = model.step([*shared, *((prefix, prompt) for prompt, _ in own)], len(own))
    prompts = sum(prompt + prefix for prompt, _ in own)
    if case.metric == "prefill":
        return prefill, prompts
    decode = total(_decode_steps(model, [(prefix + prompt, output - 1) for prompt, output in own]))
    if case.metric == "decode":
        return decode, sum(output - 1 for _, output in own)
    return prefill + decode, prompts + sum(output for _, output in own)


def _decode_steps(model: ModelWork, sequences: Sequence[tuple[int, int]]) -> Iterator[Work]:
    """Steps of sequences that have so many tokens in the cache and so many steps before them."""
    for number in range(max(steps for _, steps in sequences)):
        rows = [(context + number, 1) for context, steps in sequences if number < steps]
        yield model.step(rows, len(rows))
