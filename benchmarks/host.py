"""What a step costs beside the model, by part, as requests and contexts grow: benchmarks/host.json.

    python benchmarks/host.py [--running 1,32,256] [--waiting 0,10000] [--contexts 128,2048,8192] [--record FILE]

The engine is the real one, with its scheduler, cache, attention backend, sampler and tokenizer; only the model's layers
are replaced by tensors that are there already, so that what is left is the host's own work. Those that wait find no
room: what runs holds all of the cache, and the first that waits begins as one that runs does.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import machine
from harness.checkpoint import ensure_checkpoint
from harness.shapes import SHAPES

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.attention import ReplayAttention

FOLDER = Path(__file__).parent
SHAPE = replace(
    SHAPES["1.3b"], name="host", model="deepseek_coder:custom", num_hidden_layers=1, hidden_size=256,
    intermediate_size=256, num_attention_heads=2, num_key_value_heads=1,
)  # fmt: skip
"""One small layer below a vocabulary of the usual size, since that is what sampling works on."""
PARTS = ("schedule", "rows", "attention", "tensors", "sample", "rest")
SAMPLING = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True),
    "top-p, seed": SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=None, ignore_eos=True),
    "5 logprobs": SamplingParams(temperature=0.0, logprobs=5, max_tokens=None, ignore_eos=True),
    "penalties": SamplingParams(
        temperature=0.0, repetition_penalty=1.1, frequency_penalty=0.1, max_tokens=None, ignore_eos=True
    ),
}
STEPS = 24
BUDGET = 16384
ROOM = 256


@dataclass(frozen=True)
class Case:
    """What is in the engine while its steps are timed."""

    running: int
    waiting: int
    context: int
    sampling: str = "greedy"


class Clock:
    """Seconds by part of a step; a part inside another one is not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = [0.0]

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A callable whose time counts for a part."""

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.measure(part):
                return call(*arguments, **options)

        return timed

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count what happens inside for a part."""
        begin = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self.seconds[part] += spent - self._inner.pop()
            self._inner[-1] += spent


def _stand_in(model: Any, rows: int) -> None:
    """Have a model's layers give what was computed beforehand."""
    import torch

    config = model.config
    dtype = getattr(torch, SHAPE.dtype)
    hidden = torch.zeros(BUDGET, config.hidden_size, dtype=dtype)
    logits = torch.randn(rows, config.vocab_size).to(dtype)
    model.forward = lambda x, positions, context: hidden[: len(x)]
    model.compute_logits = lambda states: logits[: len(states)]


def load(case: Case, weights: Path, steps: int) -> LLM:
    """An engine with room for what runs."""
    room = -(-(case.context + steps + 8) // ROOM) * ROOM
    llm = LLM(
        SHAPE.model, str(weights), hardware="cpu", dtype=SHAPE.dtype, threads=1, max_model_len=room,
        max_num_seqs=case.running + 1, max_num_batched_tokens=BUDGET,
        kv_cache_memory=case.running * room * SHAPE.kv_bytes_per_token * 5 // 4,
    )  # fmt: skip
    _stand_in(llm.engine.runner.model, case.running + 1)  # type: ignore[attr-defined]
    return llm


def _fill(engine: Any, case: Case, steps: int) -> None:
    """Bring requests to where they decode, give them room for steps, then take what is left, so that others wait."""
    draw = random.Random(0)
    prompts = [[draw.randrange(SHAPE.num_tokens) for _ in range(case.context)] for _ in range(case.running)]
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, SAMPLING[case.sampling])
    while engine.scheduler.num_waiting or any(s.num_output_tokens < 2 for s in engine.scheduler.running):
        engine.step()
    for sequence in engine.scheduler.running:
        engine.kv.reserve(sequence, sequence.num_tokens + steps)
    first = engine.scheduler.running[0]
    engine.kv.reserve(first, (len(first.slots) + engine.kv.num_free) * engine.runner.cache.slot_size)
    for number in range(case.waiting):
        # The first begins as one that runs does, whose blocks it would share if there were room for the rest.
        prompt = prompts[0] + [5] if number == 0 else [number % SHAPE.num_tokens] * 32
        engine.add_request(f"waiting {number}", prompt, SAMPLING[case.sampling])


def watch(llm: LLM, clock: Clock) -> None:
    """Have the parts of the engine's steps timed."""
    from npu_zoo.engine import engine as module

    engine: Any = llm.engine
    engine.scheduler.schedule = clock.timed("schedule", engine.scheduler.schedule)
    attention = engine.runner.attention
    attention.prepare = clock.timed("attention", attention.prepare)
    if isinstance(attention, ReplayAttention):
        attention.refill = clock.timed("attention", attention.refill)  # type: ignore[method-assign]
    engine.runner.execute = clock.timed("tensors", engine.runner.execute)
    engine.sampler.sample = clock.timed("sample", engine.sampler.sample)
    module.step_rows = clock.timed("rows", module.step_rows)  # type: ignore[attr-defined]


def run(case: Case, weights: Path, steps: int = STEPS) -> tuple[dict[str, float], str]:
    """Microseconds by part of a decode step, as medians over steps, and the attention backend.

    Raises:
        SystemExit: a step was not one of all that run and of nobody else.
    """
    from npu_zoo.engine import engine as module

    rows_of = module.step_rows
    llm = load(case, weights, 2 * steps)
    engine: Any = llm.engine
    backend = engine.config.attention_choice.backend
    try:
        _fill(engine, case, steps)
        clock = Clock()
        watch(llm, clock)
        samples = []
        for _ in range(steps):
            clock.seconds.clear()
            with clock.measure("rest"):
                outputs = engine.step()
            if len(outputs) != case.running or engine.scheduler.num_waiting != case.waiting:
                raise SystemExit(f"{case}: {len(outputs)} got a token, {engine.scheduler.num_waiting} wait")
            samples.append(dict(clock.seconds))
    finally:
        module.step_rows = rows_of  # type: ignore[attr-defined]
        llm.shutdown()
    medians = {part: statistics.median(sample.get(part, 0.0) for sample in samples) for part in PARTS}
    return {part: round(1e6 * seconds, 1) for part, seconds in medians.items()}, backend


def cases(running: list[int], waiting: list[int], contexts: list[int]) -> list[Case]:
    """Every size greedily, and every way of sampling at the shortest context with nobody waiting."""
    greedy = [Case(r, w, c) for r in running for c in contexts for w in waiting]
    other = [Case(r, waiting[0], contexts[0], name) for r in running for name in SAMPLING if name != "greedy"]
    return greedy + other


def numbers(text: str) -> list[int]:
    """Numbers from a list with commas."""
    return [int(part) for part in text.split(",")]


def main() -> int:
    """Measure all cases and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=numbers, default=[1, 32, 256])
    parser.add_argument("--waiting", type=numbers, default=[0, 10000])
    parser.add_argument("--contexts", type=numbers, default=[128, 2048, 8192])
    parser.add_argument("--workdir", type=Path, default=FOLDER / "build")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    weights = ensure_checkpoint(arguments.workdir, SHAPE)
    rows, load, backend = [], os.getloadavg()[0], ""
    for case in cases(arguments.running, arguments.waiting, arguments.contexts):
        found, backend = run(case, weights)
        rows.append({**vars(case), "microseconds": found})
        print(f"{case}: {sum(found.values()):.0f} us: {found}", file=sys.stderr, flush=True)
    described = {"vocabulary": SHAPE.vocab_size, "backend": backend, "load": round(load, 1)}
    record = {"machine": machine.describe(1), "steps": STEPS, **described, "rows": rows}
    if arguments.record:
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
