"""What ``bench offline`` shows: progress on stderr, tables on standard output."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING

from npu_zoo.cli.output import print_fields, print_items, print_table
from npu_zoo.cli.progress import SECONDS_BETWEEN_BARS, SECONDS_BETWEEN_LINES, DraftCount, progress_bar
from npu_zoo.evaluation.offline.cases import WARM_UP_TOKENS, Case

if TYPE_CHECKING:
    from npu_zoo.evaluation.floor import Floor
    from npu_zoo.evaluation.offline.results import CaseResult, NotRun, OfflineBody, Search
    from npu_zoo.evaluation.record import Machine

PROMPT_TOKENS_PER_STEP = 32
"""So many prompt tokens count as one step of decoding; only how much time is left depends on it."""

SIMULATED = "none: the device is simulated, and its times say nothing"


class BenchProgress(AbstractContextManager["BenchProgress"]):
    """Shows how far a benchmark is and the time left: a bar on a terminal, a line now and then elsewhere.

    Args:
        cases: all that will be run, or searched.
        rounds: of each.
        under_ms: what is searched for; unset, cases are run as they are. A search's end is unknown, so that the time
            left is that of the batch which is being tried.
        interrupted: asked after every step; once true, KeyboardInterrupt is raised.
    """

    def __init__(
        self, cases: Sequence[Case], rounds: int, under_ms: float | None, interrupted: Callable[[], bool]
    ) -> None:
        self._cases, self._rounds, self._under_ms, self._interrupted = cases, rounds, under_ms, interrupted
        self._total = sum(self._units(case) for case in cases)
        self._done, self._tokens, self._label = 0.0, 0, ""
        self._batch = self._input = 1
        self._start = self._last_shown = time.monotonic()
        self._bar = progress_bar("", 1) if sys.stderr.isatty() else None

    def __enter__(self) -> BenchProgress:
        self._start = self._last_shown = time.monotonic()
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def begin(self, case: Case, number: int, output: int) -> None:
        """See :class:`npu_zoo.evaluation.offline.benchmark.Listener`."""
        if self._under_ms is not None and number == 0:
            self._total, self._done, self._tokens, self._start = self._units(case), 0.0, 0, time.monotonic()
        which = f"round {number} of {self._rounds}" if number else "warm-up"
        self._label, self._batch, self._input = f"{case.name}, {which}", case.batch, case.input

    def step(self, first_tokens: int, tokens: int) -> None:
        """See :class:`npu_zoo.evaluation.offline.benchmark.Listener`."""
        self._tokens += tokens
        self._done += first_tokens * self._input / PROMPT_TOKENS_PER_STEP + tokens / self._batch
        self._show()
        if self._interrupted():
            raise KeyboardInterrupt

    def finished(self, result: CaseResult) -> None:
        """See :class:`npu_zoo.evaluation.offline.benchmark.Listener`."""
        self._say(f"{result.case.name}: {_times(result)}{self._verdict(result)}")

    def refused(self, case: NotRun) -> None:
        """See :class:`npu_zoo.evaluation.offline.benchmark.Listener`."""
        if self._under_ms is None:
            self._total -= self._units(case.case)
        self._say(f"not run: {_refusal(case)}")

    def _units(self, case: Case) -> float:
        """The work of a case with its warm-up, in steps of decoding."""
        prompts = (1 + self._rounds) * case.input * case.batch / PROMPT_TOKENS_PER_STEP
        return prompts + self._rounds * case.output + min(case.output, WARM_UP_TOKENS)

    def _verdict(self, result: CaseResult) -> str:
        if self._under_ms is None or result.non_first_token_s is None:
            return ""
        if not result.together:
            return " (not all at once: the output is too short)"
        under = result.non_first_token_s * 1000 < self._under_ms
        return f" ({'under' if under else 'not under'} {self._under_ms:g} ms)"

    def _say(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._last_shown < (SECONDS_BETWEEN_BARS if self._bar else SECONDS_BETWEEN_LINES):
            return
        self._last_shown = now
        seconds = max(now - self._start, 1e-9)
        rate = f"{self._tokens / seconds:.1f} tokens/s"
        if self._bar:
            task = self._bar.task_ids[0]
            total = max(1, round(self._total))
            self._bar.update(task, description=self._label, completed=round(self._done), total=total, speed=rate)
            return
        left = f", {seconds / self._done * max(0.0, self._total - self._done):.0f} s left" if self._done else ""
        print(f"{self._label}: {rate}{left}", file=sys.stderr, flush=True)


def print_report(body: OfflineBody, machine: Machine | None, *, simulated: bool) -> None:
    """Write the figures, the searches, how near floors they came, and what did not run."""
    if body.searches:
        print_table(("in", "out", "under", "largest batch", "limited by"), map(_search_row, body.searches))
        print()
    if body.cases:
        print_table(_FIGURES, map(_figure_row, body.cases))
        print()
        shown = body.on(machine) if machine else body
        print_table(_FLOORS, (row for result in shown.cases for row in _floor_rows(result)))
        print()
        print_fields(_meanings(machine, simulated=simulated))
    apart = [f"{result.case.name}: {_APART}" for result in body.cases if result.output > 1 and not result.together]
    if apart:
        print_items("not of all sequences at once", apart)
    guessed = [f"{result.case.name}: {text}" for result in body.cases if (text := _drafts(result))]
    if guessed:
        print_items("speculative decoding", guessed)
    if body.not_run:
        print_items("did not run", map(_refusal, body.not_run))


def _drafts(result: CaseResult) -> str:
    count = DraftCount()
    for sample in result.samples:
        count.add(sample)
    return count.text("")


_APART = (
    "first outputs ended before the last prompt was computed; give a larger --max-num-batched-tokens, or more output "
    "tokens"
)
_FIGURES = ("batch", "in", "out", "total s", "prefill ms", "token ms", "token/s", "E2E token/s")
_FLOORS = ("case", "phase", "GiB", "GFLOP", "of bandwidth", "of peak", "limit")


def _meanings(machine: Machine | None, *, simulated: bool) -> dict[str, str]:
    """What columns mean, and what shares are of."""
    meanings = {
        "prefill": "until every sequence has its first token",
        "token": "non-first tokens: a step in which every sequence gets one",
        "GiB, GFLOP": "what the model needs for it at least",
    }
    if simulated:
        return {**meanings, "shares": SIMULATED}
    if machine is None or machine.bandwidth is None or machine.peak is None:
        return {**meanings, "shares": "the machine was not measured"}
    threads = f" with {machine.threads} thread(s)" if machine.threads else ""
    measured = f"{machine.bandwidth / 1e9:,.1f} GB/s read and {machine.peak / 1e9:,.0f} GFLOP/s"
    return {**meanings, "shares": f"of {measured}, measured in this run{threads}"}


def _figure_row(result: CaseResult) -> tuple[str, ...]:
    token = result.non_first_token_s
    return (
        *map(str, (result.batch, result.input, result.output)),
        f"{result.total_s:.3f}",
        f"{result.prefill_s * 1000:,.1f}",
        "-" if token is None else f"{token * 1000:,.2f}",
        "-" if token is None else f"{result.non_first_token_throughput:,.1f}",
        f"{result.e2e_throughput:,.1f}",
    )


def _floor_rows(result: CaseResult) -> Iterator[tuple[str, ...]]:
    yield (result.case.name, "prefill", *_floor(result.prefill))
    if result.decode is not None:
        yield ("", "decode", *_floor(result.decode))


def _floor(floor: Floor) -> tuple[str, ...]:
    shares = (_share(floor.bandwidth_share), _share(floor.peak_share))
    return (f"{floor.bytes / 2**30:,.2f}", f"{floor.operations / 1e9:,.1f}", *shares, floor.limit or "-")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _search_row(search: Search) -> tuple[str, ...]:
    largest = str(search.largest_batch) if search.largest_batch else "none"
    return (str(search.input), str(search.output), f"{search.under_ms:g} ms", largest, _LIMITS[search.limited_by])


_LIMITS = {
    "latency": "the latency",
    "output": "the output: too short for more at once",
    "memory": "room: more sequences do not fit at once",
    "batch_limit": "--batch-limit: larger ones were not tried",
    "interrupted": "interrupted: larger ones may hold, too",
}


def _times(result: CaseResult) -> str:
    token = result.non_first_token_s
    later = f"{token * 1000:,.2f} ms a token, " if token is not None else ""
    return f"prefill {result.prefill_s * 1000:,.1f} ms, {later}{result.e2e_throughput:,.1f} tokens/s end to end"


def _refusal(case: NotRun) -> str:
    return f"{case.case.name}: {case.reason}"
