"""What a client is told of an exception."""

from __future__ import annotations

import json

import pytest

from npu_zoo.core.errors import EngineError, PromptError, PromptLengthError, UsageError, WeightsError
from npu_zoo.protocol.errors import ApiError, api_error


def test_the_body_has_openai_s_form() -> None:
    error = ApiError(404, "no such model", param="model", code="model_not_found")
    told = {"message": "no such model", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    assert error.body() == {"error": told}
    assert api_error(error) is error


@pytest.mark.parametrize("fault", [UsageError("a is wrong"), PromptError("a is wrong")])
def test_a_fault_of_the_request_is_told(fault: Exception) -> None:
    error = api_error(fault)
    assert (error.status, error.message, error.type) == (400, "a is wrong", "invalid_request_error")


def test_a_prompt_that_is_too_long_has_openai_s_code() -> None:
    assert api_error(PromptLengthError("9 of 8 tokens")).code == "context_length_exceeded"


@pytest.mark.parametrize(
    "fault", [RuntimeError("/etc/passwd"), EngineError("rank 3 at /srv"), WeightsError("/srv/w"), KeyError("x")]
)
def test_nothing_is_told_of_a_fault_of_the_server(fault: Exception) -> None:
    error = api_error(fault)
    assert (error.status, error.type, error.param) == (500, "server_error", None)
    assert "/" not in error.message


def test_a_message_can_be_sent_whatever_it_quotes() -> None:
    error = ApiError(400, "this: \ud800", param="\udfff")
    json.dumps(error.body(), ensure_ascii=False).encode()
    assert "\\ud800" in error.message
