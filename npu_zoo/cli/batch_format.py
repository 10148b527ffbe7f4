"""OpenAI's batch files: requests with a custom_id in, answers with the same custom_id out.

Source: the file formats of OpenAI's Batch API (platform.openai.com/docs/guides/batch).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from npu_zoo.cli.output import note
from npu_zoo.cli.prompt_file import Line
from npu_zoo.cli.prompt_formats import LineFormat, LineWork, Place, line_object
from npu_zoo.cli.run_key import RunKey
from npu_zoo.core.engine import GenerationRequest, RequestOutput
from npu_zoo.core.errors import UsageError
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.protocol.answering import Answering
from npu_zoo.protocol.bodies import validate_request
from npu_zoo.protocol.errors import ApiError, api_error, describe
from npu_zoo.protocol.openai import OpenAIProtocol
from npu_zoo.protocol.requests import ChatCompletionRequest, CompletionRequest
from npu_zoo.protocol.sampling import check_defaults

CHAT_URL, COMPLETION_URL = "/v1/chat/completions", "/v1/completions"
_PREFIX = "batch_req_"
_INDEX_DIGITS = 8

Answer = Callable[[Mapping[str, Any], str], Answering]
"""From a line's object and a request's id to the answering of it; an ApiError refuses it."""


class BatchLines(LineFormat):
    """Requests of chat and text completions; what their bodies leave out comes from the command line.

    Args:
        defaults: sampling parameters that were given, under SamplingParams' names.
        served_model_names: what the bodies may call the model.

    Raises:
        ConfigError: a sampling parameter can have no default.
    """

    name = "batch"
    opening = b'{"id": "' + _PREFIX.encode()

    def __init__(self, defaults: Mapping[str, Any], served_model_names: Sequence[str]) -> None:
        self._defaults, self._names = check_defaults(defaults), list(served_model_names)
        self._seen: dict[str, int] = {}
        self._key = RunKey("", "", "")
        self._protocol: OpenAIProtocol | None = None

    def parameters(self) -> dict[str, Any]:
        """See :meth:`LineFormat.parameters`."""
        return {"format": self.name, "sampling": self._defaults, "served_model_names": self._names}

    def check(self, line: Line) -> None:
        """See :meth:`LineFormat.check`."""
        custom_id = line_object(line).get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            raise UsageError("custom_id is missing or no text; it is what tells the answers apart")
        if custom_id in self._seen:
            raise UsageError(f"custom_id {custom_id!r} is that of line {self._seen[custom_id]} too; give each its own")
        self._seen[custom_id] = line.number

    def start(self, key: RunKey, encoder: PromptEncoder) -> None:
        """See :meth:`LineFormat.start`."""
        self._seen.clear()
        self._key = key
        self._protocol = OpenAIProtocol(encoder, self._names, defaults=self._defaults)

    def work(self, line: Line) -> LineWork:
        """See :meth:`LineFormat.work`."""
        return BatchWork(line, f"{self._key}{line.index:0{_INDEX_DIGITS}x}", self._answer)

    def place(self, result: Mapping[str, Any]) -> Place:
        """See :meth:`LineFormat.place`."""
        name = str(result["id"]).removeprefix(_PREFIX)
        failed = result["error"] is not None or result["response"]["status_code"] >= 400
        return Place(RunKey.parse(name[:-_INDEX_DIGITS]), int(name[-_INDEX_DIGITS:], 16), failed)

    def _answer(self, data: Mapping[str, Any], request_id: str) -> Answering:
        if self._protocol is None:
            raise RuntimeError("work is asked for before the start")
        if data.get("method", "POST") != "POST":
            raise ApiError(405, f"method is {describe(data['method'])}; only POST has a meaning here", param="method")
        body = data.get("body")
        if isinstance(body, dict) and body.get("stream"):
            raise ApiError(400, "stream is true, and a batch's answers are whole; leave it out", param="stream")
        if data.get("url") == CHAT_URL:
            return self._protocol.chat_completion(validate_request(ChatCompletionRequest, body), request_id)
        if data.get("url") == COMPLETION_URL:
            return self._protocol.completion(validate_request(CompletionRequest, body), request_id)
        raise ApiError(
            404, f"url is {describe(data.get('url'))}; there are {CHAT_URL} and {COMPLETION_URL}", param="url"
        )


class BatchWork(LineWork):
    """A line of a batch file."""

    def __init__(self, line: Line, request_id: str, answer: Answer) -> None:
        super().__init__(line)
        self._data = line_object(line)
        self._request_id, self._answer = request_id, answer
        self._answering: Answering | None = None

    def prepare(self) -> Sequence[GenerationRequest]:
        """See :meth:`LineWork.prepare`."""
        self._answering = self._answer(self._data, self._request_id)
        return self._answering.requests

    def result(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """See :meth:`LineWork.result`."""
        if self._answering is None:
            raise RuntimeError("a result is asked for before the requests")
        return self._line(200, self._answering.response(outputs))

    def refusal(self, error: Exception) -> dict[str, Any]:
        """See :meth:`LineWork.refusal`."""
        told = api_error(error)
        if told.status >= 500:
            cause = error.__cause__ or error
            note(f"line {self.line.number}: unexpected {type(cause).__name__}: {cause}")
        return self._line(told.status, told.body())

    def _line(self, status: int, body: dict[str, Any]) -> dict[str, Any]:
        response = {"status_code": status, "request_id": f"req_{self._request_id}", "body": body}
        custom_id = self._data["custom_id"]
        return {"id": _PREFIX + self._request_id, "custom_id": custom_id, "response": response, "error": None}
