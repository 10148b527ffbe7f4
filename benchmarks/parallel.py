"""Random-weight models on several ranks of this machine's CPU, beside the same model on one: benchmarks/parallel.json.

    python benchmarks/parallel.py [--models dense,moe,mla] [--rounds 3] [--record benchmarks/parallel.json]

Each rank is a process with one thread. A split and one rank take turns in the same rounds, and ratios are of the same
round. Ranks of one CPU share its memory bandwidth and its cores with whatever else runs, so the figures show what a
split costs rather than what it gains. What ranks told each other is counted, and must be what the closed form says.
The floor of a token is its weights over the bandwidth of as many reading threads as there are ranks that work at once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import machine
from harness.checkpoint import config as hub_config
from harness.checkpoint import write_weights
from harness.shapes import SHAPES, Experts, Latent, Shape

from npu_zoo.core.parallel import Split

FOLDER = Path(__file__).parent
PREFILL_TOKENS = 512
DECODED = {1: 25, 8: 13}
"""Tokens of each sequence by the number of sequences; the first of them ends the prompts' steps."""
PROMPT = 16
LAYER_OPERATIONS = ("tp:all_reduce", "dp:", "ep:")

_SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
_SMALL |= {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 16032, "num_tokens": 16000}
MODELS = {
    "dense": replace(
        SHAPES["1.3b"], name="parallel-dense", model="deepseek_coder:custom", hidden_size=1024, intermediate_size=2816,
        num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=8,
    ),
    "moe": Shape("parallel-moe", "deepseek_moe:custom", **_SMALL, experts=Experts(16, 2, 4, 256)),
    "mla": Shape(
        "parallel-mla", "deepseek_v3:custom", **_SMALL, experts=Experts(16, 1, 4, 256, (4, 2)),
        latent=Latent(256, 64, 64, 64, 256),
    ),
}  # fmt: skip
DENSE_SPLITS = [(Split(2), "auto"), (Split(4), "auto"), (Split(pp=2), "auto")]
EXPERT_SPLITS = [
    (Split(2), "auto"), (Split(pp=2), "auto"), (Split(2, ep=2), "all_gather"), (Split(4, ep=4), "all_gather"),
    (Split(4, ep=4), "all_to_all"), (Split(dp=2, ep=2), "all_gather"), (Split(dp=2, ep=2), "all_to_all"),
]  # fmt: skip
SPLITS = {"dense": DENSE_SPLITS, "moe": EXPERT_SPLITS, "mla": EXPERT_SPLITS}


def say(text: str) -> None:
    """Progress, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def checkpoint(shape: Shape) -> Path:
    """The shape's checkpoint, written unless it is there."""
    target = FOLDER / "build" / shape.name
    if not (target / "config.json").exists():
        say(f"writing {shape.parameters / 1e6:.0f} M random weights to {target.relative_to(FOLDER)}")
        target.mkdir(parents=True, exist_ok=True)
        write_weights(target / "model.safetensors", shape)
        (target / "config.json").write_text(json.dumps(hub_config(shape)))
    return target


def anonymous_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process that is no mapped file."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@dataclass(frozen=True)
class Sample:
    """Tokens per second of one round."""

    prefill: float
    decode: dict[int, float]


class System:
    """A model that is loaded on the ranks of a split, and what its steps were."""

    def __init__(self, shape: Shape, weights: Path, split: Split, dispatch: str = "auto") -> None:
        from npu_zoo import LLM

        self.llm = LLM(
            shape.model, str(weights), hardware="cpu", dtype=shape.dtype, threads=1, max_model_len=1024,
            kv_cache_memory=2**28, skip_tokenizer_init=True, allow_experimental=True, expert_dispatch=dispatch,
            tensor_parallel_size=split.tp, pipeline_parallel_size=split.pp, expert_parallel_size=split.ep,
            data_parallel_size=split.dp,
        )  # fmt: skip
        self.split, self.config, self.num_tokens = split, self.llm.engine.config, shape.num_tokens
        workers = self.runner._workers.pids.values() if split.world_size > 1 else ()
        self.resident = [anonymous_bytes(pid) for pid in workers] or [anonymous_bytes()]
        self.steps: list[Any] = []
        self.generate(1, 4)

    @property
    def runner(self) -> Any:
        """Of the first rank."""
        return self.llm.engine.runner  # type: ignore[attr-defined]

    def generate(self, batch: int, new: int, prompt: int = PROMPT) -> tuple[float, float]:
        """Seconds until every sequence had its first token, and from there to the end."""
        from npu_zoo import SamplingParams

        prompts = [[random.randrange(self.num_tokens) for _ in range(prompt)] for _ in range(batch)]
        begun: dict[str, float] = {}
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        start = time.monotonic()
        self.llm.generate(prompts, params, on_output=lambda o: begun.setdefault(o.request_id, time.monotonic()))  # type: ignore[arg-type,return-value]
        first = max(begun.values())
        return first - start, time.monotonic() - first

    def sample(self) -> Sample:
        """One round."""
        prefill, _ = self.generate(1, 1, PREFILL_TOKENS)
        decode = {batch: batch * (new - 1) / self.generate(batch, new)[1] for batch, new in DECODED.items()}
        return Sample(PREFILL_TOKENS / prefill, decode)

    @contextmanager
    def recording(self) -> Iterator[list[Any]]:
        """The rows of each step inside."""
        steps: list[Any] = []
        execute = self.runner.execute
        self.runner.execute = lambda rows: steps.append(list(rows)) or execute(rows)
        yield steps
        self.runner.execute = execute

    def traffic(self) -> dict[str, float]:
        """Bytes by operation over all ranks, which depend on no routing: what one rank's experts lack others get."""
        total: Counter[str] = Counter()
        for report in self.runner.report():
            total.update(report.get("bytes", {}))
        return dict(total)


def communication(system: System) -> dict[str, float]:
    """Bytes that ranks gave, or received, per token: counted, and by the closed form.

    Raises:
        SystemExit: the two differ.
    """
    from npu_zoo.communication import bytes_of
    from npu_zoo.testing.traffic import due_operations

    before = system.traffic()
    with system.recording() as steps:
        system.generate(8, 5)
    measured = {name: size - before.get(name, 0) for name, size in system.traffic().items()}
    ranks = range(system.split.world_size)
    due = bytes_of(operation for rank in ranks for operation in due_operations(system.config, rank, steps))
    if measured != due:
        sys.exit(f"{system.split.describe()}: ranks counted {measured}, and the closed form says {due}")
    tokens = sum(row.num_tokens for rows in steps for row in rows)
    layers = system.config.model_config.num_hidden_layers

    def per_token(sizes: dict[str, float], inside: bool) -> float:
        chosen = [size for name, size in sizes.items() if name.startswith(LAYER_OPERATIONS) == inside]
        per_rank = sum(chosen) / tokens / system.split.stage_size
        return round(per_rank / layers if inside else per_rank, 1)

    return {
        "per_token_and_layer": per_token(measured, True),
        "per_token_and_layer_due": per_token(due, True),
        "beside_layers_per_token": per_token(measured, False),
        "beside_layers_per_token_due": per_token(due, False),
    }


def overlapping(system: System, prompts: int = 4) -> float:
    """The share of prompts of which two stages of a pipeline computed at the same time, by their clocks."""
    found = 0
    for _ in range(prompts):
        system.generate(1, 1, PREFILL_TOKENS)
        first, second = (report["spans"][-2:] for report in system.runner.report())
        found += second[0][0] < first[1][1] and first[1][0] < second[0][1]
    return found / prompts


def compare(one: System, several: System, rounds: int) -> list[tuple[Sample, Sample]]:
    """Samples of both in turns; who begins changes with the round."""
    found = []
    for number in range(rounds):
        order = (one, several) if number % 2 == 0 else (several, one)
        taken = {id(system): system.sample() for system in order}
        found.append((taken[id(one)], taken[id(several)]))
    return found


def figures(samples: list[Sample]) -> dict[str, float]:
    """Medians of tokens per second."""
    named = {"prefill": [s.prefill for s in samples]}
    named |= {f"decode_{batch}": [s.decode[batch] for s in samples] for batch in DECODED}
    return {name: round(statistics.median(values), 2) for name, values in named.items()}


def ratios(pairs: list[tuple[Sample, Sample]]) -> dict[str, float]:
    """Medians of the ratios to one rank of the same round."""
    relative = [
        Sample(b.prefill / a.prefill, {n: b.decode[n] / a.decode[n] for n in DECODED}) for a, b in pairs
    ]  # fmt: skip
    return {f"{name}_to_one": value for name, value in figures(relative).items()}


def held(system: System, base: int) -> dict[str, int]:
    """Weights of the rank that has most, and what processes take beyond one that has hardly any weights."""
    most = max(report["parameter_bytes"] for report in system.runner.report())
    return {"weight_bytes": most, "resident_bytes": max(system.resident) - base}


def resident_alone(kind: str) -> int:
    """What a new process takes that runs a model on one rank; this one has had others before."""
    command = [sys.executable, __file__, "--resident", kind]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def read_by_a_token(shape: Shape, split: Split) -> dict[str, int]:
    """Bytes of weights that a token of one sequence takes, and how many ranks read at once: stages take turns."""
    read = (shape.read_parameters(1) + shape.head_parameters) * shape.itemsize
    return {"world_size": split.world_size, "bytes_read": read, "reading_at_once": split.world_size // split.pp}


def run_model(kind: str, rounds: int, base: int) -> dict[str, Any]:
    """All splits of one model."""
    shape = MODELS[kind]
    weights = checkpoint(shape)
    one = System(shape, weights, Split())
    rows, alone = [], []
    for split, dispatch in SPLITS[kind]:
        say(f"{kind}: {split.describe()}, {dispatch}")
        several = System(shape, weights, split, dispatch)
        try:
            pairs = compare(one, several, rounds)
            alone += [pair[0] for pair in pairs]
            row: dict[str, Any] = {"split": split.describe(), **read_by_a_token(shape, split)}
            row |= {"expert_dispatch": several.config.expert_dispatch if split.ep > 1 else ""}
            row |= figures([pair[1] for pair in pairs]) | ratios(pairs) | held(several, base) | communication(several)
            rows.append(row | ({"stages_overlap": overlapping(several)} if split.pp == 2 else {}))
        finally:
            several.llm.shutdown()
        say(f"  {rows[-1]}")
    first = {"split": "1", **read_by_a_token(shape, Split()), "expert_dispatch": ""}
    first |= figures(alone) | held(one, base) | {"resident_bytes": resident_alone(kind) - base}
    one.llm.shutdown()
    sizes = {"parameters": shape.parameters, "layers": shape.num_hidden_layers, "hidden_size": shape.hidden_size}
    return {"kind": kind, "family": shape.model.partition(":")[0], **sizes, "rows": [first, *rows]}


def measure_bandwidth(best: dict[str, float]) -> None:
    """Bytes per second that 1, 2 and 4 threads read together; the best that was seen stays."""
    import torch

    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        best[str(threads)] = max(best.get(str(threads), 0), round(machine.measure(4)["bandwidth"]))
    torch.set_num_threads(1)


def main() -> int:
    """Measure all models and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--resident", choices=MODELS, help="only print the bytes that one rank of a model takes")
    arguments = parser.parse_args()
    if arguments.resident:
        shape = MODELS[arguments.resident]
        print(System(shape, checkpoint(shape), Split()).resident[0])
        return 0
    random.seed(0)
    begin, load = time.monotonic(), os.getloadavg()[0]
    bandwidth: dict[str, float] = {}
    measure_bandwidth(bandwidth)
    tiny = SHAPES["tiny"]
    small = System(tiny, checkpoint(tiny), Split(2))
    base = max(small.resident)
    small.llm.shutdown()
    models = []
    for kind in arguments.models.split(","):
        models.append(run_model(kind, arguments.rounds, base))
        measure_bandwidth(bandwidth)
        say(f"reading: {', '.join(f'{n} threads {rate / 1e9:.1f} GB/s' for n, rate in bandwidth.items())}")
    described = {"rounds": arguments.rounds, "seconds": round(time.monotonic() - begin), "load": round(load, 1)}
    record = {**described, "machine": machine.describe(1), "bandwidth": bandwidth, "models": models}
    if arguments.record:
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    say(f"done in {described['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
