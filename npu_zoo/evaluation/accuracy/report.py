"""What ``eval`` records: figures, and what came of every sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, JsonValue

from npu_zoo.core.config import EngineConfig
from npu_zoo.evaluation.accuracy.tasks import Metric, TaskResult
from npu_zoo.evaluation.machine import describe_machine
from npu_zoo.evaluation.record import ModelUnderTest, ResultRecord, installed_versions


class TaskFigures(BaseModel):
    """A task's figures, and what they are of."""

    model_config = ConfigDict(frozen=True)

    task: str
    metrics: dict[str, Metric]
    notes: list[str] = []
    data: dict[str, JsonValue] = {}


class EvalBody(BaseModel):
    """The body of a record of kind ``eval``.

    Attributes:
        samples: of all tasks; see :class:`npu_zoo.evaluation.accuracy.tasks.TaskResult`.
        deterministic: whether the run was asked to sum in the same order every time.
    """

    model_config = ConfigDict(frozen=True)

    tasks: list[TaskFigures]
    samples: list[dict[str, JsonValue]]
    deterministic: bool = False


def eval_record(
    results: Sequence[TaskResult], config: EngineConfig, arguments: Mapping[str, JsonValue]
) -> ResultRecord:
    """The record of a run."""
    figures = [
        TaskFigures(task=result.task, metrics=result.metrics, notes=result.notes, data=result.data)
        for result in results
    ]
    samples = [sample for result in results for sample in result.samples]
    body = EvalBody(tasks=figures, samples=samples, deterministic=config.deterministic)
    return ResultRecord(
        kind="eval",
        versions=installed_versions(["lm_eval"]),
        machine=describe_machine(config.hardware, config.threads),
        model=ModelUnderTest.of(config),
        arguments=dict(arguments),
        body=body.model_dump(mode="json"),
        figures=_cited(results),
    )


def _cited(results: Sequence[TaskResult]) -> dict[str, float]:
    """Every metric by ``task_metric``."""
    return {
        f"{result.task}_{name}": metric.value
        for result in results
        for name, metric in result.metrics.items()
        if math.isfinite(metric.value)
    }
