"""What a task asks of an engine, all of it in one continuous batch, and the answers that an earlier run has left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from pydantic import JsonValue

from npu_zoo.core.engine import Engine, GenerationRequest, Progress, RequestOutput
from npu_zoo.core.errors import EngineError
from npu_zoo.engine.offline import Finished, OfflineRunner
from npu_zoo.evaluation.accuracy.tasks import Responses


class Question(Protocol):
    """One or several requests with one answer.

    Attributes:
        key: tells it from other questions; those with equal keys are asked once.
    """

    key: str

    def prepare(self) -> Sequence[GenerationRequest]:
        """The requests; made only when their turn comes."""

    def answer(self, outputs: Sequence[RequestOutput]) -> JsonValue:
        """The answer, which is not None, of one output per request."""


def ask_all(
    engine: Engine,
    questions: Sequence[Question],
    *,
    stage: str,
    progress: Progress,
    responses: Responses | None = None,
) -> list[JsonValue]:
    """Ask questions in their order and return the answers in it.

    Args:
        stage: what progress is told.
        responses: has the answers that are there already, and gets each new one as it comes.

    Raises:
        EngineError: a request could not be finished.
        UsageError: the engine refuses a request.
    """
    total = len({question.key for question in questions})
    answers = _known(questions, responses)
    progress(stage, len(answers), total)
    for finished in OfflineRunner(engine).run(_open(questions, set(answers))):
        answer = _answer(finished)
        answers[finished.work.key] = answer
        if responses is not None:
            responses.put(finished.work.key, answer)
        progress(stage, len(answers), total)
    return [answers[question.key] for question in questions]


def _known(questions: Sequence[Question], responses: Responses | None) -> dict[str, JsonValue]:
    if responses is None:
        return {}
    found = ((question.key, responses.get(question.key)) for question in questions)
    return {key: answer for key, answer in found if answer is not None}


def _open(questions: Sequence[Question], asked: set[str]) -> Iterator[Question]:
    """Those without an answer, one of each key."""
    for question in questions:
        if question.key not in asked:
            asked.add(question.key)
            yield question


def _answer(finished: Finished[Question]) -> JsonValue:
    if finished.error is not None:
        raise finished.error
    for output in finished.outputs:
        for completion in output.outputs:
            if completion.finish_reason in ("abort", "error"):
                raise EngineError(f"request {output.request_id} could not be finished: {completion.stop_reason}")
    return finished.work.answer(finished.outputs)
