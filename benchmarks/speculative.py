"""Speculative decoding beside plain decoding, on the bundled checkpoints: benchmarks/speculative.json.

    python benchmarks/speculative.py [--families deepseek_coder,…] [--rounds 5] [--record benchmarks/speculative.json]

Families that are not named stay in the record as they are. Engines with and without drafts are in one process and
take turns on the same prompts, and ratios are of the same round. Outputs have to be the same token by token, or the
benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from harness import machine

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.config import EngineArgs
from npu_zoo.dispatch import resolve

FAMILIES = ("deepseek_coder", "wizardcoder", "deepseek_moe", "deepseek_v3")
TOKENS = 128
BATCHES = (1, 8)
OPTIONS: dict[str, Any] = {"hardware": "cpu", "dtype": "float32", "max_model_len": 512, "kv_cache_memory": "256MiB"}
WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "3 drafts": {"speculative_method": "prompt_lookup", "adaptive_speculation": False},
    "8 drafts": {"speculative_method": "prompt_lookup", "num_speculative_tokens": 8, "adaptive_speculation": False},
    "3, adaptive": {"speculative_method": "prompt_lookup"},
}
MTP_WAYS: dict[str, dict[str, Any]] = {
    **{
        f"mtp {count}": {"speculative_method": "mtp", "num_speculative_tokens": count, "adaptive_speculation": False}
        for count in (1, 2, 3)
    },
    "mtp 2, adaptive": {"speculative_method": "mtp", "num_speculative_tokens": 2},
}
"""Of checkpoints that have a layer for it."""
NAMES = ("add", "mul", "join", "find", "count", "clamp", "merge", "split")


def _repeated(name: str) -> str:
    return f"def {name}(a, b):\n    return a + b\n\n\n" * 4


def _ordinary(name: str) -> str:
    return f"import os\n\n\ndef {name}(values, limit):\n"


TEXTS = {"repeats itself": _repeated, "ordinary": _ordinary}
"""Prompts that differ by a function's name."""


def run(llm: LLM, prompts: list[str], params: SamplingParams) -> tuple[float, list[list[int]], dict[str, int]]:
    """Tokens a second, the tokens, and what became of drafts."""
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    names = ("drafts", "draft_tokens", "accepted_tokens")
    counts = {name: sum(getattr(output.metrics, name) for output in outputs) for name in names}
    tokens = [output.outputs[0].token_ids for output in outputs]
    return sum(map(len, tokens)) / seconds, tokens, counts


def case(engines: dict[str, LLM], text: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """All ways with one kind of prompt, in turns."""
    prompts = [TEXTS[text](name) for name in NAMES[:batch]]
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    rates: dict[str, list[float]] = {way: [] for way in engines}
    counts: dict[str, dict[str, int]] = {}
    for number in range(rounds + 1):
        due: list[list[int]] | None = None
        for way, llm in engines.items():
            rate, tokens, counts[way] = run(llm, prompts, params)
            due = due or tokens
            if tokens != due:
                raise AssertionError(f"{way} gives other tokens than plain decoding for a prompt that is {text}")
            if number:  # the first round warms up
                rates[way].append(rate)
    plain = rates["none"]
    return [
        {
            "text": text,
            "batch": batch,
            "way": way,
            "tokens_per_s": [round(rate, 1) for rate in rates[way]],
            "ratio": round(median(own / other for own, other in zip(rates[way], plain, strict=True)), 3),
            **counts[way],
        }
        for way in engines
    ]


def run_family(family: str, rounds: int) -> dict[str, Any]:
    """All cases of one family's bundled checkpoint."""
    asked = resolve(EngineArgs(model=f"{family}:demo", hardware="cpu"))
    ways = WAYS | (MTP_WAYS if asked.model_config.num_mtp_layers else {})
    engines = {way: LLM(f"{family}:demo", **OPTIONS, **options) for way, options in ways.items()}
    rows = []
    try:
        for text in TEXTS:
            for batch in BATCHES:
                rows += case(engines, text, batch, rounds)
                for row in rows[-len(engines) :]:
                    print(family, {key: value for key, value in row.items() if key != "tokens_per_s"}, file=sys.stderr)
    finally:
        for llm in engines.values():
            llm.shutdown()
    return {"family": family, "rows": rows}


def merged(path: Path, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was measured, and in its place what a record has of other families."""
    found = {entry["family"]: entry for entry in json.loads(path.read_text())["families"]} if path.exists() else {}
    return list((found | {entry["family"]: entry for entry in measured}).values())


def main() -> int:
    """Measure all families and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    families = [run_family(family, arguments.rounds) for family in arguments.families.split(",")]
    described = machine.describe(1)
    record = {"rounds": arguments.rounds, "tokens": TOKENS, "load": load, "machine": described, "families": families}
    if arguments.record:
        record["families"] = merged(arguments.record, families)
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
