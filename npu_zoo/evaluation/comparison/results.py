"""What a record of `npu-zoo eval` says of each sample, as far as two of them can be held against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from npu_zoo.core.errors import UsageError, validation_lines
from npu_zoo.evaluation.record import ResultRecord, read_record

_NO_FIGURES = ("task", "id", "prompt", "prompt_hash", "answer", "target", "correct")


@dataclass(frozen=True)
class Sample:
    """One sample of a task.

    Attributes:
        prompt: the prompt or its digest; None where the record has neither.
        answer: None where nothing was answered, as of texts that are only scored.
        correct: None where it is not right or wrong.
        figures: numbers that were computed of it, such as a log-likelihood.
    """

    id: str
    prompt: str | None
    answer: JsonValue
    correct: bool | None
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Task:
    """A task's samples by id.

    Attributes:
        data: what names its data set.
    """

    name: str
    data: Mapping[str, JsonValue]
    samples: Mapping[str, Sample]


@dataclass(frozen=True)
class EvalResult:
    """A record of `npu-zoo eval` with its tasks by name.

    Attributes:
        logits: the file of logits; None where none were saved.
        logits_sha256: the file's digest.
    """

    path: Path
    record: ResultRecord
    tasks: Mapping[str, Task]
    logits: Path | None = None
    logits_sha256: str = ""


class _TaskPart(BaseModel):
    """What a comparison takes of a task's result."""

    model_config = ConfigDict(extra="ignore")

    task: str
    data: dict[str, JsonValue] = {}


class _Body(BaseModel):
    """What a comparison takes of a record's body."""

    model_config = ConfigDict(extra="ignore")

    tasks: list[_TaskPart]
    samples: list[dict[str, JsonValue]]
    logits_file: str | None = None
    logits_sha256: str | None = None


def read_result(path: Path) -> EvalResult:
    """The result in a record's file.

    Raises:
        UsageError: it is no record of `npu-zoo eval`, or its samples cannot be told apart.
    """
    record = read_record(path, "eval")
    try:
        body = _Body.model_validate(record.body)
    except ValidationError as error:
        raise UsageError(f"{path} is no whole record of `npu-zoo eval`: {validation_lines(error)[0]}") from None
    logits = path.parent / body.logits_file if body.logits_file else None
    return EvalResult(path, record, _tasks(body, path), logits, body.logits_sha256 or "")


def _tasks(body: _Body, path: Path) -> dict[str, Task]:
    """Tasks that have samples, which a group of them has not."""
    data = {part.task: part.data for part in body.tasks}
    tasks: dict[str, dict[str, Sample]] = {}
    for raw in body.samples:
        if "task" not in raw or "id" not in raw:
            raise UsageError(f"{path}: a sample has no task or no id; evaluate again")
        name, sample = str(raw["task"]), _sample(raw)
        of_task = tasks.setdefault(name, {})
        if sample.id in of_task:
            raise UsageError(f"{path}: task {name} has two samples with id {sample.id}; evaluate again")
        of_task[sample.id] = sample
    return {name: Task(name, data.get(name, {}), samples) for name, samples in tasks.items()}


def _sample(raw: Mapping[str, JsonValue]) -> Sample:
    correct = raw.get("correct")
    prompt = raw.get("prompt_hash", raw.get("prompt"))
    return Sample(
        id=str(raw["id"]),
        prompt=None if prompt is None else str(prompt),
        answer=raw.get("answer"),
        correct=correct if isinstance(correct, bool) else None,
        figures=dict(_figures(raw)),
    )


def _figures(raw: Mapping[str, JsonValue]) -> Iterator[tuple[str, float]]:
    for name, value in raw.items():
        if name not in _NO_FIGURES and isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, float(value)
