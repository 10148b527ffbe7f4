"""Requests as they are sent: what is asked, and the members that every one of them has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.serving.work import ROUTES, Ask, Endpoint

_OURS = {"stream": "times are of streamed answers", "n": "times are of one answer a request", "best_of": ""}
_OURS |= {"prompt": "the work says it", "messages": "the work says it"}


@dataclass(frozen=True)
class RequestForm:
    """What requests to a server have beside their work.

    Attributes:
        ignore_eos: whether answers go on to their full length.
        include_usage: whether the server is asked for its count of tokens.
        extra_body: further members, over all others.
    """

    endpoint: Endpoint
    model: str
    ignore_eos: bool = False
    include_usage: bool = True
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def route(self) -> str:
        """The route below ``/v1``."""
        return ROUTES[self.endpoint]

    def encode(self, ask: Ask) -> bytes:
        """A request's body."""
        body: dict[str, Any] = {"model": self.model, **ask.body(self.endpoint), "temperature": 0, "stream": True}
        if self.include_usage:
            body["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            body["ignore_eos"] = True
        return json.dumps({**body, **self.extra_body}).encode()


def parse_extra_body(text: str) -> dict[str, Any]:
    """The members of ``--extra-body``.

    Raises:
        UsageError: it is no JSON object, or has a member that measuring rests on.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--extra-body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise UsageError(f'--extra-body takes an object such as {{"top_p": 0.9}}, not {text}')
    for name in _OURS.keys() & body.keys():
        raise UsageError(f"--extra-body has {name}, which stays as it is: {_OURS[name]}".rstrip(": "))
    return body
