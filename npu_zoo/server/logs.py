"""The server's logs: one line a record, as JSON for machines or as text for terminals."""

from __future__ import annotations

import json
import logging
import math
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from npu_zoo.core.engine import RequestOutput
from npu_zoo.core.errors import UsageError
from npu_zoo.server.timing import RequestTimes

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]

LOGGER = "npu_zoo.server"

MAX_VALUE_LENGTH = 2048
"""Characters of a value, or of a message, that are logged; prompts and outputs that were asked for are whole."""

PRIVATE_FIELDS = ("prompts", "outputs")
"""Fields that ``--log-prompts`` adds."""

_HIDDEN = "***"
_SECRET_NAME = re.compile(r"authorization|cookie|password|secret|api[-_]?key|access[-_]?token|^token$", re.IGNORECASE)
_SECRET = re.compile(
    r"""(?ix)
    (?P<before> \bbearer\s+
      | (?: api[-_]?key | access[-_]?token | authorization | password ) ["']? \s* [=:] \s* ["']?
        (?: (?:bearer|basic|token) \s+ )?
    ) [^\s"'&,;\\]+
    | \bsk-[A-Za-z0-9_-]{8,}"""
)


@dataclass(frozen=True)
class RequestLine:
    """What is known of an HTTP request without its body.

    Attributes:
        route: the route's template; None where none matched.
        seconds: from its arrival to the end of the answer.
        answer_id: as the answer's JSON names itself, such as ``chatcmpl-…``.
        client: the client's address.
        model: the name that was asked for and is served.
        error: the type or code of the error that was answered.
        arrival_time: on the monotonic clock.
    """

    request_id: str
    method: str
    route: str | None
    status: int
    seconds: float
    client: str | None = None
    model: str | None = None
    stream: bool | None = None
    error: str | None = None
    answer_id: str | None = None
    arrival_time: float | None = None


class RequestLog:
    """Logs one line for every request that ended.

    Args:
        prompts: whether prompts' and completions' texts go in.
        quiet: routes that are logged for debugging only while they succeed.
        probes: routes that are logged for debugging only, for their status is of the server and not of the request.
    """

    def __init__(
        self, *, prompts: bool = False, quiet: Sequence[str] = ("/metrics",), probes: Sequence[str] = ("/health",)
    ) -> None:
        self._prompts = prompts
        self._quiet, self._probes = tuple(quiet), tuple(probes)
        self._logger = logging.getLogger(LOGGER)

    def ended(self, line: RequestLine, outputs: Sequence[RequestOutput] = ()) -> None:
        """Log a request with what it generated, one output for each of its prompts."""
        level = self._level(line)
        if self._logger.isEnabledFor(level):
            fields = {**_http_fields(line), **(_generation_fields(outputs, line.arrival_time) if outputs else {})}
            if self._prompts and outputs:
                fields |= _texts(outputs)
            log(self._logger, level, "request", f"{line.method} {line.route or 'no route'} {line.status}", fields)

    def _level(self, line: RequestLine) -> int:
        route = line.route or ""
        if route.startswith(self._probes) or (line.status < 400 and route.startswith(self._quiet)):
            return logging.DEBUG
        return logging.ERROR if line.status >= 500 else logging.INFO


def log(
    logger: logging.Logger,
    level: int,
    event: str,
    message: str,
    fields: Mapping[str, Any] | None = None,
    *,
    error: BaseException | None = None,
) -> None:
    """Log an event with fields of its own; the formats here show them, others the message alone.

    Args:
        event: a name that does not change from record to record, for filters.
        error: its traceback goes along.
    """
    logger.log(level, "%s", message, extra={"event": event, "fields": dict(fields or {})}, exc_info=error)


def logging_config(
    log_format: LogFormat = "text", level: LogLevel = "info", file: Path | None = None
) -> dict[str, Any]:
    """For ``logging.config.dictConfig`` and ``uvicorn.run(log_config=…)``: all loggers in one format, on one handler.

    uvicorn's access lines are left out: :class:`RequestLog` has its own, with the route in place of the path.

    Args:
        file: is appended to, and opened anew after it was moved away; standard error where it is None.

    Raises:
        UsageError: the file cannot be written.
    """
    formatter = JsonFormatter if log_format == "json" else TextFormatter
    handler: dict[str, Any] = {"class": "logging.StreamHandler", "stream": "ext://sys.stderr"}
    if file is not None:
        _refuse_unwritable(file)
        handler = {"class": "logging.handlers.WatchedFileHandler", "filename": str(file), "encoding": "utf-8"}
    own = {"handlers": ["default"], "level": level.upper(), "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"default": {"()": formatter}},
        "handlers": {"default": {**handler, "formatter": "default"}},
        "root": {"handlers": ["default"], "level": "WARNING"},
        "loggers": {
            "npu_zoo": own,
            "uvicorn": own,
            "uvicorn.error": {"level": level.upper()},
            "uvicorn.access": {"handlers": [], "level": "CRITICAL", "propagate": False},
        },
    }


class JsonFormatter(logging.Formatter):
    """One object a line, in ASCII: no value can end the line or begin another."""

    def format(self, record: logging.LogRecord) -> str:
        """See :meth:`logging.Formatter.format`."""
        shown: dict[str, Any] = {**_head(record), "message": _message(record)}
        shown.update({name: value for name, value in _fields(record) if name not in shown})
        if record.exc_info and record.exc_info[1] is not None:
            shown["exception"] = "".join(_traceback(record.exc_info[1]))
        return json.dumps(shown, default=str, allow_nan=False)


class TextFormatter(logging.Formatter):
    """``time level event message name=value …``; control characters are escaped, tracebacks follow indented."""

    def format(self, record: logging.LogRecord) -> str:
        """See :meth:`logging.Formatter.format`."""
        head = _head(record)
        parts = [head["time"], head["level"].upper().ljust(8), head["event"], printable(_message(record))]
        parts += [f"{printable(name)}={_quoted(value)}" for name, value in _fields(record) if value is not None]
        if record.exc_info and record.exc_info[1] is not None:
            parts.append(_indented("".join(_traceback(record.exc_info[1]))))
        return " ".join(parts)


def printable(text: str) -> str:
    """A text on one line: what is no printable character is shown by its escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def without_secrets(text: str) -> str:
    """A text whose credentials are hidden, as far as they can be told: bearer tokens, API keys, passwords."""
    return _SECRET.sub(lambda found: (found["before"] or "") + _HIDDEN, text)


def _head(record: logging.LogRecord) -> dict[str, str]:
    time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
    event = getattr(record, "event", "log")
    head = {"time": time.replace("+00:00", "Z"), "level": record.levelname.lower(), "event": printable(str(event))}
    return head | {"logger": record.name}


def _message(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except Exception:  # arguments that do not fit; the record must not be lost for it
        text = str(record.msg)
    return _cut(without_secrets(text.strip()))


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    for name, value in getattr(record, "fields", {}).items():
        hidden = _SECRET_NAME.search(name) and value is not None
        yield name, _HIDDEN if hidden else _plain(value, whole=name in PRIVATE_FIELDS)


def _plain(value: Any, *, whole: bool = False) -> Any:
    """A value as JSON knows it."""
    if isinstance(value, str):
        return value if whole else _cut(without_secrets(value))
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {
            str(name): _HIDDEN if _SECRET_NAME.search(str(name)) else _plain(inner, whole=whole)
            for name, inner in value.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, whole=whole) for item in value]
    return _cut(without_secrets(str(value)))


def _cut(text: str) -> str:
    over = len(text) - MAX_VALUE_LENGTH
    return text if over <= 0 else f"{text[:MAX_VALUE_LENGTH]}… ({over} more)"


def _quoted(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[^\s\"'=\\]+", value) and value.isprintable():
        return value
    return printable(json.dumps(value, ensure_ascii=False, default=str))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _indented(text: str) -> str:
    return "".join(f"\n    {printable(line)}" for line in text.rstrip("\n").split("\n"))


def _traceback(error: BaseException) -> list[str]:
    """As Python prints it; where pydantic would quote its input, which is a client's, the frames alone."""
    if not any(isinstance(one, ValidationError) for one in _chain(error)):
        return [without_secrets(line) for line in traceback.format_exception(error)]
    told = (
        f"{error.error_count()} validation errors" if isinstance(error, ValidationError) else "after a validation error"
    )
    frames = traceback.format_tb(error.__traceback__)
    return ["Traceback (most recent call last):\n", *frames, f"{type(error).__name__}: {told}\n"]


def _chain(error: BaseException) -> list[BaseException]:
    """An error and those that led to it."""
    chain: list[BaseException] = []
    pending: BaseException | None = error
    while pending is not None and pending not in chain:
        chain.append(pending)
        pending = pending.__cause__ or pending.__context__
    return chain


def _http_fields(line: RequestLine) -> dict[str, Any]:
    return {
        "request_id": line.request_id,
        "answer_id": line.answer_id,
        "method": line.method,
        "route": line.route,
        "status": line.status,
        "client": line.client,
        "model": line.model,
        "stream": line.stream,
        "error": line.error,
        "seconds": line.seconds,
    }


def _generation_fields(outputs: Sequence[RequestOutput], arrival: float | None) -> dict[str, Any]:
    """Sums over prompts, and the times of the one that took longest to each point."""
    times = [RequestTimes.of(output.metrics, arrival) for output in outputs]
    completions = [completion for output in outputs for completion in output.outputs]
    return {
        "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "completion_tokens": sum(len(completion.token_ids) for completion in completions),
        "cached_tokens": sum(output.metrics.cached_tokens for output in outputs),
        "finish_reasons": [completion.finish_reason for completion in completions],
        "preemptions": sum(output.metrics.preemptions for output in outputs),
        "queue_seconds": _longest([one.queue for one in times]),
        "ttft_seconds": _longest([one.time_to_first_token for one in times]),
        "total_seconds": _longest([one.total for one in times]),
    }


def _longest(durations: Sequence[float | None]) -> float | None:
    known = [duration for duration in durations if duration is not None]
    return max(known) if known else None


def _texts(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    return {
        "prompts": [output.prompt for output in outputs],
        "outputs": [completion.text for output in outputs for completion in output.outputs],
    }


def _refuse_unwritable(file: Path) -> None:
    try:
        with file.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UsageError(f"cannot write the log to {file}: {error.strerror or error}; name another file") from None
