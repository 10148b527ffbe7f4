"""Requests made from the server's own OpenAPI document, and answers held against it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.schemas import APIOperation, BaseSchema

from npu_zoo.testing.serving import RunningServer

MODEL = "deepseek_v3:demo"
SHORT = ("--max-model-len", "64", "--max-num-seqs", "8", "--max-queue", "16", "--request-timeout", "0.5")
READINGS = ("/health", "/health/live", "/health/ready", "/version", "/metrics", "/v1/models")
BODIES = ("/v1/chat/completions", "/v1/completions", "/chat", "/tokenize", "/detokenize")
NAMED = "/v1/models/{model}"
SHARE = 8  # of the profile's examples


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    options = ("--model", MODEL, "--dtype", "float32", "--threads", "1", "--log-level", "error", *SHORT)
    with RunningServer(options) as server:
        yield server


@pytest.fixture(scope="module")
def api(server: RunningServer) -> BaseSchema:
    load_all_checks()
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.fixture(autouse=True)
def _still_the_same(server: RunningServer) -> Iterator[None]:
    processes = server.children
    yield
    assert server.children == processes
    assert server.get("/health/ready") == (200, {"status": "ok"})


def operation(api: BaseSchema, path: str, method: str) -> APIOperation:
    return api[path][method]


def check(
    op: APIOperation, mode: GenerationMode, change: Callable[[Any], Any] | None = None, examples: int | None = None
) -> Counter[int]:
    """How many of the requests that the document asks for were answered with which status."""
    found: Counter[int] = Counter()
    # What one field says of another, or of the model, no schema says; so a body that keeps its schema may be refused.
    excluded = CHECKS.get_by_names(["positive_data_acceptance"])

    @settings(max_examples=examples or settings().max_examples // SHARE, suppress_health_check=list(HealthCheck))
    @given(case=op.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        if change is not None:
            case.body = change(case.body)
        response = case.call(timeout=60)
        found[response.status_code] += 1
        case.validate_response(response, excluded_checks=excluded)

    run()
    return found


def with_whole_numbers(value: Any) -> Any:
    """JSON Schema takes 2.0 for an integer, and this server does not."""
    if isinstance(value, list):
        return [with_whole_numbers(entry) for entry in value]
    if isinstance(value, dict):
        return {key: with_whole_numbers(entry) for key, entry in value.items()}
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else value


DROPPED = ("best_of", "chat_template_kwargs", "logit_bias", "min_tokens", "stop", "stop_token_ids", "suffix")
"""Fields whose random values nearly always contradict others, or the model; tests of their own send them."""

MOST = {"n": 3, "max_tokens": 12, "max_completion_tokens": 12, "prompt_logprobs": 3, "top_logprobs": 3}


def plausible(body: dict[str, Any]) -> dict[str, Any]:
    """A body without the contradictions that most random ones have."""
    body = {name: value for name, value in with_whole_numbers(body).items() if name not in DROPPED}
    for name, most in MOST.items():
        if body.get(name) is not None:
            body[name] = min(max(body[name], 1), most)
    if body.get("model") is not None:
        body["model"] = MODEL
    if "tokens" in body:
        body["tokens"] = [token_id % 1024 for token_id in body["tokens"]]
    if body.get("structured_outputs") is not None:
        body["structured_outputs"] = {"regex": body["structured_outputs"].get("regex") or "[a-c]{3}"}
        body.pop("response_format", None)
    body.pop("prompt_logprobs" if body.get("stream") else "stream_options", None)
    body.pop("max_completion_tokens" if body.get("max_tokens") else "max_tokens", None)
    return of_messages(body) if body.get("messages") else of_prompt(body)


def of_messages(body: dict[str, Any]) -> dict[str, Any]:
    kept = [{"role": message["role"], "content": "a"} for message in body["messages"] if message["role"] != "tool"]
    body["messages"] = kept[:3] or [{"role": "user", "content": "def f(x):"}]
    left_out = {"prompt", "tools", "tool_choice"} | (set() if body.get("logprobs") else {"top_logprobs"})
    return {name: value for name, value in body.items() if name not in left_out}


def of_prompt(body: dict[str, Any]) -> dict[str, Any]:
    if body.get("logprobs") is not None:
        body["logprobs"] = min(body["logprobs"], 5)
    if "tokens" not in body and not isinstance(body.get("prompt"), str):
        body["prompt"] = "def f(x):"
    return {name: value for name, value in body.items() if name not in ("messages", "tools")}


def test_the_document_has_every_path(api: BaseSchema) -> None:
    found = {result.ok().label for result in api.get_all_operations()}
    expected = {f"GET {path}" for path in (*READINGS, NAMED)} | {f"POST {path}" for path in BODIES}
    assert found == expected


@pytest.mark.parametrize("path", READINGS)
def test_readings(api: BaseSchema, path: str) -> None:
    assert set(check(operation(api, path, "GET"), GenerationMode.POSITIVE, examples=2)) == {200}


def test_names_of_models(api: BaseSchema) -> None:
    assert set(check(operation(api, NAMED, "GET"), GenerationMode.POSITIVE)) == {404}


@pytest.mark.parametrize("path", BODIES)
def test_bodies_that_keep_their_schema(api: BaseSchema, path: str) -> None:
    check(operation(api, path, "POST"), GenerationMode.POSITIVE, with_whole_numbers)


@pytest.mark.parametrize("path", BODIES)
def test_bodies_without_contradictions_are_answered(api: BaseSchema, path: str) -> None:
    found = check(operation(api, path, "POST"), GenerationMode.POSITIVE, plausible)
    assert found[200] > 0.9 * sum(found.values()), found


@pytest.mark.parametrize("path", BODIES)
def test_bodies_that_break_their_schema(api: BaseSchema, path: str) -> None:
    assert not {status for status in check(operation(api, path, "POST"), GenerationMode.NEGATIVE) if status < 400}
