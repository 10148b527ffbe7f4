"""The page of what speculative decoding gave, from its record."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

INTRODUCTION = """\
# Speculative decoding, measured

`benchmarks/speculative.py` writes {tokens} tokens greedily with the bundled checkpoints in float32 on one core of a CPU
({cpu}), with torch {torch}.{others}
Every way and plain decoding take turns in one process, and their outputs are the same token by token. Rates are
medians of {rounds} rounds, and `to none` is the median of the ratios in the same round.

The checkpoints are small: a step is some milliseconds, much of it spent outside of the model. What a large one gains
depends on how much longer a step of several tokens takes it than one of a single token. Of 8 sequences those that are
guessed better end sooner, and the others go on in a smaller batch: plain decoding has all 8 to the end.

- **repeats itself**: the prompt has one function four times. **ordinary**: the beginning of a file, nothing of which
  the output has to repeat.
- **accepted**: drafts that were right, of all. **tokens a step**: that a step with drafts gives a sequence.
- **3 drafts**, **8 drafts** are of prompt lookup. **mtp 1** to **mtp 3** are of the checkpoint's own layer, each draft
  of which costs a third of that demo's three layers; beside 61 layers it would cost a sixtieth.
- **adaptive** stops drafting where it finds that it does not pay; the others draft in every step that they can.

"""
COLUMNS = ("text", "batch", "drafts", "token/s", "to none", "accepted", "tokens a step")


def speculative_page() -> str:
    """docs/speculative-measured.md: from benchmarks/speculative.json."""
    record = json.loads((BENCHMARKS / "speculative.json").read_text())
    machine = record["machine"]
    others = f" Other work ran beside it: the load was {record['load']:.1f} before the start."
    introduction = INTRODUCTION.format(
        tokens=record["tokens"],
        cpu=machine["cpu"],
        torch=machine["versions"]["torch"],
        others=others if record["load"] >= 1 else "",
        rounds=record["rounds"],
    )
    return introduction + "\n".join(_family(family) for family in record["families"])


def _family(family: dict[str, Any]) -> str:
    rows = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in family["rows"]:
        accepted = length = ""
        if row["drafts"]:
            accepted = f"{row['accepted_tokens'] / row['draft_tokens']:.0%} of {row['draft_tokens']}"
            length = f"{1 + row['accepted_tokens'] / row['drafts']:.2f}"
        rate, ratio = median(row["tokens_per_s"]), "" if row["way"] == "none" else f"{row['ratio']:.2f}"
        cells = [row["text"], str(row["batch"]), row["way"], f"{rate:,.0f}", ratio, accepted, length]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"## `{family['family']}`", "", *rows, ""])
