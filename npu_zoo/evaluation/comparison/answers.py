"""The answers of two results, sample by sample."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from statistics import NormalDist

from pydantic import JsonValue

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.comparison.proportions import Contingency, Interval, mcnemar, paired_difference, wilson
from npu_zoo.evaluation.comparison.report import FigureComparison, TaskComparison
from npu_zoo.evaluation.comparison.results import EvalResult, Sample, Task

_NORMAL_FROM = 30
"""Samples from which the mean of their differences is taken for normal."""

Pair = tuple[Sample, Sample]


def compare_tasks(a: EvalResult, b: EvalResult, confidence: float) -> list[TaskComparison]:
    """Compare the tasks that both results have.

    Raises:
        UsageError: they share no task, or no sample of a task, or a task's data differ.
    """
    shared = [name for name in a.tasks if name in b.tasks]
    if not shared:
        raise UsageError(
            f"{a.path} and {b.path} share no task: {_named(a.tasks)} and {_named(b.tasks)}; evaluate the same ones"
        )
    return [compare_task(a.tasks[name], b.tasks[name], confidence) for name in shared]


def compare_task(a: Task, b: Task, confidence: float) -> TaskComparison:
    """Compare two results of one task.

    Raises:
        UsageError: they are of other data, or share no sample.
    """
    _require_same_data(a, b)
    pairs = [(sample, b.samples[name]) for name, sample in a.samples.items() if name in b.samples]
    if not pairs:
        raise UsageError(f"the results share no sample of task {a.name}; evaluate the same ones")
    differing = [ours.id for ours, theirs in pairs if ours.answer != theirs.answer]
    return TaskComparison(
        task=a.name,
        samples=len(pairs),
        agreement=wilson(len(pairs) - len(differing), len(pairs), confidence),
        differing=differing,
        only_in_a=[name for name in a.samples if name not in b.samples],
        only_in_b=[name for name in b.samples if name not in a.samples],
        other_prompts=[ours.id for ours, theirs in pairs if ours.prompt != theirs.prompt],
        figures=_figures(pairs, confidence),
    ).model_copy(update=_judged(pairs, confidence))


def _judged(pairs: Sequence[Pair], confidence: float) -> dict[str, object]:
    """Who got what right, of samples that both results judge."""
    judged = [(a.correct, b.correct) for a, b in pairs if a.correct is not None and b.correct is not None]
    if not judged:
        return {}
    table = Contingency.of(judged)
    return {
        "judged": table,
        "accuracy_a": wilson(table.both + table.only_a, table.total, confidence),
        "accuracy_b": wilson(table.both + table.only_b, table.total, confidence),
        "difference": paired_difference(table, confidence),
        "mcnemar_p": mcnemar(table),
    }


def _figures(pairs: Sequence[Pair], confidence: float) -> dict[str, FigureComparison]:
    names = [name for name in pairs[0][0].figures if all(name in a.figures and name in b.figures for a, b in pairs)]
    return {name: _figure([(a.figures[name], b.figures[name]) for a, b in pairs], confidence) for name in names}


def _figure(values: Sequence[tuple[float, float]], confidence: float) -> FigureComparison:
    differences = [b - a for a, b in values]
    return FigureComparison(
        a=statistics.fmean(a for a, _ in values),
        b=statistics.fmean(b for _, b in values),
        difference=mean_difference(differences, confidence),
        largest_difference=max(map(abs, differences)),
    )


def mean_difference(differences: Sequence[float], confidence: float) -> Interval | None:
    """The mean of paired differences by the normal approximation; None where they are too few or not finite."""
    if len(differences) < _NORMAL_FROM or not all(map(math.isfinite, differences)):
        return None
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences, mean) / math.sqrt(len(differences))
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Interval(mean, mean - half, mean + half)


def _require_same_data(a: Task, b: Task) -> None:
    differing = [name for name in sorted({*a.data, *b.data}) if _digest(a, name) != _digest(b, name)]
    if differing:
        told = "; ".join(f"{name} {a.data.get(name)} and {b.data.get(name)}" for name in differing)
        raise UsageError(f"the results of task {a.name} are of other data: {told}; evaluate the same data set")


def _digest(task: Task, name: str) -> JsonValue:
    """A data set's name or digest; where its file lies does not matter."""
    return task.data.get(name) if name not in _PLACES else None


_PLACES = ("file", "path", "folder")


def _named(tasks: Mapping[str, Task]) -> str:
    return ", ".join(tasks) or "none"
