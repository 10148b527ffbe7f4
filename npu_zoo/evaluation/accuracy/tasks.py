"""What a task of our own is, one that the harness does not run, and which there are."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, JsonValue

from npu_zoo.core.engine import Progress
from npu_zoo.core.errors import UsageError

if TYPE_CHECKING:
    import numpy

    from npu_zoo.core.config import EngineConfig
    from npu_zoo.engine.llm import LLM

EVAL_TASKS: dict[str, str] = {
    "perplexity": "npu_zoo.evaluation.accuracy.perplexity:Perplexity",
    "humaneval": "npu_zoo.evaluation.programs.task:HumanEval",
    "humaneval_plus": "npu_zoo.evaluation.programs.task:HumanEvalPlus",
    "humaneval_infilling": "npu_zoo.evaluation.programs.task:HumanEvalInfilling",
}
"""Tasks that run without the harness's task code: name -> ``module:attribute`` of an :class:`EvalTask`."""


class Metric(BaseModel):
    """A figure of a task.

    Attributes:
        stderr: its standard error; None where it has none.
        samples: how many samples it is of.
    """

    model_config = ConfigDict(frozen=True)

    value: float
    stderr: float | None = None
    samples: int


class TaskResult(BaseModel):
    """What came of a task.

    Attributes:
        metrics: by name, such as ``acc``.
        samples: one object per sample with ``task``, ``id`` (unique within the task), ``prompt`` or ``prompt_hash``,
            ``answer``, ``correct`` (true, false, or absent where a sample is not right or wrong), and figures.
        notes: what a reader of the figures should know, a sentence each.
        data: the data set's file or name, and what else names it.
    """

    model_config = ConfigDict(frozen=True)

    task: str
    metrics: dict[str, Metric]
    samples: list[dict[str, JsonValue]]
    notes: list[str] = []
    data: dict[str, JsonValue] = {}


class Responses(Protocol):
    """Answers of the model by request, which outlive an interrupted run."""

    def get(self, key: str) -> JsonValue:
        """The answer to a request; None where there is none yet."""

    def put(self, key: str, value: JsonValue) -> None:
        """Keep an answer, which is not None."""


class Logits(Protocol):
    """Where logits go.

    Attributes:
        positions: how many of one request are kept at most.
    """

    positions: int

    def put(self, task: str, sample_id: str, logits: numpy.ndarray[Any, Any], part: int = 0) -> None:
        """Keep logits of a sample; [positions, vocab_size], float32.

        Args:
            part: which of the sample's requests they are of; a sample's parts are put together in this order.
        """


@dataclass(frozen=True)
class TaskOptions:
    """What the command line says of a task.

    Attributes:
        data: the file or folder of the data set; None where none was named.
        limit: only the first so many samples; None for all.
        num_fewshot: examples before each question; None as the task is.
        chat: whether prompts go through the chat template; None as the task and the variant are.
        seed: of every draw.
        arguments: the task's own, of ``--task-arg NAME=VALUE``; only those in :attr:`EvalTask.arguments` arrive.
        responses: keeps answers for a run that goes on; keys are the task's own, unique over all requests. None where
            nothing is kept.
        logits: where logits go; None where they were not asked for.
    """

    data: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool | None = None
    seed: int = 0
    arguments: Mapping[str, str] = field(default_factory=dict)
    responses: Responses | None = None
    logits: Logits | None = None


class EvalTask(ABC):
    """A task that is not the harness's. Its constructor takes no argument.

    Attributes:
        name: as in :data:`EVAL_TASKS`.
        arguments: what ``--task-arg`` may set, with a help text each.
    """

    name: ClassVar[str]
    arguments: ClassVar[Mapping[str, str]] = {}

    def check(self, options: TaskOptions) -> None:  # noqa: B027
        """Look at the options and read the data set, before a model is loaded.

        Raises:
            UsageError: the data is missing (it says what to download and from where) or an option does not fit.
        """

    def require_model(self, config: EngineConfig) -> None:  # noqa: B027
        """Refuse a model that cannot do the task, before it is loaded.

        Raises:
            UsageError: it cannot; says what it can.
        """

    @abstractmethod
    def run(self, llm: LLM, options: TaskOptions, progress: Progress) -> TaskResult:
        """Run all samples in one continuous batch.

        Args:
            progress: told the stage's name, how many requests are done and how many there are.

        Raises:
            UsageError: the data or an option does not fit.
            KeyboardInterrupt: what has been answered is in ``options.responses``.
        """


def load_task(name: str) -> EvalTask:
    """The task of that name, which is in :data:`EVAL_TASKS`.

    Raises:
        UsageError: this installation has no code for it.
    """
    module, _, attribute = EVAL_TASKS[name].partition(":")
    try:
        task: EvalTask = getattr(importlib.import_module(module), attribute)()
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise UsageError(f"task {name}: this installation has no {module}") from error
    return task
