"""What the harness returns, as our results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import JsonValue

from npu_zoo.evaluation.accuracy.tasks import Metric, TaskResult

_RIGHT = ("acc", "exact_match", "em")
"""Metrics that say of a sample whether it is right, in the order in which they are looked for."""


def task_results(found: Mapping[str, Any], *, notes: Sequence[str], data: Mapping[str, JsonValue]) -> list[TaskResult]:
    """A result per task and group, tasks first.

    Args:
        found: what ``lm_eval.evaluator.evaluate`` returned.
    """
    samples = found.get("samples", {})
    counts = {name: int(count["effective"]) for name, count in found.get("n-samples", {}).items()}
    groups = [name for name in found.get("groups", {}) if name not in counts]
    results = [
        TaskResult(
            task=name,
            metrics=_metrics(found["results"][name], counts[name]),
            samples=list(_samples(name, samples.get(name, ()))),
            notes=list(notes),
            data={**data, "version": found.get("versions", {}).get(name), "num_fewshot": found["n-shot"].get(name)},
        )
        for name in counts
    ]
    for name in groups:
        whole = sum(counts.get(task, 0) for task in _tasks_of(name, found["group_subtasks"]))
        results.append(TaskResult(task=name, metrics=_metrics(found["groups"][name], whole), samples=[]))
    return results


def _tasks_of(name: str, members: Mapping[str, Sequence[str]]) -> set[str]:
    """The tasks of a group and of the groups in it; a task alone is its own."""
    within = [member for member in members.get(name, ()) if member != name]
    return {task for member in within for task in _tasks_of(member, members)} or {name}


def _metrics(figures: Mapping[str, Any], samples: int) -> dict[str, Metric]:
    """Figures by metric; the harness names them ``metric,filter``, and their errors ``metric_stderr,filter``."""
    metrics = {}
    for name, value in figures.items():
        metric, comma, kind = name.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = figures.get(f"{metric}_stderr,{kind}")
            known = float(error) if isinstance(error, (int, float)) and not math.isnan(error) else None
            shown = metric if kind == "none" else name
            metrics[shown] = Metric(value=float(value), stderr=known, samples=samples)
    return metrics


def _samples(task: str, samples: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, JsonValue]]:
    first = samples[0]["filter"] if samples else ""
    for sample in sorted(samples, key=lambda sample: int(sample["doc_id"])):
        number, kind = str(sample["doc_id"]), sample["filter"]
        named: dict[str, JsonValue] = {"task": task, "id": number if kind == first else f"{number}:{kind}"}
        figures = {name: _plain(sample[name]) for name in sample.get("metrics", ()) if name in sample}
        yield {
            **named,
            "prompt_hash": sample["prompt_hash"],
            "answer": _answer(sample),
            "target": _target(sample),
            **_right(figures),
            **figures,
            **_scores(sample),
        }


def _right(figures: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    value = next((figures[name] for name in _RIGHT if name in figures), None)
    return {"correct": bool(value)} if value in (0, 1) else {}


def _answer(sample: Mapping[str, Any]) -> JsonValue:
    """The most likely choice, or what was generated; None for texts that are only scored.

    A choice is told by its text, or by its number where it stands before what is scored. Of a single continuation the
    answer is whether it is the greedy one.
    """
    scores = _choices(sample)
    if len(scores) == 1:
        return bool(sample["filtered_resps"][0][1])
    if scores:
        asked = _conditional(sample, len(scores))
        best = max(range(asked), key=lambda i: scores[i])
        return str(_arguments(sample)[best][1]).strip() if _by_text(sample, asked) else best
    answer = sample["filtered_resps"][0]
    return answer if isinstance(answer, str) else None if isinstance(answer, (int, float, tuple)) else _plain(answer)


def _conditional(sample: Mapping[str, Any], scored: int) -> int:
    """How many choices there are; mutual information needs each once more, without the question."""
    return scored // 2 if "acc_mutual_info" in sample.get("metrics", ()) else scored


def _by_text(sample: Mapping[str, Any], asked: int) -> bool:
    """Whether choices are told apart by what is scored."""
    texts = [str(arguments[1]).strip() for arguments in _arguments(sample)[:asked]]
    return len(set(texts)) == len(texts)


def _target(sample: Mapping[str, Any]) -> JsonValue:
    """What is right; of choices that are known by number, its text."""
    target = sample["target"]
    asked = _conditional(sample, len(_choices(sample)))
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < asked and _by_text(sample, asked):
        return str(_arguments(sample)[target][1]).strip()
    return _plain(target)


def _scores(sample: Mapping[str, Any]) -> dict[str, JsonValue]:
    """What the model returned: log-probabilities of choices, or the text before filters."""
    scores = _choices(sample)
    if scores:
        return {"loglikelihoods": list(scores)}
    first = sample["resps"][0][0]
    return {"response": first} if isinstance(first, str) else {}


def _choices(sample: Mapping[str, Any]) -> list[float]:
    """Log-probabilities of what was scored; empty where something was generated."""
    answers = sample["filtered_resps"]
    scored = all(isinstance(answer, (list, tuple)) and len(answer) == 2 for answer in answers)
    return [float(answer[0]) for answer in answers] if scored and len(_arguments(sample)) == len(answers) else []


def _arguments(sample: Mapping[str, Any]) -> list[Sequence[Any]]:
    """Each request's arguments, which the harness keeps as a list or by number."""
    arguments = sample["arguments"]
    return list(arguments.values()) if isinstance(arguments, Mapping) else list(arguments)


def _plain(value: Any) -> JsonValue:
    """A value as JSON has it; anything else as text."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    item = getattr(value, "item", None)  # a scalar of NumPy's
    return _plain(item()) if callable(item) else str(value)
