"""The forms that a file of prompts may have: one prompt a line, or one JSON object a line.

A format checks lines before a model is loaded, then makes a :class:`LineWork` of each, and knows its own results again.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_zoo.cli.prompt_file import Line
from npu_zoo.cli.prompts import Prompt
from npu_zoo.cli.results import prompt_data, result_data
from npu_zoo.cli.run_key import RunKey, sampling_data
from npu_zoo.core.engine import GenerationRequest, RequestOutput
from npu_zoo.core.errors import NpuZooError, PromptError, UsageError
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.engine.tokenizer import checked_messages
from npu_zoo.protocol.bodies import check_text, parse_object, validate_request
from npu_zoo.protocol.errors import ApiError, shorten
from npu_zoo.protocol.requests import SchedulingFields
from npu_zoo.settings import nearest_known, request_sampling

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages", "fim_prefix", "fim_suffix")
SAMPLING_KEYS = tuple(field.name for field in dataclasses.fields(SamplingParams))
SCHEDULING_KEYS = tuple(SchedulingFields.model_fields)
_BATCH_KEYS = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "chat_template_kwargs")
_JSON_SUFFIXES = (".jsonl", ".ndjson")


class LineWork(ABC):
    """One line: what it asks an engine for, and what is written of it."""

    def __init__(self, line: Line) -> None:
        self.line = line

    @abstractmethod
    def prepare(self) -> Sequence[GenerationRequest]:
        """See :class:`npu_zoo.engine.offline.Work`."""

    @abstractmethod
    def result(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The line's result."""

    @abstractmethod
    def refusal(self, error: Exception) -> dict[str, Any]:
        """What is written where the line cannot be run."""


@dataclass(frozen=True)
class Place:
    """What a written result says of itself; ``failed`` where it is a refusal."""

    key: RunKey
    index: int
    failed: bool


@dataclass(frozen=True)
class PromptRequest:
    """What a line asks for.

    Attributes:
        max_time: in seconds.
        data: the line's object.
    """

    prompt: Prompt
    sampling_params: SamplingParams
    priority: int = 0
    max_time: float | None = None
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class LineFormat(ABC):
    """A form of files of prompts.

    Attributes:
        opening: what every result begins with.
    """

    name: str
    opening: bytes

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """What results depend on beside the file and the model, as plain data."""

    @abstractmethod
    def check(self, line: Line) -> None:
        """Look at a line before a model is loaded.

        Raises:
            UsageError: no result could be made or told apart; the message does not say which line.
        """

    @abstractmethod
    def start(self, key: RunKey, encoder: PromptEncoder) -> None:
        """The model is there: :meth:`work` comes next."""

    @abstractmethod
    def work(self, line: Line) -> LineWork:
        """What a checked line asks for."""

    @abstractmethod
    def place(self, result: Mapping[str, Any]) -> Place:
        """Where a result belongs; a KeyError, TypeError or ValueError where it is none of this format's."""


class _PromptLines(LineFormat):
    """Formats whose results are those of ``run --json``."""

    opening = b'{"index": '

    def __init__(self, sampling_params: SamplingParams, chat: bool) -> None:
        self.sampling_params = sampling_params
        self.chat = chat
        self._key = RunKey("", "", "")
        self._encoder: PromptEncoder | None = None

    def parameters(self) -> dict[str, Any]:
        """See :meth:`LineFormat.parameters`."""
        return {"format": self.name, "chat": self.chat, "sampling": sampling_data(self.sampling_params)}

    @abstractmethod
    def parse(self, line: Line) -> PromptRequest:
        """What a line asks for; raises as :meth:`check`."""

    def check(self, line: Line) -> None:
        """See :meth:`LineFormat.check`."""
        self.parse(line)

    def start(self, key: RunKey, encoder: PromptEncoder) -> None:
        """See :meth:`LineFormat.start`."""
        self._key, self._encoder = key, encoder

    def work(self, line: Line) -> LineWork:
        """See :meth:`LineFormat.work`."""
        if self._encoder is None:
            raise RuntimeError("work is asked for before the start")
        return PromptWork(line, self.parse(line), self._key, self._encoder, chat=self.chat)

    def place(self, result: Mapping[str, Any]) -> Place:
        """See :meth:`LineFormat.place`."""
        return Place(RunKey.parse(result["run"]), int(result["index"]), "error" in result)


class PromptWork(LineWork):
    """A prompt with its sampling parameters."""

    def __init__(self, line: Line, request: PromptRequest, key: RunKey, encoder: PromptEncoder, *, chat: bool) -> None:
        super().__init__(line)
        self.request, self.prompt, self.chat = request, request.prompt, chat
        self._key, self._encoder = key, encoder

    def prepare(self) -> list[GenerationRequest]:
        """See :meth:`LineWork.prepare`."""
        asked = self.request
        with _told_as(PromptError):
            check_text(asked.data)
        return [
            GenerationRequest(
                str(self.line.index),
                self._token_ids(),
                asked.sampling_params,
                self.prompt.text,
                priority=asked.priority,
                max_time=asked.max_time,
            )
        ]

    def result(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """See :meth:`LineWork.result`."""
        return {**result_data(self.line.index, self.prompt, outputs[0]), "run": str(self._key)}

    def refusal(self, error: Exception) -> dict[str, Any]:
        """See :meth:`LineWork.refusal`."""
        return {**prompt_data(self.line.index, self.prompt), "error": _error_data(error), "run": str(self._key)}

    def _token_ids(self) -> list[int]:
        prompt, encoder = self.prompt, self._encoder
        if prompt.token_ids is not None:
            return encoder.encode(prompt.token_ids)
        if prompt.fim is not None:
            return encoder.render_fim(*prompt.fim)
        if prompt.messages is not None:
            return encoder.render_chat(prompt.messages)
        text = prompt.text or ""
        return encoder.render_chat([{"role": "user", "content": text}]) if self.chat else encoder.encode(text)


class TextLines(_PromptLines):
    """A prompt a line."""

    name = "txt"

    def parse(self, line: Line) -> PromptRequest:
        """A line's prompt, with the command line's sampling parameters."""
        return PromptRequest(Prompt(text=line.text, line=line.number), self.sampling_params)


class JsonLines(_PromptLines):
    """An object a line: a prompt of any kind, an id, and parameters, of which sampling's go over the command line's."""

    name = "jsonl"

    def parse(self, line: Line) -> PromptRequest:
        """A line's prompt, and what it says of its answer."""
        data = line_object(line)
        _check_keys(data)
        given = request_sampling({key: value for key, value in data.items() if key in SAMPLING_KEYS})
        params = dataclasses.replace(self.sampling_params, **given) if given else self.sampling_params
        with _told_as(UsageError):
            scheduling = validate_request(SchedulingFields, {key: data[key] for key in SCHEDULING_KEYS if key in data})
        return PromptRequest(_prompt(data, line.number), params, scheduling.priority or 0, scheduling.max_time, data)


def line_object(line: Line) -> dict[str, Any]:
    """A line's JSON object.

    Raises:
        UsageError: it is none.
    """
    with _told_as(UsageError):
        return parse_object(line.text.encode(), "the line")


@contextmanager
def _told_as(kind: type[NpuZooError]) -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        raise kind(error.message) from None


def _check_keys(data: Mapping[str, Any]) -> None:
    known = (*PROMPT_KEYS, "id", *SAMPLING_KEYS, *SCHEDULING_KEYS)
    for key in data:
        if key in _BATCH_KEYS:
            raise UsageError(f"'{key}' is taken in the batch form alone: there it is a part of body")
        if key not in known:
            raise UsageError(f"unknown key '{shorten(key)}'{nearest_known(shorten(key), known)}")


def _prompt(data: Mapping[str, Any], number: int) -> Prompt:
    """The prompt of an object, of the one kind that it has."""
    kinds = [kind for kind in ("prompt", "prompt_token_ids", "messages") if kind in data]
    fim = [key for key in ("fim_prefix", "fim_suffix") if key in data]
    if len(kinds) + bool(fim) != 1:
        found = " and ".join([*kinds, *fim]) or "none"
        raise UsageError(
            f"one of prompt, prompt_token_ids, messages, or fim_prefix with fim_suffix is due, not {found}"
        )
    id_ = data.get("id")
    if isinstance(id_, bool) or not isinstance(id_, (str, int, type(None))):
        raise UsageError(f"id={id_!r} is no text and no whole number")
    if fim:
        hole = _text(data, "fim_prefix"), _text(data, "fim_suffix")
        return Prompt(fim=hole, line=number, id=id_)
    if "messages" in data:
        return Prompt(messages=tuple(checked_messages(data["messages"])), line=number, id=id_)
    if "prompt_token_ids" in data:
        return Prompt(token_ids=_token_ids(data["prompt_token_ids"]), line=number, id=id_)
    return Prompt(text=_text(data, "prompt"), line=number, id=id_)


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key, "")
    if not isinstance(value, str):
        hint = "; token ids go into prompt_token_ids" if isinstance(value, list) else ""
        raise UsageError(f"{key} is {type(value).__name__}, not text{hint}")
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        raise UsageError("prompt_token_ids is no list of whole numbers")
    return tuple(value)


def _error_data(error: Exception) -> dict[str, str]:
    text = str(error) if isinstance(error, NpuZooError) else f"unexpected {type(error).__name__}: {error}"
    return {"type": type(error).__name__, "message": text}


def looks_like(path: Path, first: Line | None) -> str:
    """The format of a file by its suffix and first line: ``txt``, ``jsonl`` or ``batch``."""
    if path.suffix.lower() == ".txt" or first is None:
        return "txt"
    try:
        data = line_object(first)
    except UsageError:
        data = {}
    if "custom_id" in data or ("url" in data and "body" in data):
        return "batch"
    return "jsonl" if path.suffix.lower() in _JSON_SUFFIXES or any(key in data for key in PROMPT_KEYS) else "txt"
