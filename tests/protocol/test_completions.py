"""Completions: prompts of every form, echo, log-probabilities, fill in the middle."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from npu_zoo.core.sampling import SamplingParams
from npu_zoo.protocol.answering import Answering
from npu_zoo.protocol.bodies import validate_request
from npu_zoo.protocol.errors import ApiError
from npu_zoo.protocol.limits import ProtocolLimits
from npu_zoo.protocol.openai import OpenAIProtocol
from npu_zoo.protocol.requests import CompletionRequest


def complete(protocol: OpenAIProtocol, **fields: Any) -> Answering:
    return protocol.completion(validate_request(CompletionRequest, {"model": "served", **fields}), "r")


def refused(protocol: OpenAIProtocol, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        complete(protocol, **fields)
    return caught.value


def test_a_bare_request_has_openai_s_defaults(coder: OpenAIProtocol) -> None:
    (request,) = complete(coder, prompt="def f():").requests
    assert request.sampling_params == SamplingParams(max_tokens=16)
    assert list(request.prompt_token_ids) == coder.encoder.encode("def f():")
    assert (request.request_id, request.prompt) == ("r", "def f():")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("ab", ["ab"]), (["ab", "c"], ["ab", "c"]), ([5, 6], [[5, 6]]), ([[5, 6], [7]], [[5, 6], [7]])],
)
def test_prompts_of_every_form(coder: OpenAIProtocol, prompt: Any, expected: list[Any]) -> None:
    requests = complete(coder, prompt=prompt).requests
    assert [list(request.prompt_token_ids) for request in requests] == [coder.encoder.encode(p) for p in expected]
    assert len({request.request_id for request in requests}) == len(expected)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": [10**6]}, "prompt", "no token id"),
    ({"prompt": [[]]}, "prompt.0", "at least 1"),
    ({"prompt": ["a"] * 4}, "prompt", "at most 3"),
    ({"prompt": ["a"] * 3, "n": 2}, "n", "at most 4"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "at most 20"),
    ({"prompt": "word " * 5000}, "prompt", "tokens"),
    ({"prompt": ["a", "b"], "max_tokens": 10**6}, "max_tokens", "1000000"),
    ({"prompt": [1], "suffix": "x"}, "suffix", "as text"),
]


@pytest.mark.parametrize(("fields", "param", "message"), WRONG, ids=[f"{f}"[:40] for f, _, _ in WRONG])
def test_what_is_refused_names_the_field(
    coder: OpenAIProtocol, fields: dict[str, Any], param: str, message: str
) -> None:
    error = refused(OpenAIProtocol(coder.encoder, ["served"], ProtocolLimits(max_prompts=3, max_sequences=4)), **fields)
    assert (error.status, error.param) == (400, param)
    assert message in error.message


def test_the_default_is_cut_to_the_room_that_is_left(coder: OpenAIProtocol) -> None:
    ids = [5] * (coder.encoder.max_model_len - 3)
    assert complete(coder, prompt=ids).requests[0].sampling_params.max_tokens == 3
    assert refused(coder, prompt=ids, max_tokens=4).code == "context_length_exceeded"


def test_a_hole_is_filled_in_the_family_s_own_format(coder: OpenAIProtocol) -> None:
    request = complete(coder, prompt="def f(", suffix="return x").requests[0]
    assert list(request.prompt_token_ids) == coder.encoder.render_fim("def f(", "return x")


def test_a_model_that_cannot_fill_in_says_so(caller: OpenAIProtocol) -> None:
    assert refused(caller, prompt="def f(", suffix="return x").param == "suffix"


def test_echo_and_logprobs_put_the_prompt_first(coder: OpenAIProtocol, fake: ModuleType) -> None:
    answering = complete(coder, prompt="déf", echo=True, logprobs=1)
    assert answering.requests[0].sampling_params.prompt_logprobs == 1
    generated = fake.Generated(coder, answering, [["é x"]])
    (choice,) = fake.checked_completion(answering.response(generated.final()))["choices"]
    assert choice["text"] == "défé x"
    logprobs = choice["logprobs"]
    ids = [*answering.requests[0].prompt_token_ids, *generated.ids[0][0]]
    tokenizer = coder.encoder.need_tokenizer("tests")
    assert logprobs["tokens"] == [tokenizer.token_text(id_) for id_ in ids]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(token in top for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True))
    assert logprobs["text_offset"][0] == logprobs["text_offset"][1] == 0  # bos has no text
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        if "\ufffd" not in token and not token.startswith("<｜"):
            assert choice["text"].startswith(token, offset)


def test_a_prompt_can_be_scored_without_a_completion(coder: OpenAIProtocol, fake: ModuleType) -> None:
    answering = complete(coder, prompt="def f():", echo=True, logprobs=0, max_tokens=0)
    assert answering.requests[0].sampling_params.max_tokens == 1
    response = answering.response(fake.Generated(coder, answering, [["x"]], finish="length").final())
    (choice,) = fake.checked_completion(response)["choices"]
    used = len(answering.requests[0].prompt_token_ids)
    assert (choice["text"], choice["finish_reason"]) == ("def f():", "length")
    assert len(choice["logprobs"]["tokens"]) == used
    assert (response["usage"]["prompt_tokens"], response["usage"]["completion_tokens"]) == (used, 0)


def test_token_ids_are_echoed_as_their_text(coder: OpenAIProtocol, fake: ModuleType) -> None:
    ids = coder.encoder.encode("def f():")
    answering = complete(coder, prompt=ids, echo=True)
    assert answering.response(fake.Generated(coder, answering, [["x"]]).final())["choices"][0]["text"] == "def f():x"


def test_answers_are_numbered_over_all_prompts(coder: OpenAIProtocol, fake: ModuleType) -> None:
    answering = complete(coder, prompt=["a", "b"], n=2)
    response = answering.response(fake.Generated(coder, answering, [["1", "2"], ["3", "4"]]).final())
    assert [(c["index"], c["text"]) for c in response["choices"]] == [(0, "1"), (1, "2"), (2, "3"), (3, "4")]
    assert response["usage"]["prompt_tokens"] == sum(len(r.prompt_token_ids) for r in answering.requests)


def test_the_prompt_s_logprobs_under_vllm_s_name(coder: OpenAIProtocol, fake: ModuleType) -> None:
    answering = complete(coder, prompt="ab", prompt_logprobs=1)
    (choice,) = answering.response(fake.Generated(coder, answering, [["x"]]).final())["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert all({"logprob", "rank", "decoded_token"} == set(entry) for row in rest for entry in row.values())
