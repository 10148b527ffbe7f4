"""Two records of `npu-zoo eval` held against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import JsonValue

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.comparison.answers import compare_tasks, data_remarks
from npu_zoo.evaluation.comparison.logits import LogitsFile, open_logits, paired_chunks, require_digest
from npu_zoo.evaluation.comparison.report import ComparisonBody, LogitsComparison, Side, TaskComparison, WorstSample
from npu_zoo.evaluation.comparison.results import EvalResult
from npu_zoo.evaluation.record import ResultRecord

if TYPE_CHECKING:
    from npu_zoo.evaluation.comparison.divergence import Divergence

LogitsProgress = Callable[[int, int, int, int], None]
"""Called with the tensors and bytes that are compared: done and all tensors, done and all bytes."""

_SHOWN_IDS = 10


def compare(
    a: EvalResult,
    b: EvalResult,
    *,
    min_agreement: float | None = None,
    confidence: float = 0.95,
    progress: LogitsProgress | None = None,
) -> ComparisonBody:
    """Compare answers, accuracy, and logits where both results have them.

    Args:
        a: the reference.
        b: what is held against it.
        min_agreement: the least share of each task's samples with the same answer; None for no bound.
        confidence: of the intervals.
        progress: told how much of the logits is compared.

    Raises:
        UsageError: they share no task or no sample, are of other data, or a file of logits is not the record's.
    """
    tasks = compare_tasks(a, b, confidence)
    logits = _compare_logits(a, b, tasks, progress) if a.logits and b.logits else None
    remarks = [*_task_remarks(a, b), *_sample_remarks(tasks), *_logits_remarks(a, b, logits)]
    agreed = not below(tasks, min_agreement)
    return ComparisonBody(
        a=_side(a, b),
        b=_side(b, a),
        passes=agreed and (logits is None or logits.passes),
        partial=_is_partial(a, b, tasks, logits),
        tasks=tasks,
        logits=logits,
        remarks=remarks,
    )


def figures_of(body: ComparisonBody) -> dict[str, float]:
    """The few figures of a comparison that others would cite."""
    found: dict[str, float] = {}
    for task in body.tasks:
        if task.agreement:
            found[f"{task.task}_agreement"] = task.agreement.value
        if task.difference:
            found[f"{task.task}_accuracy_difference"] = task.difference.value
    if body.logits and body.logits.largest < float("inf"):
        found |= {"kl_largest_nats": body.logits.largest, "kl_mean_nats": body.logits.mean}
    return found


def below(tasks: Sequence[TaskComparison], min_agreement: float | None) -> list[str]:
    """Tasks whose agreement is less than was asked for; those without answers have none to fall short of."""
    least = 0.0 if min_agreement is None else min_agreement
    return [task.task for task in tasks if task.agreement and task.agreement.value < least]


def _compare_logits(
    a: EvalResult, b: EvalResult, tasks: Sequence[TaskComparison], progress: LogitsProgress | None
) -> LogitsComparison:
    assert a.logits
    assert b.logits
    require_digest(a.logits, a.logits_sha256)
    require_digest(b.logits, b.logits_sha256)
    with open_logits(a.logits) as of_a, open_logits(b.logits) as of_b:
        left_out = _left_out(of_a, of_b, tasks)
        names = sorted((of_a.names & of_b.names) - left_out.keys())
        if not names:
            raise UsageError(f"{a.logits} and {b.logits} hold logits of no sample that both results have")
        _require_same_vocabulary(of_a, of_b, names)
        return _logits_comparison(_diverge(of_a, of_b, names, progress), len(names), left_out)


def _diverge(a: LogitsFile, b: LogitsFile, names: Sequence[str], progress: LogitsProgress | None) -> Divergence:
    from npu_zoo.evaluation.comparison.divergence import Divergence

    found, done = Divergence(), 0
    sizes = {name: 8 * a.shape(name)[0] * a.shape(name)[1] for name in names}
    for number, name in enumerate(names, 1):
        found.add(name, paired_chunks(a, b, name))
        done += sizes[name]
        if progress:
            progress(number, len(names), done, sum(sizes.values()))
    return found


def _left_out(a: LogitsFile, b: LogitsFile, tasks: Sequence[TaskComparison]) -> dict[str, str]:
    """Samples whose logits cannot be compared, with the reason."""
    reasons = dict.fromkeys(a.names - b.names, "in A alone") | dict.fromkeys(b.names - a.names, "in B alone")
    for task in tasks:
        named = {f"{task.task}/{sample}" for sample in task.other_prompts} & a.names & b.names
        reasons |= dict.fromkeys(named, "other prompts")
    for name in (a.names & b.names) - reasons.keys():
        ours, theirs = a.shape(name)[0], b.shape(name)[0]
        if ours != theirs:
            reasons[name] = f"{ours} and {theirs} positions"
    return dict(sorted(reasons.items()))


def _require_same_vocabulary(a: LogitsFile, b: LogitsFile, names: Sequence[str]) -> None:
    for name in names:
        ours, theirs = a.shape(name)[1], b.shape(name)[1]
        if ours != theirs:
            raise UsageError(f"{name}: logits over {ours} and {theirs} tokens; compare models of one vocabulary")


def _logits_comparison(found: Divergence, samples: int, left_out: dict[str, str]) -> LogitsComparison:
    rule = found.rule
    return LogitsComparison(
        passes=found.passes,
        samples=samples,
        positions=found.positions,
        mean=found.mean,
        p99=found.percentile(99),
        largest=found.largest,
        above_usual=found.above(rule.usual),
        above_largest=found.above(rule.largest),
        usual_bound=rule.usual,
        largest_bound=rule.largest,
        share_bound=rule.share,
        top1_agreement=found.same_top / found.positions if found.positions else 0.0,
        worst=[WorstSample(sample=one.sample, position=one.position, kl=one.kl) for one in found.worst],
        invalid=found.invalid,
        left_out=left_out,
    )


def _is_partial(a: EvalResult, b: EvalResult, tasks: Sequence[TaskComparison], logits: LogitsComparison | None) -> bool:
    missing = any(task.only_in_a or task.only_in_b for task in tasks) or a.tasks.keys() != b.tasks.keys()
    return missing or bool(logits and logits.left_out) or bool(a.logits) != bool(b.logits)


def _side(one: EvalResult, other: EvalResult) -> Side:
    ours, theirs = _facts(one.record), _facts(other.record)
    differs = {name: value for name, value in ours.items() if value != theirs.get(name)}
    model = one.record.model.name if one.record.model else ""
    return Side(record=str(one.path), date=one.record.date, model=model, differs=differs)


def _facts(record: ResultRecord) -> dict[str, JsonValue]:
    """What may make two results differ: the model, how it was asked, and what it ran on."""
    model = record.model.model_dump(mode="json") if record.model else {}
    machine = record.machine.model_dump(mode="json", include={"cpu", "devices", "threads"}) if record.machine else {}
    return {**dict(_leaves(record.arguments)), **model, **machine, **record.versions}


def _leaves(arguments: Mapping[str, JsonValue], within: str = "") -> Iterator[tuple[str, JsonValue]]:
    """Single arguments, named as the engine's are, or by the task that they are of."""
    for name, value in arguments.items():
        if isinstance(value, dict):
            yield from _leaves(value, "" if name in ("engine", "tasks") else f"{within}{name} ")
        else:
            yield f"{within}{name}", value


def _task_remarks(a: EvalResult, b: EvalResult) -> list[str]:
    alone = {"A": a.tasks.keys() - b.tasks.keys(), "B": b.tasks.keys() - a.tasks.keys()}
    told = [f"in {side} alone: task {', '.join(sorted(names))}" for side, names in alone.items() if names]
    shared = [(task, b.tasks[name]) for name, task in a.tasks.items() if name in b.tasks]
    return told + [remark for pair in shared for remark in data_remarks(*pair)]


def _sample_remarks(tasks: Sequence[TaskComparison]) -> list[str]:
    found = []
    for task in tasks:
        for side, ids in (("A", task.only_in_a), ("B", task.only_in_b)):
            if ids:
                found.append(f"{task.task}: {len(ids)} samples in {side} alone: {shown(ids)}")
        if task.other_prompts:
            ids = task.other_prompts
            found.append(f"{task.task}: prompts differ in {len(ids)} samples, so answers alone compare: {shown(ids)}")
    return found


def _logits_remarks(a: EvalResult, b: EvalResult, logits: LogitsComparison | None) -> list[str]:
    if logits is None:
        lacking = [side for side, result in (("A", a), ("B", b)) if result.logits is None]
        whose = "neither result has" if len(lacking) == 2 else f"{lacking[0]} has no"
        return [f"{whose} logits, so no KL is compared; eval --save-logits FILE keeps them"]
    return [*_invalid_remarks(logits.invalid), *_left_out_remarks(logits.left_out)]


def _invalid_remarks(invalid: Mapping[str, int]) -> list[str]:
    if not invalid:
        return []
    return [
        f"{sum(invalid.values())} positions are no logits (NaN or infinite) and have no KL, in {shown(list(invalid))}"
    ]


def _left_out_remarks(left_out: Mapping[str, str]) -> list[str]:
    told = [f"{name} ({reason})" for name, reason in left_out.items()]
    return [f"logits of {len(told)} samples are not compared: {shown(told)}"] if told else []


def shown(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    rest = f" and {len(names) - _SHOWN_IDS} more" if len(names) > _SHOWN_IDS else ""
    return ", ".join(names[:_SHOWN_IDS]) + rest
