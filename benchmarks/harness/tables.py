"""The page's tables, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from harness.bounds import bound_of
from harness.records import Compared, Contexts
from harness.targets import Verdict, verdicts
from npu_zoo.evaluation.offline.results import CaseResult as ContextCase
from npu_zoo.evaluation.peers.engines import SUBJECT
from npu_zoo.evaluation.peers.result import CaseResult
from npu_zoo.evaluation.peers.table import figure_text, ratio_text, share_text

CASE_HEADS = ("case", "engine", "median", "of floor", "ratio (spread)", "pairs", "target", "bound by")
DAY_HEADS = ("", "case", "to", "first", "second", "change", "within the other's spread")
ONE_PAIR = "one pair"
CONTEXT_HEADS = ("tokens in the cache", "ms a step", "rounds", "floor, ms", "of floor", "grows by, us a 1,024 tokens")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned, so that it can be read as text too."""
    listed = [tuple(heads), *(tuple(row) for row in rows)]
    widths = [max(len(row[column]) for row in listed) for column in range(len(heads))]
    listed.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in listed
    )


def overview_table(compared: Sequence[Compared]) -> str:
    """The least median ratio to any peer, by case and shape; a group of weights has rows of its own."""
    shapes = list(dict.fromkeys(one.shape["name"] for one in compared))
    rows: dict[str, dict[str, str]] = {}
    for one in sorted(compared, key=lambda one: one.group):
        for case in one.body.cases:
            title = ", ".join(filter(None, (case.title, one.group)))
            rows.setdefault(title, {})[one.shape["name"]] = _closest(case, one)
    lines = ((title, *(cells.get(name, "") for name in shapes)) for title, cells in rows.items())
    return table(("case", *shapes), lines)


def _closest(case: CaseResult, compared: Compared) -> str:
    """The ratio to the peer that comes closest, and its name."""
    found = [(case.ratios(engine.name, SUBJECT), engine.name) for engine in compared.body.engines[1:]]
    medians = [(median(ratios), name) for ratios, name in found if ratios]
    return "{:.2f} of {}".format(*min(medians)) if medians else ""


def case_table(compared: Compared) -> str:
    """Every case, each engine, and the best that the machine allows."""
    judged = {(verdict.case.name, verdict.peer): verdict for verdict in verdicts(compared.record)}
    return table(CASE_HEADS, (row for case in compared.body.cases for row in _case_rows(compared, case, judged)))


def _case_rows(
    compared: Compared, case: CaseResult, judged: dict[tuple[str, str | None], Verdict]
) -> Iterator[tuple[str, ...]]:
    titles, bound = iter((case.title,)), bound_of(case, compared.machine)
    for engine in compared.body.engines:
        own, peer = engine.name == SUBJECT, None if engine.name == SUBJECT else engine.name
        found, ratios = case.median_of(engine.name), case.ratios(engine.name, SUBJECT)
        yield (
            next(titles, ""),
            engine.name,
            f"{figure_text(found)} {case.unit}" if found is not None else "failed",
            share_text(case.share(engine.name)),
            "" if own else ratio_text(ratios),
            str(sum(engine.name in sample for sample in case.rounds)) if own else str(len(ratios)),
            _target_text(judged.get((case.name, peer)), case, peer),
            bound.text if own and bound else "",
        )
    if case.floor is not None:
        yield "", "floor", f"{figure_text(case.floor)} {case.unit}", "", "", "", "", case.limit


def _target_text(verdict: Verdict | None, case: CaseResult, peer: str | None) -> str:
    if verdict is None:
        return ""
    limit = f"<= {figure_text(verdict.target)} {case.unit}" if peer is None else f">= {verdict.target:g}"
    return f"{limit}: {'met' if verdict.held else '**missed**'}"


@dataclass(frozen=True)
class DayPair:
    """A case of two records of one name on one machine.

    Attributes:
        first: npu-zoo's paired ratios to one engine on the earlier day.
        second: those of the later day.
    """

    name: str
    title: str
    engine: str
    first: Sequence[float]
    second: Sequence[float]

    @property
    def change(self) -> float:
        """Of the median, from day to day."""
        return median(self.second) / median(self.first) - 1

    @property
    def told(self) -> str:
        """Whether each day's median is in the other's spread; one pair alone has none."""
        if min(len(self.first), len(self.second)) < 2:
            return ONE_PAIR
        within = _within(self.first, self.second), _within(self.second, self.first)
        return "both" if all(within) else "one" if any(within) else "**neither**"


def day_pairs(first: Compared, second: Compared) -> Iterator[DayPair]:
    """Every case that both records have, with each engine."""
    later = {case.name: case for case in second.body.cases}
    for case in first.body.cases:
        for engine in first.body.engines[1:]:
            one = case.ratios(engine.name, SUBJECT)
            other = later[case.name].ratios(engine.name, SUBJECT) if case.name in later else []
            if one and other:
                yield DayPair(first.name, case.title, engine.name, one, other)


def day_table(pairs: Iterable[DayPair]) -> str:
    """Both days' ratios."""
    return table(DAY_HEADS, map(_day_row, pairs))


def _day_row(pair: DayPair) -> tuple[str, ...]:
    ratios = ratio_text(pair.first), ratio_text(pair.second)
    change = round(pair.change, 2) + 0.0  # a negative zero has a sign of its own
    return pair.name, pair.title, pair.engine, *ratios, f"{change:+.0%}", pair.told


def _within(values: Sequence[float], others: Sequence[float]) -> bool:
    return min(others) <= median(values) <= max(others)


def context_table(contexts: Contexts) -> str:
    """A cache's time a step against the tokens in it."""
    cases = sorted(contexts.body.cases, key=lambda case: case.input)
    return table(CONTEXT_HEADS, map(_context_row, [None, *cases], cases))


def _context_row(before: ContextCase | None, case: ContextCase) -> tuple[str, ...]:
    seconds, floor = case.non_first_token_s, step_floor(case)
    if seconds is None or floor is None:
        return f"{case.input:,}", "", str(len(case.samples)), "", "", ""
    growth = ""
    if before is not None and before.non_first_token_s is not None:
        growth = f"{1e6 * (seconds - before.non_first_token_s) / (case.input - before.input) * 1024:,.0f}"
    figures = f"{1e3 * seconds:.2f}", str(len(case.samples)), f"{1e3 * floor:.2f}", share_text(floor / seconds)
    return f"{case.input:,}", *figures, growth


def step_floor(case: ContextCase) -> float | None:
    """The least seconds of one decode step; None where the machine was not measured."""
    decode = case.decode
    return decode.seconds / (case.output - 1) if decode is not None and decode.seconds is not None else None
