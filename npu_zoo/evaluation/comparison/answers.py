"""The answers of two results, sample by sample."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from statistics import NormalDist

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.comparison.proportions import Contingency, Interval, mcnemar, paired_difference, wilson
from npu_zoo.evaluation.comparison.report import FigureComparison, TaskComparison
from npu_zoo.evaluation.comparison.results import EvalResult, Sample, Task

_NORMAL_FROM = 30
"""Samples from which the mean of their differences is taken for normal."""

_DIGEST = "sha256"
_PLACES = ("path", "files")
"""Of what names a data set."""

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
    answered = [(ours, theirs) for ours, theirs in pairs if ours.answer is not None or theirs.answer is not None]
    differing = [ours.id for ours, theirs in answered if ours.answer != theirs.answer]
    return TaskComparison(
        task=a.name,
        samples=len(pairs),
        agreement=wilson(len(answered) - len(differing), len(answered), confidence) if answered else None,
        differing=differing,
        only_in_a=[name for name in a.samples if name not in b.samples],
        only_in_b=[name for name in b.samples if name not in a.samples],
        other_prompts=[ours.id for ours, theirs in pairs if ours.prompt != theirs.prompt],
    ).model_copy(update=_judged(pairs, confidence) or {"figures": _figures(pairs, confidence)})


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
    ours, theirs = a.data.get(_DIGEST), b.data.get(_DIGEST)
    if ours and theirs and ours != theirs:
        raise UsageError(
            f"the results of task {a.name} are of other data, with SHA-256 {ours} and {theirs}; evaluate the same files"
        )


def data_remarks(a: Task, b: Task) -> list[str]:
    """What else was not the same in a task's data, a sentence each; where a file lies does not matter."""
    names = sorted({*a.data, *b.data} - {_DIGEST, *_PLACES})
    return [
        f"{a.name}: {name} is {a.data.get(name)} in A and {b.data.get(name)} in B"
        for name in names
        if a.data.get(name) != b.data.get(name)
    ]


def _named(tasks: Mapping[str, Task]) -> str:
    return ", ".join(tasks) or "none"
