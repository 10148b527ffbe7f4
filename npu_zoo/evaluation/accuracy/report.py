"""What ``eval`` records: figures, and what came of every sample."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

from npu_zoo.core.config import EngineConfig
from npu_zoo.evaluation.accuracy.sources import file_digest
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
        logits_file: where the logits are, from the record's folder; None where none were kept.
        logits_sha256: of that file.
    """

    model_config = ConfigDict(frozen=True)

    tasks: list[TaskFigures]
    samples: list[dict[str, JsonValue]]
    deterministic: bool = False
    logits_file: str | None = None
    logits_sha256: str | None = None


def eval_record(
    results: Sequence[TaskResult],
    config: EngineConfig,
    arguments: Mapping[str, JsonValue],
    path: Path,
    logits: Path | None = None,
) -> ResultRecord:
    """The record of a run.

    Args:
        path: where it will be.
        logits: the file of logits, which is there.
    """
    figures = [
        TaskFigures(task=result.task, metrics=result.metrics, notes=result.notes, data=result.data)
        for result in results
    ]
    samples = [sample for result in results for sample in result.samples]
    body = EvalBody(
        tasks=figures,
        samples=samples,
        deterministic=config.deterministic,
        logits_file=os.path.relpath(logits, path.parent) if logits else None,
        logits_sha256=file_digest(logits) if logits else None,
    )
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
