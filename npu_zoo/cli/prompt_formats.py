"""The forms that a file of prompts may have: one prompt a line, or one JSON object a line.

A format checks lines before a model is loaded, then makes a :class:`LineWork` of each, and knows its own results again.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from npu_zoo.cli.prompt_file import Line
from npu_zoo.cli.prompts import Prompt
from npu_zoo.cli.results import prompt_data, result_data
from npu_zoo.cli.run_key import RunKey, sampling_data
from npu_zoo.core.engine import GenerationRequest, RequestOutput
from npu_zoo.core.errors import NpuZooError, UsageError
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.engine.tokenizer import checked_messages
from npu_zoo.settings import nearest_known, request_sampling

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages", "fim_prefix", "fim_suffix")
SAMPLING_KEYS = tuple(field.name for field in dataclasses.fields(SamplingParams))
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
    def parse(self, line: Line) -> tuple[Prompt, SamplingParams]:
        """A line's prompt and how its tokens are chosen; raises as :meth:`check`."""

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
        prompt, params = self.parse(line)
        return PromptWork(line, prompt, params, self._key, self._encoder, chat=self.chat)

    def place(self, result: Mapping[str, Any]) -> Place:
        """See :meth:`LineFormat.place`."""
        return Place(RunKey.parse(result["run"]), int(result["index"]), "error" in result)


class PromptWork(LineWork):
    """A prompt with its sampling parameters."""

    def __init__(
        self, line: Line, prompt: Prompt, params: SamplingParams, key: RunKey, encoder: PromptEncoder, *, chat: bool
    ) -> None:
        super().__init__(line)
        self.prompt, self.params, self.chat = prompt, params, chat
        self._key, self._encoder = key, encoder

    def prepare(self) -> list[GenerationRequest]:
        """See :meth:`LineWork.prepare`."""
        return [GenerationRequest(str(self.line.index), self._token_ids(), self.params, self.prompt.text)]

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

    def parse(self, line: Line) -> tuple[Prompt, SamplingParams]:
        """A line's prompt and sampling parameters."""
        return Prompt(text=line.text, line=line.number), self.sampling_params


class JsonLines(_PromptLines):
    """An object a line: a prompt of any kind, an id, and sampling parameters that go over the command line's."""

    name = "jsonl"

    def parse(self, line: Line) -> tuple[Prompt, SamplingParams]:
        """A line's prompt and sampling parameters."""
        data = parse_object(line.text)
        known = (*PROMPT_KEYS, "id", *SAMPLING_KEYS)
        for key in data:
            if key not in known:
                raise UsageError(f"unknown key '{key}'{nearest_known(key, known)}")
        given = request_sampling({key: value for key, value in data.items() if key in SAMPLING_KEYS})
        params = dataclasses.replace(self.sampling_params, **given) if given else self.sampling_params
        return _prompt(data, line.number), params


def parse_object(text: str) -> dict[str, Any]:
    """A line's JSON object.

    Raises:
        UsageError: it is none, or holds NaN or an infinity, which JSON has not.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise UsageError(f"no JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise UsageError("no JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"no JSON: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"a JSON object is due, such as {json.dumps({'prompt': 'TEXT'})}, not {type(data).__name__}")
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no value of JSON")


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
        data = parse_object(first.text)
    except UsageError:
        data = {}
    if "custom_id" in data or ("url" in data and "body" in data):
        return "batch"
    return "jsonl" if path.suffix.lower() in _JSON_SUFFIXES or any(key in data for key in PROMPT_KEYS) else "txt"
