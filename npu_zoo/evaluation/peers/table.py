"""A comparison as rows of a table, and as remarks below it."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from npu_zoo.evaluation.peers.result import CaseResult, ComparisonBody

HEADS = ("case", "engine", "median", "ratio (spread)", "of floor")
WORK_HEADS = ("case", "GiB", "GFLOP", "tokens")


def table_rows(body: ComparisonBody) -> list[tuple[str, ...]]:
    """Rows under :data:`HEADS`: of each case a row for each engine, and one for the best that the machine allows."""
    return [row for case in body.cases for row in _case_rows(case, body)]


def _case_rows(case: CaseResult, body: ComparisonBody) -> Iterator[tuple[str, ...]]:
    titles = iter((case.title,))
    for engine in body.engines:
        found = case.median_of(engine.name)
        told = f"{figure_text(found)} {case.unit}" if found is not None else "failed"
        ratio = "" if engine.name == body.subject else ratio_text(case.ratios(engine.name, body.subject))
        yield next(titles, ""), engine.name, told, ratio, share_text(case.share(engine.name))
    if case.floor is not None:
        yield "", "floor", f"{figure_text(case.floor)} {case.unit}", "", case.limit


def work_rows(body: ComparisonBody) -> list[tuple[str, ...]]:
    """Rows under :data:`WORK_HEADS`: what each case needs at least, which its floor is made of."""
    return [
        (case.title, figure_text(work.bytes / 2**30), _positive(work.operations / 1e9), _positive(work.tokens))
        for case in body.cases
        if (work := case.work) is not None
    ]


def _positive(value: float) -> str:
    """A figure; nothing where the case has none of it."""
    return f"{value:,}" if value and isinstance(value, int) else figure_text(value) if value else "-"


def figure_text(value: float) -> str:
    """A figure with about three digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def ratio_text(ratios: list[float]) -> str:
    """The median of paired ratios with the lowest and highest; empty where there are none."""
    return f"{median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})" if ratios else ""


def share_text(share: float | None) -> str:
    """A share in percent."""
    return "" if share is None else f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def remarks(body: ComparisonBody) -> list[str]:
    """What the table does not hold: agreement of greedy tokens, failures, what was left out."""
    found = [line for engine in body.engines[1:] for line in _agreement_lines(body, engine.name)]
    found += [f"{name} failed in {case.name}, {why}" for case in body.cases for name, why in case.failures.items()]
    found += [line for case in body.cases for line in _preemption_lines(body, case)]
    found += body.notes
    found += [f"{name} is left out: it {why}" for name, why in body.skipped.items()]
    return found + [f"{name} is not there: {how}" for name, how in body.missing.items()]


def _agreement_lines(body: ComparisonBody, engine: str) -> Iterator[str]:
    compared = {case.name: case.agreement[engine] for case in body.cases if engine in case.agreement}
    if not compared:
        return
    differing = {name: found for name, found in compared.items() if found.first_difference is not None}
    equal = len(compared) - len(differing)
    line = f"greedy tokens of {engine} are {body.subject}'s in {equal} of {len(compared)} cases' first requests"
    told = [f"{name} from token {_position(f.first_difference)} of {f.tokens}" for name, f in differing.items()]
    yield line + (f"; they differ in {', '.join(told)}" if told else "")


def _preemption_lines(body: ComparisonBody, case: CaseResult) -> Iterator[str]:
    for engine in body.engines:
        count = case.preemptions_of(engine.name)
        if count:
            yield f"{engine.name} took room from running sequences in {case.name} ({count} preemptions in all rounds)"


def _position(index: int | None) -> int:
    return (index or 0) + 1
