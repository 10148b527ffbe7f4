"""What a server answers beside OpenAI's API: single prompts, tokens, health, metrics, ids."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families

import npu_zoo
from npu_zoo import LLM, SamplingParams
from npu_zoo.testing.serving import RunningServer

MODEL = "deepseek_v3:demo"
PROMPT = "def add(a, b):"
MADE = re.compile(r"[0-9a-f]{32}")


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


def messages_of(events: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in events.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_single_prompt_is_answered_as_a_conversation(http: httpx.Client, oracle: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=30)
    expected = oracle.chat([{"role": "user", "content": PROMPT}], params)[0]
    answer = http.post("/chat", json={"prompt": PROMPT, "temperature": 0, "max_tokens": 30})
    assert answer.status_code == 200
    found = answer.json()
    assert (found["object"], found["model"]) == ("chat.completion", MODEL)
    assert found["choices"][0]["message"] == {"role": "assistant", "content": expected.outputs[0].text}
    assert found["choices"][0]["finish_reason"] == expected.outputs[0].finish_reason
    assert found["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)


def test_an_answer_may_be_as_long_as_the_model_has_room_for(http: httpx.Client) -> None:
    found = http.post("/chat", json={"prompt": PROMPT, "temperature": 0}).json()
    assert found["choices"][0]["message"]["content"]
    assert found["choices"][0]["finish_reason"] in ("stop", "length")


def test_single_prompts_that_come_together(http: httpx.Client) -> None:
    bodies = [{"prompt": f"数 {number}", "temperature": 0, "max_tokens": 8} for number in range(8)]
    alone = [http.post("/chat", json=body).json()["choices"] for body in bodies]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda body: http.post("/chat", json=body).json()["choices"], bodies))
    assert together == alone


def test_a_single_prompt_can_be_streamed(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    whole = http.post("/chat", json=body).json()["choices"][0]["message"]["content"]
    chunks = messages_of(http.post("/chat", json={**body, "stream": True}).text)
    assert "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]) == whole


WRONG: dict[str, tuple[bytes, int, str]] = {
    "no prompt": (b"{}", 400, "prompt is required"),
    "empty prompt": (b'{"prompt": ""}', 400, "prompt must have at least 1 characters"),
    "a number": (b'{"prompt": 5}', 400, "prompt must be a string, not 5"),
    "no JSON": (b"prompt", 400, "the body is not JSON"),
    "a list": (b'["a"]', 400, "the body is a JSON object, not a list"),
    "too long": (json.dumps({"prompt": "word " * 3000}).encode(), 400, "the prompt has 9003 tokens"),
    "another model": (b'{"prompt": "a", "model": "b"}', 404, "no model 'b' is served here"),
}


@pytest.mark.parametrize(("body", "status", "message"), WRONG.values(), ids=WRONG)
def test_a_single_prompt_that_is_wrong(http: httpx.Client, body: bytes, status: int, message: str) -> None:
    answer = http.post("/chat", content=body, headers={"Content-Type": "application/json; charset=utf-8"})
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert answer.json()["error"].startswith(message)


@pytest.mark.parametrize("text", ["def f(x):\n    return x", "héllo 数 🦊", " \n\t", "a" * 5000, ""])
def test_tokens_of_a_text(http: httpx.Client, oracle: LLM, text: str) -> None:
    tokenizer = oracle.engine.prompts.tokenizer  # type: ignore[attr-defined]
    found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer.encode(text)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 2048)
    assert len(found["token_strs"]) == found["count"]
    bare = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert bare == tokenizer.encode(text, add_special_tokens=False)
    for tokens in (found["tokens"], bare):
        assert http.post("/detokenize", json={"tokens": tokens, "model": MODEL}).json() == {"prompt": text}


def test_tokens_of_a_conversation(http: httpx.Client, oracle: LLM) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    found = http.post("/tokenize", json={"messages": messages, "model": MODEL}).json()
    assert found["tokens"] == oracle.engine.render_chat(messages)
    closed = http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert closed["tokens"] == oracle.engine.render_chat(messages, add_generation_prompt=False)
    completion = http.post(
        "/v1/completions", json={"model": MODEL, "prompt": found["tokens"], "temperature": 0, "max_tokens": 9}
    )
    conversation = http.post(
        "/v1/chat/completions", json={"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 9}
    )
    assert completion.json()["choices"][0]["text"] == conversation.json()["choices"][0]["message"]["content"]


def test_models_by_name(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == [MODEL, "deepseek_v3"]
    assert http.get(f"/v1/models/{MODEL}").json() == listed["data"][0]
    unknown = http.get("/v1/models/org/model")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"
    assert "'org/model'" in unknown.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/health/live"])
def test_health(http: httpx.Client, path: str) -> None:
    assert http.get(path).json() == {"status": "ok"}
    head = http.head(path)
    assert (head.status_code, head.content) == (200, b"")


def test_the_version(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": npu_zoo.__version__}


def test_an_id_goes_with_every_answer(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 2}
    for path, sent in (("/v1/completions", body), ("/v1/completions", {**body, "stream": True}), ("/nowhere", {})):
        named = http.post(path, json=sent, headers={"X-Request-Id": "client-7:a/b"})
        assert named.headers["x-request-id"] == "client-7:a/b"
        made = [http.post(path, json=sent, headers={"X-Request-Id": "a b"}).headers["x-request-id"] for _ in "ab"]
        assert made[0] != made[1]
        assert all(MADE.fullmatch(one) for one in made)


def counts(http: httpx.Client) -> Counter[tuple[str, ...]]:
    """Samples by their names and the values of their labels but the model's."""
    found: Counter[tuple[str, ...]] = Counter()
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            labels = [value for name, value in sorted(sample.labels.items()) if name not in ("model_name", "le")]
            if "le" not in sample.labels:
                found[(sample.name, *labels)] = sample.value  # type: ignore[assignment]
    return found


def test_metrics_grow_by_what_was_sent(untouched_server: RunningServer) -> None:
    with httpx.Client(base_url=untouched_server.url, timeout=60) as http:
        check_growth(http)


def check_growth(http: httpx.Client) -> None:
    before = counts(http)
    completion = {"model": MODEL, "prompt": [5, 6, 7, 8], "max_tokens": 6, "ignore_eos": True}
    http.post("/v1/completions", json=completion).raise_for_status()
    http.post("/v1/completions", json={**completion, "n": 2, "stream": True}).raise_for_status()
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "ignore_eos": True}
    prompt_tokens = http.post("/v1/chat/completions", json=chat).json()["usage"]["prompt_tokens"]
    http.post("/chat", json={"prompt": "a", "max_tokens": 1}).raise_for_status()
    http.post("/tokenize", json={"prompt": "a"}).raise_for_status()
    assert http.post("/v1/completions", json={"model": MODEL, "prompt": []}).status_code == 400
    assert http.post("/v1/chat/completions", content=b"{}").status_code == 415

    expected = {
        ("request_received_total",): 4,
        ("request_success_total",): 4,
        ("npu_zoo_requests_received_total", "completion"): 2,
        ("npu_zoo_requests_received_total", "chat"): 1,
        ("npu_zoo_requests_received_total", "simple_chat"): 1,
        ("npu_zoo_requests_rejected_total", "invalid"): 2,
        ("vllm:request_success_total", "length"): 4,
        ("vllm:prompt_tokens_total",): 4 + 4 + prompt_tokens + prompt_tokens,
        ("vllm:generation_tokens_total",): 6 + 2 * 6 + 3 + 1,
        ("vllm:time_to_first_token_seconds_count",): 4,
        ("vllm:e2e_request_latency_seconds_count",): 4,
        ("vllm:request_params_n_sum",): 5,
        ("npu_zoo_http_requests_total", "POST", "/v1/completions", "200"): 2,
        ("npu_zoo_http_requests_total", "POST", "/v1/completions", "400"): 1,
        ("npu_zoo_http_requests_total", "POST", "/v1/chat/completions", "415"): 1,
        ("npu_zoo_http_requests_total", "POST", "/tokenize", "200"): 1,
        ("npu_zoo_requests_failed_total", "engine_error"): 0,
    }
    deadline = time.monotonic() + 10
    while wrong := {name: grown for name in expected if (grown := counts(http)[name] - before[name]) != expected[name]}:
        assert time.monotonic() < deadline, wrong
        time.sleep(0.05)


def test_metrics_in_both_formats(http: httpx.Client) -> None:
    plain = http.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    assert len(list(text_string_to_metric_families(plain.text))) > 40
    accepted = http.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0, text/plain;q=0.5"})
    assert accepted.headers["content-type"].startswith("application/openmetrics-text; version=")
    assert len(list(read_openmetrics(accepted.text))) > 40
