"""docs/host-overhead.md: what a step costs beside the model, from benchmarks/host.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

_INTRODUCTION = """\
# What a step costs beside the model

`benchmarks/host.py` runs decode steps of the real engine whose model's layers give what was computed beforehand, so
that what is left is the host's own work: on one thread of {cores} cores ({cpu}), Python {python}, torch
{torch}. Figures are microseconds, medians over {steps} steps{others}.
The vocabulary has {vocabulary:,} tokens, and logits are bfloat16.

- **schedule**: which sequences compute what. **rows**: the step as plain data. **attention**: where keys and values
  go and are read, for the backend `{backend}`. **tensors**: the rest of the runner. **sample**: the next tokens.
  **rest**: stop checks, text, reports.
- Those that **wait** find no room: what runs holds all of the cache, and the first that waits begins as one that runs
  does, so that it would share its blocks if there were room for the rest.

Nothing of a step grows with the number of requests that wait, nor with the length of what runs, but the attention's
metadata, which holds the numbers of all blocks that are read (a table per sequence is kept, and copied as a whole).
`tests/engine/test_host_work.py` counts what is done in a step.

"""
_PARTS = ("schedule", "rows", "attention", "tensors", "sample", "rest")


def host_page() -> str:
    """The page."""
    record = json.loads((BENCHMARKS / "host.json").read_text())
    machine = record["machine"]
    introduction = _INTRODUCTION.format(
        cores=machine["cores"],
        cpu=machine["cpu"],
        python=machine["python"],
        torch=machine["versions"]["torch"],
        steps=record["steps"],
        others=f"; other work ran beside it, the load was {record['load']:.1f}" if record["load"] >= 1 else "",
        vocabulary=record["vocabulary"],
        backend=record["backend"],
    )
    greedy = [row for row in record["rows"] if row["sampling"] == "greedy"]
    sizes = ("running", "waiting", "context")
    table = _table(sizes, greedy, lambda row: [f"{row[size]:,}" for size in sizes])
    others = [row for row in record["rows"] if row["sampling"] != "greedy"]
    ways = ("sampling", "running")
    sampled = _table(ways, others, lambda row: [row["sampling"], f"{row['running']:,}"])
    return (
        introduction
        + "## Greedy steps\n\n"
        + "\n".join(table)
        + f"\n\n## Other ways of sampling\n\nWith {others[0]['context']} tokens of context and nobody waiting:\n\n"
        + "\n".join(sampled)
        + "\n"
    )


def _table(columns: tuple[str, ...], rows: list[dict[str, Any]], lead: Any) -> list[str]:
    names = [*columns, *_PARTS, "step"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        figures = [row["microseconds"][part] for part in _PARTS]
        cells = [*lead(row), *(f"{figure:,.0f}" for figure in [*figures, sum(figures)])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
