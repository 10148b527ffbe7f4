"""docs/reliability.md: a server under load, from benchmarks/soak.json and benchmarks/serve.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

_INTRODUCTION = """\
# A server under load

What is said here was measured with the scripts of benchmarks/ on a CPU; `make test` runs the first for two minutes
and `make verify` for thirty, and both fail where anything is lost, answered wrongly or kept.

## Under mixed load

`benchmarks/soak.py` starts a server of the demo checkpoint and {clients} clients that send completions and chats of
random lengths, whole and streamed, greedy and seeded, some of a given form, with priorities; beside them requests
that are called off amid their stream, connections that vanish, bodies that are cut, and wrong requests. Every
greedy and seeded answer is compared with what the same request gave alone. Sums are rounded otherwise in another
batch, so greedy requests are those whose answer leads by more than 0.001 in log-probability everywhere, and of a
thousand seeded answers one may differ, where a draw falls on the border between two tokens. At the end nothing may
run, wait or hold a block, the server must have counted as many ends as requests, no engine may have been restarted,
and no process may have grown by more than {growth:.0f} MiB after the first third of the time.

| | |
|---|---|
| time | {minutes:.1f} minutes, {date} |
| requests | {total:,} ({rate:.0f} a second) |
| {kinds} | {counts} |
| tokens of answers that were read | {tokens:,} |
| seeded answers, and those that a rounded draw made another | {seeded:,}, {otherwise} |
| turned away (429) and sent again | {retries:,} |
| sequences that lost their room and were recomputed | {preemptions:.0f} |
| memory of the engine, MiB | {engine[0]:.0f} after the first third, {engine[1]:.0f} at the end |
| memory of the front end, MiB | {front_end[0]:.0f} after the first third, {front_end[1]:.0f} at the end |
| lost, wrong or kept | {faults} |

Tests beside it kill the engine, the front end and the supervisor amid load with SIGKILL (tests/server): requests
that run get an error and none hangs, the engine is started again, the front end's clients wait for the next one,
and nothing is left where the supervisor was killed.

"""

_LOAD = """\
## Rising load

`benchmarks/serve.py`: {shape}-shaped random weights in {dtype}, prompts of {prompt} random tokens, {output} new
tokens each, streamed; {threads} threads of {cores} cores ({cpu}). Each client sends its next request when the last
one is answered. Times are the clients': to the first token (TTFT) and of each token after it (TPOT), in
milliseconds. The floor is what the decode steps must read and the prompts must compute at the machine's own rates
in this run ({bandwidth:.0f} GB/s and {peak:.0f} Gflop/s): tokens a second that no server of these weights could
exceed here.

| clients | requests | requests/s | tokens/s | floor | share | TTFT p50 | p99 | TPOT p50 | p99 |
|---|---|---|---|---|---|---|---|---|---|
"""


def reliability_page() -> str:
    """The page, without the line that says where it comes from."""
    soak, load = (json.loads((BENCHMARKS / name).read_text()) for name in ("soak.json", "serve.json"))
    return _of_soak(soak) + _of_load(load)


def _of_soak(record: dict[str, Any]) -> str:
    requests: dict[str, int] = record["requests"]
    memory = record["memory_mib"]
    return _INTRODUCTION.format(
        clients=record["clients"],
        growth=record["most_growth_mib"],
        minutes=record["minutes"],
        date=record["date"],
        total=sum(requests.values()),
        rate=record["requests_per_s"],
        kinds=", ".join(requests),
        counts=", ".join(f"{count:,}" for count in requests.values()),
        tokens=record["tokens_of_whole_answers"],
        seeded=record["seeded_answers"],
        otherwise=record["seeded_answers_otherwise"],
        retries=record["turned_away_and_sent_again"],
        preemptions=record["preemptions"],
        engine=memory["engine"],
        front_end=memory["front end"],
        faults="; ".join(record["faults"]) or "nothing",
    )


def _of_load(record: dict[str, Any]) -> str:
    machine = record["machine"]
    head = _LOAD.format(
        shape=record["shape"],
        dtype=record["dtype"],
        prompt=record["prompt_tokens"],
        output=record["output_tokens"],
        threads=machine["threads"],
        cores=machine["cores"],
        cpu=machine["cpu"],
        bandwidth=machine["bandwidth"] / 1e9,
        peak=machine["matrix_peak"] / 1e9,
    )
    return head + "".join(_row(level) for level in record["levels"])


def _row(level: dict[str, Any]) -> str:
    first, later = level["ttft_ms"], level["tpot_ms"]
    cells = [
        str(level["clients"]),
        str(level["requests"]),
        f"{level['requests_per_s']:.2f}",
        f"{level['output_tokens_per_s']:.1f}",
        f"{level['floor_tokens_per_s']:.1f}",
        f"{level['share_of_floor']:.2f}",
        *(f"{value:.0f}" for value in (first["p50"], first["p99"], later["p50"], later["p99"])),
    ]
    return f"| {' | '.join(cells)} |\n"
