"""The small endpoints, and what a checkpoint says of defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import Model

from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import ConfigError, WeightsError
from npu_zoo.dispatch import resolve
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.protocol.bodies import validate_request
from npu_zoo.protocol.errors import ApiError
from npu_zoo.protocol.generation_config import generation_defaults
from npu_zoo.protocol.openai import OpenAIProtocol
from npu_zoo.protocol.requests import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest


def test_models_are_listed_as_openai_does(coder: OpenAIProtocol) -> None:
    protocol = OpenAIProtocol(coder.encoder, ["one", "two"])
    found = protocol.models()
    assert found["object"] == "list"
    assert [Model.model_validate(entry).id for entry in found["data"]] == ["one", "two"]
    assert protocol.model("two") == found["data"][1]
    with pytest.raises(ApiError) as caught:
        protocol.model("three")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_a_model_is_served_under_some_name(coder: OpenAIProtocol) -> None:
    with pytest.raises(ConfigError):
        OpenAIProtocol(coder.encoder, [])


def test_text_becomes_tokens_and_comes_back(coder: OpenAIProtocol) -> None:
    found = coder.tokenize(validate_request(TokenizeRequest, {"prompt": "def é", "return_token_strs": True}))
    assert found["tokens"] == coder.encoder.encode("def é")
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == coder.encoder.max_model_len
    tokens = validate_request(DetokenizeRequest, {"tokens": found["tokens"]})
    assert coder.detokenize(tokens) == {"prompt": "def é"}


def test_a_text_can_be_counted_without_what_begins_it(coder: OpenAIProtocol) -> None:
    bare = coder.tokenize(validate_request(TokenizeRequest, {"prompt": "a", "add_special_tokens": False}))
    assert bare["tokens"] == coder.encoder.encode("a", add_special_tokens=False)
    assert coder.tokenize(validate_request(TokenizeRequest, {"prompt": "", "add_special_tokens": False}))["count"] == 0


def test_a_conversation_is_counted_as_it_would_run(coder: OpenAIProtocol) -> None:
    messages = [{"role": "user", "content": "x"}]
    for opened in (True, False):
        body = {"messages": messages, "add_generation_prompt": opened}
        found = coder.tokenize(validate_request(TokenizeRequest, body))
        assert found["tokens"] == coder.encoder.render_chat(messages, add_generation_prompt=opened)


def test_ids_beyond_the_vocabulary_are_refused(coder: OpenAIProtocol) -> None:
    size = coder.encoder.config.model_config.vocab_size
    with pytest.raises(ApiError, match=f"tokens holds {size}, which is no token id") as caught:
        coder.detokenize(validate_request(DetokenizeRequest, {"tokens": [1, size]}))
    assert (caught.value.status, caught.value.param) == (400, "tokens")


def test_without_a_tokenizer_token_ids_are_all_there_is() -> None:
    protocol = OpenAIProtocol(
        PromptEncoder(resolve(EngineArgs(model="deepseek_coder", skip_tokenizer_init=True))), ["m"]
    )
    ids = validate_request(CompletionRequest, {"model": "m", "prompt": [5, 6]})
    assert list(protocol.completion(ids, "r").requests[0].prompt_token_ids) == [5, 6]
    chat = validate_request(ChatCompletionRequest, {"model": "m", "messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(ApiError) as caught:
        protocol.chat_completion(chat, "r")
    assert caught.value.status == 400
    with pytest.raises(ApiError) as caught:
        protocol.detokenize(validate_request(DetokenizeRequest, {"tokens": [1]}))
    assert caught.value.status == 400


def test_no_path_of_the_server_is_told() -> None:
    encoder = PromptEncoder(resolve(EngineArgs(model="deepseek_coder")))
    tokenizer = encoder.need_tokenizer("tests")
    tokenizer.chat_template_source = None
    tokenizer._added = {}
    protocol = OpenAIProtocol(encoder, ["m"])
    chat = validate_request(ChatCompletionRequest, {"model": "m", "messages": [{"role": "user", "content": "x"}]})
    fill = validate_request(CompletionRequest, {"model": "m", "prompt": "x", "suffix": "y"})
    for call, request in ((protocol.chat_completion, chat), (protocol.completion, fill)):
        with pytest.raises(ApiError) as caught:
            call(request, "r")
        assert str(tokenizer.directory) not in caught.value.message


def save(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(config), "utf-8")
    return directory


def test_a_checkpoint_says_how_it_is_sampled_best(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == {}
    said = {"temperature": 0.6, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.05, "min_p": None}
    found = generation_defaults(save(tmp_path, {**said, "eos_token_id": 1, "do_sample": True, "max_new_tokens": 9}))
    assert found == {"temperature": 0.6, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.05}


def test_r1_s_own_defaults(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "configs" / "deepseek-r1.generation_config.json"
    found = generation_defaults(save(tmp_path, json.loads(source.read_text("utf-8"))))
    assert found == {"temperature": 0.6, "top_p": 0.95}


@pytest.mark.parametrize("config", [{"temperature": -1}, {"top_p": "much"}])
def test_defaults_that_no_request_could_have(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=r"generation_config\.json"):
        generation_defaults(save(tmp_path, config))
