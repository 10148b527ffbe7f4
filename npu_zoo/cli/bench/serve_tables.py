"""What was measured of a server, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from npu_zoo.cli.output import table_width
from npu_zoo.cli.results import printable

if TYPE_CHECKING:
    from rich.table import Table

    from npu_zoo.evaluation.floor import Floor
    from npu_zoo.evaluation.record import Machine
    from npu_zoo.evaluation.serving.figures import Distribution, LevelFigures
    from npu_zoo.evaluation.serving.result import MeasuredLevel, ServeResult

_TIMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "end to end", "lateness": "sent late"}
_NONE = "-"


def print_result(result: ServeResult, machine: Machine | None = None) -> None:
    """Write the levels, their times, what failed, and floors where the server's machine was measured."""
    from rich.console import Console

    console = Console(width=table_width(), highlight=False)
    console.print(printable(server_text(result)))
    levels = result.levels
    console.print(_load_table(levels))
    if any(_times_of(level.figures) for level in levels):
        console.print(_time_table(levels))
    if machine is not None and any(level.floor for level in levels):
        console.print(_floor_table(levels))
        console.print(_machine_text(machine))
    if failures := _failure_rows(levels):
        console.print(_table("what failed", (_load_kind(levels), "kind", "requests", "message"), failures, numbers={2}))


def server_text(result: ServeResult) -> str:
    """Who was measured, in a line."""
    server = result.server
    by = " ".join(part for part in (server.owned_by, server.version) if part)
    return f"{server.model} at {server.url}" + (f" ({by})" if by else "")


def _load_table(levels: Sequence[MeasuredLevel]) -> Table:
    columns = [_load_kind(levels), "done", "failed", "s", "req/s", "out tok/s", "all tok/s", "peak"]
    cancelled, goal = _any_cancelled(levels), any(level.figures.goodput for level in levels)
    columns += [*(["cancelled"] if cancelled else []), *(["goodput/s"] if goal else [])]
    rows = []
    for level in levels:
        further = [*([str(level.figures.cancelled)] if cancelled else []), *([_goodput(level.figures)] if goal else [])]
        rows.append([*_load_row(level), *further])
    return _table("", columns, rows, numbers=range(1, len(columns)))


def _load_kind(levels: Sequence[MeasuredLevel]) -> str:
    return "rate" if all(level.loop == "open" for level in levels) else "clients"


def _label(level: MeasuredLevel) -> str:
    return level.name.split()[-1]


def _any_cancelled(levels: Sequence[MeasuredLevel]) -> bool:
    return any(level.figures.cancelled for level in levels)


def _load_row(level: MeasuredLevel) -> list[str]:
    figures = level.figures
    return [
        _label(level),
        str(figures.completed),
        str(figures.failed),
        f"{figures.seconds:.1f}",
        _number(figures.request_throughput),
        _number(figures.output_throughput),
        _number(figures.total_throughput),
        str(figures.peak_concurrency),
    ]


def _goodput(figures: LevelFigures) -> str:
    found = figures.goodput
    return f"{_number(found.requests_per_s)} {found.share:.0%}" if found else _NONE


def _time_table(levels: Sequence[MeasuredLevel]) -> Table:
    rows = [
        [_label(level) if first else "", _TIMES[name], *_points(times)]
        for level in levels
        for first, (name, times) in _marked_first(_times_of(level.figures))
    ]
    return _table("", (_load_kind(levels), "milliseconds", "mean", "p50", "p90", "p99"), rows, numbers=range(2, 6))


def _times_of(figures: LevelFigures) -> list[tuple[str, Distribution]]:
    return [(name, times) for name in _TIMES if (times := getattr(figures, name)) is not None]


def _marked_first(
    items: Iterable[tuple[str, Distribution]],
) -> Iterable[tuple[bool, tuple[str, Distribution]]]:
    return ((number == 0, item) for number, item in enumerate(items))


def _points(times: Distribution) -> list[str]:
    return [_number(value) for value in (times.mean, times.p50, times.p90, times.p99)]


def _floor_table(levels: Sequence[MeasuredLevel]) -> Table:
    """What each level needed at least, and its share of what the machine does."""
    columns = (_load_kind(levels), "GiB", "GFLOP", "of bandwidth", "of peak", "limit")
    rows = [[_label(level), *_floor_row(level.floor)] for level in levels if level.floor]
    return _table("", columns, rows, numbers=range(1, 5))


def _floor_row(floor: Floor) -> list[str]:
    needed = [f"{floor.bytes / 2**30:,.2f}", f"{floor.operations / 1e9:,.1f}"]
    shares = [_NONE if share is None else f"{share:.1%}" for share in (floor.bandwidth_share, floor.peak_share)]
    return [*needed, *shares, floor.limit or _NONE]


def _machine_text(machine: Machine) -> str:
    bandwidth, peak = machine.bandwidth or 0.0, machine.peak or 0.0
    threads = f" ({machine.threads} threads)" if machine.threads else ""
    return f"shares of {bandwidth / 1e9:.1f} GB/s read and {peak / 1e9:,.0f} GFLOP/s, measured beforehand{threads}"


def _failure_rows(levels: Sequence[MeasuredLevel]) -> list[list[str]]:
    return [
        [_label(level), one.kind, str(one.count), printable(one.message)]
        for level in levels
        for one in level.figures.failures
    ]


def _number(value: float | None) -> str:
    """Three digits at least, so that slow and fast servers are told apart alike."""
    if value is None:
        return _NONE
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    right = set(numbers)
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place in right else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
