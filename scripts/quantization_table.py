"""Quantize every demo checkpoint by every scheme, and measure size, perplexity and speed: benchmarks/quantization.json.

    python scripts/quantization_table.py        # some minutes; then `make docs` writes docs/quantization.md

Perplexity is over the modules of Python's standard library that the demos were not trained on (``heldout_files`` of
their cards), in stretches of a few hundred tokens. Speed is that of one sequence on this machine's CPU, in turns with
the plain checkpoint, as the median of some rounds; models of this size say little about large ones.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from npu_zoo import LLM, SamplingParams
from npu_zoo.registry import get_registry
from npu_zoo.request import bundled_directory
from npu_zoo.weights.convert import convert
from npu_zoo.weights.plan import ConvertOptions, plan_conversion
from npu_zoo.weights.quantize import Scheme

RECORD = Path(__file__).parent.parent / "benchmarks" / "quantization.json"
SCHEMES = {
    "w8a16": ("w8a16", None),
    "w8a8": ("w8a8", None),
    "w4a16": ("w4a16", None),
    "w4a16, groups of 16": ("w4a16", 16),
}
STRETCH = 512
TOKENS = 20_000
ROUNDS = 5
SCORED = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
SPED = SamplingParams(max_tokens=128, temperature=0, ignore_eos=True)


def held_out(llm: LLM, card: dict[str, Any]) -> list[list[int]]:
    """Stretches of the held-out modules as token ids."""
    library = Path(sysconfig.get_path("stdlib"))
    tokenizer = llm.engine.tokenizer  # type: ignore[attr-defined]
    ids: list[int] = []
    for name in card["heldout_files"]:
        ids += tokenizer.encode((library / name).read_text(encoding="utf-8"))
    ids = ids[:TOKENS]
    return [ids[start : start + STRETCH] for start in range(0, len(ids) - 1, STRETCH)]


def perplexity(llm: LLM, stretches: list[list[int]]) -> float:
    """Of all tokens but the first of each stretch."""
    scores = []
    for output in llm.generate(stretches, SCORED):
        scores += [next(iter(entry.values())).logprob for entry in output.prompt_logprobs or [] if entry]
    return math.exp(-sum(scores) / len(scores))


def tokens_per_second(llm: LLM) -> float:
    """Of one sequence, after the first token."""
    start = time.monotonic()
    (output,) = llm.generate([[5, 6, 7, 8]], SPED)
    return len(output.outputs[0].token_ids) / (time.monotonic() - start)


def size_of(folder: Path) -> int:
    """Bytes of the files that hold tensors."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(family: str, folder: Path) -> list[dict[str, Any]]:
    """A row for the plain checkpoint and for each scheme."""
    variant = get_registry().families[family].variant("demo")
    source = bundled_directory(variant) if variant else None
    assert source is not None
    card = json.loads((source / "card.json").read_text())
    places = {"bfloat16": source}
    for name, (scheme, group) in SCHEMES.items():
        target = folder / f"{family}-{name.replace(', ', '-').replace(' ', '-')}"
        convert(plan_conversion(source, ConvertOptions("hf-safetensors", scheme=Scheme.of(scheme, group))), target)
        places[name] = target
    shared = {"model": f"{family}:custom", "hardware": "cpu", "dtype": "bfloat16", "allow_experimental": True}
    engines = {name: LLM(weights=str(place), max_model_len=1024, **shared) for name, place in places.items()}
    stretches = held_out(engines["bfloat16"], card)
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(ROUNDS):
        for name, llm in engines.items():
            speeds[name].append(tokens_per_second(llm))
    return [
        {
            "family": family,
            "scheme": name,
            "bytes": size_of(places[name]),
            "perplexity": round(perplexity(llm, stretches), 3),
            "tokens_per_s": round(statistics.median(speeds[name]), 1),
            "speed_to_plain": round(
                statistics.median(a / b for a, b in zip(speeds[name], speeds["bfloat16"], strict=True)), 2
            ),
        }
        for name, llm in engines.items()
    ]


def main() -> int:
    """Measure all families and write the record."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for family in get_registry().families:
            rows += measure(family, Path(name))
            print(*rows[-1 - len(SCHEMES) :], sep="\n", file=sys.stderr, flush=True)
    machine = {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()}
    record = {"tokens": TOKENS, "stretch": STRETCH, "machine": machine, "torch": torch.__version__, "rows": rows}
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
