"""Who answers in a conversation: the interface, and a model in this process."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from npu_zoo.cli.interrupts import InterruptFlag
from npu_zoo.core.errors import NpuZooError

if TYPE_CHECKING:
    from npu_zoo.core.engine import RequestOutput
    from npu_zoo.core.model_config import ReasoningFormat
    from npu_zoo.core.sampling import SamplingParams
    from npu_zoo.engine.llm import LLM

Messages = Sequence[Mapping[str, str]]


class ConversationTooLongError(NpuZooError):
    """A conversation is longer than the model takes, as its server says."""


@dataclass(frozen=True)
class AnswerState:
    """What an answer has grown by, and what it is so far.

    Attributes:
        reasoning, text: what is new of the model's reasoning and of its answer.
        answer: the whole answer so far, without its reasoning: what goes into the history.
    """

    reasoning: str
    text: str
    answer: str


class Answerer(ABC):
    """Answers conversations.

    Attributes:
        title: who it is, for people.
    """

    title: str

    @abstractmethod
    def answer(self, messages: Messages, interrupted: InterruptFlag) -> Generator[AnswerState, None, None]:
        """The answer as it grows. Closing the iterator stops it; it ends early where ``interrupted`` says so.

        Raises:
            ConversationTooLongError: there is none, and there might be one to fewer messages.
            NpuZooError: there is none, or it broke off; what has come of it stays.
        """

    def fits(self, messages: Messages) -> bool:
        """Whether there is room for a conversation and an answer, as far as can be told without asking for one."""
        return True


class LocalAnswerer(Answerer):
    """A model in this process."""

    def __init__(self, llm: LLM, sampling_params: SamplingParams) -> None:
        self.llm = llm
        self.sampling_params = sampling_params
        config = llm.engine.config
        self.title = f"{config.model} on {config.hardware}"

    def answer(self, messages: Messages, interrupted: InterruptFlag) -> Generator[AnswerState, None, None]:
        """See :meth:`Answerer.answer`."""
        growing = GrowingAnswer(self.llm.engine.config.reasoning)
        stream: Any = self.llm.stream_chat([dict(message) for message in messages], self.sampling_params)
        with contextlib.closing(stream) as outputs:
            for output in outputs:
                yield growing.take(output)

    def fits(self, messages: Messages) -> bool:
        """See :meth:`Answerer.fits`; a quarter of the model's length at most is kept for the answer."""
        limit = self.llm.engine.config.max_model_len
        room = min(self.sampling_params.max_tokens or limit, limit // 4)
        return len(self.llm.engine.render_chat([dict(message) for message in messages])) + room <= limit


class GrowingAnswer:
    """An answer whose reasoning is told apart as it grows."""

    def __init__(self, reasoning: ReasoningFormat | None) -> None:
        self._reasoning = reasoning
        self._text = ""

    def take(self, output: RequestOutput) -> AnswerState:
        """A further state of the output."""
        text, opened = output.outputs[0].text, output.reasoning_open
        new, self._text = text[len(self._text) :], text
        if self._reasoning is None:
            return AnswerState("", new, text)
        answer = self._reasoning.split(text, opened=opened)[1]
        within = len(new) - min(len(new), len(answer))
        return AnswerState(new[:within], new[within:], answer)
