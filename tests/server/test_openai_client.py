"""The official client of OpenAI's API against a server; the same model in this process says what it has to answer."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jsonschema_rs
import pytest
from openai import (
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    OpenAI,
    RateLimitError,
)
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob
from pydantic import BaseModel, Field

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.engine import CompletionOutput
from npu_zoo.testing.serving import RunningServer

MODEL = "deepseek_v3:demo"
CODER = "deepseek_coder:demo"
CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def add(a, b):"}]
PROMPT = "def read_lines(path):\n"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 9}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA, "strict": True}}
NOW: Any = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def complete(oracle: LLM, prompt: Any, **params: Any) -> list[CompletionOutput]:
    return oracle.generate(prompt, SamplingParams(**params))[0].outputs


def converse(oracle: LLM, **params: Any) -> list[CompletionOutput]:
    return oracle.chat(CHAT, SamplingParams(**params))[0].outputs


def joined(chunks: Iterable[ChatCompletionChunk], number: int = 0) -> str:
    return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == number)


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "deepseek_v3"]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(NotFoundError, match=r"no model 'gpt-4o' is served here; served: deepseek_v3:demo"):
        client.models.retrieve("gpt-4o")


PARAMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({"temperature": 0, "max_completion_tokens": 24}, {"temperature": 0, "max_tokens": 24}),
    "seeded": ({"seed": 5, "n": 3, "max_tokens": 16}, {"seed": 5, "n": 3, "max_tokens": 16}),
    "stopped": (
        {"temperature": 0, "max_tokens": 60, "stop": ["(", "nothing"]},
        {"temperature": 0, "max_tokens": 60, "stop": ["("]},
    ),
    "penalties": (
        {"seed": 1, "presence_penalty": 1.5, "frequency_penalty": 0.5, "top_p": 0.7, "max_tokens": 20},
        {"seed": 1, "presence_penalty": 1.5, "frequency_penalty": 0.5, "top_p": 0.7, "max_tokens": 20},
    ),
    "more than OpenAI's": (
        {"seed": 2, "max_tokens": 20, "extra_body": {"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.3}},
        {"seed": 2, "max_tokens": 20, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.3},
    ),
}


@pytest.mark.parametrize(("fields", "params"), PARAMS.values(), ids=PARAMS)
def test_chat(client: OpenAI, oracle: LLM, fields: dict[str, Any], params: dict[str, Any]) -> None:
    expected = converse(oracle, **params)
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, **fields)
    assert isinstance(answer, ChatCompletion)
    assert [choice.index for choice in answer.choices] == list(range(len(expected)))
    assert [choice.message.content for choice in answer.choices] == [output.text for output in expected]
    assert [choice.finish_reason for choice in answer.choices] == [output.finish_reason for output in expected]
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(oracle.engine.render_chat(CHAT))
    assert answer.usage.completion_tokens == sum(len(output.token_ids) for output in expected)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize(("fields", "params"), PARAMS.values(), ids=PARAMS)
def test_streamed_chat(client: OpenAI, oracle: LLM, fields: dict[str, Any], params: dict[str, Any]) -> None:
    expected = converse(oracle, **params)
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=MODEL, messages=CHAT, **options, **fields))
    assert [joined(chunks, number) for number in range(len(expected))] == [output.text for output in expected]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    for number, output in enumerate(expected):
        own = [choice for choice in choices if choice.index == number]
        assert [choice.delta.role for choice in own] == ["assistant", *[None] * (len(own) - 1)]
        assert [choice.finish_reason for choice in own] == [*[None] * (len(own) - 1), output.finish_reason]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == sum(len(output.token_ids) for output in expected)


def test_a_stream_has_usage_only_where_it_is_asked_for(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=3, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    options: Any = {"continuous_usage_stats": True}
    counted = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=5, stream=True, stream_options=options, extra_body={"ignore_eos": True}
    )
    usages = [chunk.usage for chunk in counted]
    counts = [usage.completion_tokens for usage in usages if usage is not None]
    # A chunk may have several tokens where the reader is slow.
    assert len(counts) == len(usages) > 1
    assert counts == sorted(counts)
    assert counts[-1] == 5


def same_logprobs(found: list[ChatCompletionTokenLogprob], oracle: LLM, output: CompletionOutput) -> None:
    assert output.logprobs is not None
    tokenizer = oracle.engine.prompts.tokenizer  # type: ignore[attr-defined]
    assert len(found) == len(output.token_ids)
    for entry, token_id, known in zip(found, output.token_ids, output.logprobs, strict=True):
        assert bytes(entry.bytes or []) == tokenizer.token_bytes(token_id)
        assert entry.logprob == pytest.approx(known[token_id].logprob, abs=1e-5)
        best = sorted(known.values(), key=lambda one: one.rank)[:3]
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx([one.logprob for one in best], abs=1e-5)
        assert [top.token for top in entry.top_logprobs] == [one.decoded_token for one in best]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(client: OpenAI, oracle: LLM, stream: bool) -> None:
    expected = converse(oracle, seed=3, n=2, max_tokens=12, logprobs=3)
    answer: Any = client.chat.completions.create(
        model=MODEL, messages=CHAT, seed=3, n=2, max_tokens=12, logprobs=True, top_logprobs=3, stream=stream
    )
    pieces = answer if stream else [answer]
    found: dict[int, list[ChatCompletionTokenLogprob]] = {0: [], 1: []}
    for piece in pieces:
        for choice in piece.choices:
            found[choice.index] += (choice.logprobs and choice.logprobs.content) or []
    for output in expected:
        same_logprobs(found[output.index], oracle, output)


PROMPTS: dict[str, Any] = {
    "text": PROMPT,
    "texts": ["def f(x):", "class Stack:\n", "import os\n"],
    "ids": [1019, 5, 6, 7],
    "lists": [[1019, 5], [6, 7, 8]],
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_completions(client: OpenAI, oracle: LLM, prompt: Any, stream: bool) -> None:
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    params = SamplingParams(seed=4, n=2, max_tokens=10)
    expected = [output for one in oracle.generate(prompts, params) for output in one.outputs]
    answer: Any = client.completions.create(model=MODEL, prompt=prompt, seed=4, n=2, max_tokens=10, stream=stream)
    texts, ends = [""] * len(expected), [""] * len(expected)
    for piece in answer if stream else [answer]:
        for choice in piece.choices:
            texts[choice.index] += choice.text
            ends[choice.index] += choice.finish_reason or ""
    assert texts == [output.text for output in expected]
    assert ends == [output.finish_reason for output in expected]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_echo_with_log_probabilities(client: OpenAI, oracle: LLM, stream: bool) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=2, prompt_logprobs=2)
    expected = oracle.generate(PROMPT, params)[0]
    answer: Any = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=8, echo=True, logprobs=2, stream=stream
    )
    choices = [choice for piece in (answer if stream else [answer]) for choice in piece.choices]
    text = "".join(choice.text for choice in choices)
    assert text == PROMPT + expected.outputs[0].text
    logprobs = [choice.logprobs for choice in choices if choice.logprobs]
    tokens = [token for one in logprobs for token in one.tokens]
    offsets = [offset for one in logprobs for offset in one.text_offset]
    values = [value for one in logprobs for value in one.token_logprobs]
    assert len(tokens) == len(expected.prompt_token_ids) + 8
    known = [*(expected.prompt_logprobs or []), *(expected.outputs[0].logprobs or [])]
    ids = [*expected.prompt_token_ids, *expected.outputs[0].token_ids]
    assert values[0] is None
    assert values[1:] == pytest.approx(
        [entry[id_].logprob for entry, id_ in zip(known[1:], ids[1:], strict=True)], abs=1e-5
    )  # type: ignore[index]
    # The first token begins the text and is no part of it.
    for token, offset, following in zip(tokens[1:], offsets[1:], [*offsets[2:], len(text)], strict=True):
        assert text[offset:following] == token
    assert all(len(top) in (2, 3) for one in logprobs for top in one.top_logprobs if top)


def test_a_prompt_is_scored_without_a_completion(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == PROMPT
    assert answer.choices[0].logprobs is not None
    assert "".join((answer.choices[0].logprobs.tokens or [])[1:]) == PROMPT
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def arguments_keep(name: str, arguments: str) -> bool:
    schema = SCHEMA if name == "get_weather" else {"type": "object", "maxProperties": 0}
    return bool(jsonschema_rs.is_valid(schema, json.loads(arguments)))


CHOICES: dict[str, tuple[Any, set[str]]] = {
    "required": ("required", {"get_weather", "now"}),
    "named": ({"type": "function", "function": {"name": "get_weather"}}, {"get_weather"}),
}


@pytest.mark.parametrize(("choice", "names"), CHOICES.values(), ids=CHOICES)
def test_enforced_tool_calls(client: OpenAI, choice: Any, names: set[str]) -> None:
    body: Any = {"model": MODEL, "messages": CHAT, "tools": [WEATHER, NOW], "tool_choice": choice}
    body |= {"seed": 6, "max_tokens": 300, "parallel_tool_calls": False}
    answer = client.chat.completions.create(**body).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    (call,) = answer.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name in names
    assert arguments_keep(call.function.name, call.function.arguments)

    with client.chat.completions.stream(**body) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.done" in kinds
    assert streamed.finish_reason == "tool_calls"
    (same,) = streamed.message.tool_calls or []
    assert (same.function.name, same.function.arguments) == (call.function.name, call.function.arguments)
    if call.function.name == "get_weather":
        assert same.function.parsed_arguments == json.loads(call.function.arguments)


def test_several_calls_at_once(client: OpenAI) -> None:
    body: Any = {"model": MODEL, "messages": CHAT, "tools": [WEATHER, NOW], "tool_choice": "required"}
    answer = client.chat.completions.create(**body, seed=1, max_tokens=600).choices[0]
    calls = answer.message.tool_calls or []
    assert len(calls) > 1
    assert len({call.id for call in calls}) == len(calls)
    assert all(
        call.type == "function" and arguments_keep(call.function.name, call.function.arguments) for call in calls
    )


def test_a_model_may_call_a_tool_or_not(client: OpenAI, oracle: LLM) -> None:
    body: Any = {"model": MODEL, "messages": CHAT, "tools": [WEATHER, NOW], "max_tokens": 300, "seed": 6}
    free = client.chat.completions.create(**body, tool_choice="auto").choices[0]
    assert free.message.tool_calls is None
    assert free.finish_reason in ("stop", "length")

    # A bias for the token that calls begin with makes the model want one.
    begin = oracle.engine.prompts.tokenizer.encode("<｜tool▁calls▁begin｜>", add_special_tokens=False)[0]  # type: ignore[attr-defined]
    body |= {"response_format": {"type": "json_object"}, "logit_bias": {str(begin): 100}}
    led = client.chat.completions.create(**body).choices[0]
    assert led.finish_reason == "tool_calls"
    calls = led.message.tool_calls or []
    assert calls
    assert all(
        call.type == "function" and arguments_keep(call.function.name, call.function.arguments) for call in calls
    )


def test_no_tool_is_called_where_none_is_to_be(client: OpenAI, oracle: LLM) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=20
    )
    assert answer.choices[0].message.content == converse(oracle, temperature=0, max_tokens=20)[0].text


def test_the_result_of_a_call_goes_back(client: OpenAI) -> None:
    body: Any = {"model": MODEL, "tools": [WEATHER, NOW], "max_tokens": 400, "seed": 6}
    message = client.chat.completions.create(messages=CHAT, tool_choice="required", **body).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "12 degrees"} for call in message.tool_calls or []]
    answer = client.chat.completions.create(messages=[*CHAT, message, *results], **{**body, "max_tokens": 5})
    assert answer.choices[0].message.content


class Town(BaseModel):
    name: str = Field(max_length=12)
    kind: Literal["town", "village"]
    people: int = Field(ge=1, le=999)
    near: list[Literal["sea", "hill"]] = Field(max_length=2)


def test_an_answer_of_a_pydantic_model(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=CHAT, response_format=Town, seed=1, max_completion_tokens=400
    )
    assert isinstance(answer.choices[0].message.parsed, Town)
    with client.chat.completions.stream(
        model=MODEL, messages=CHAT, response_format=Town, seed=1, max_completion_tokens=400
    ) as stream:
        assert [event.parsed for event in stream if event.type == "content.done"] == [answer.choices[0].message.parsed]


FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "regex": ({"regex": "[a-f]{2,4}-(yes|no)"}, "[a-f]{2,4}-(yes|no)"),
    "choice": ({"choice": ["red", "green", "grün｜"]}, "red|green|grün｜"),
    "grammar": ({"grammar": 'start: "f(" N ("," N)? ")"\nN: /[0-9]{1,3}/'}, r"f\([0-9]{1,3}(,[0-9]{1,3})?\)"),
    "schema": ({"json": {"enum": ["a", 5, None]}}, '"a"|5|null'),
    "schema as text": ({"json": '{"const": [1, 2]}'}, r"\[\s*1\s*,\s*2\s*\]"),
}


@pytest.mark.parametrize(("form", "pattern"), FORMS.values(), ids=FORMS)
def test_outputs_of_a_form(client: OpenAI, form: dict[str, Any], pattern: str) -> None:
    extra = {"structured_outputs": form}
    texts = client.completions.create(model=MODEL, prompt=PROMPT, n=3, seed=2, max_tokens=200, extra_body=extra)
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, seed=2, max_tokens=200, extra_body=extra)
    for text in [*(choice.text for choice in texts.choices), answer.choices[0].message.content or ""]:
        assert re.fullmatch(pattern, text)
    assert answer.choices[0].finish_reason == "stop"


def test_any_json_object(client: OpenAI) -> None:
    for seed in range(4):
        choice = client.chat.completions.create(
            model=MODEL, messages=CHAT, response_format={"type": "json_object"}, seed=seed, max_tokens=60
        ).choices[0]
        text = choice.message.content or ""
        assert text.lstrip().startswith("{")
        assert choice.finish_reason == "length" or isinstance(json.loads(text), dict)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str, str | None, str]] = {
    "model": ({"model": "gpt-4o"}, NotFoundError, "model", "model_not_found", "no model 'gpt-4o' is served here"),
    "range": ({"temperature": 9}, BadRequestError, "temperature", None, "temperature must be at most 2, not 9"),
    "type": ({"max_tokens": "many"}, BadRequestError, "max_tokens", None, 'must be an integer, not "many"'),
    "length": (
        {"max_tokens": 5000}, BadRequestError, "max_tokens", "context_length_exceeded", "where the model takes 2048",
    ),
    "unknown": (
        {"extra_body": {"temprature": 1}}, BadRequestError, "temprature", None, "did you mean temperature?",
    ),
    "form": (
        {"extra_body": {"structured_outputs": {"regex": "("}}}, BadRequestError, "structured_outputs", None, "unclosed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("fields", "kind", "param", "code", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(
    client: OpenAI, fields: dict[str, Any], kind: type[Any], param: str, code: str | None, message: str, stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": CHAT, "stream": stream, **fields})
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")
    assert message in caught.value.message
    assert caught.value.request_id


def test_the_asynchronous_client(server: RunningServer, oracle: LLM) -> None:
    expected = [converse(oracle, seed=seed, max_tokens=12)[0].text for seed in range(8)]

    async def streamed(client: AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(model=MODEL, messages=CHAT, seed=seed, max_tokens=12, stream=True)
        return joined([chunk async for chunk in stream])

    async def run() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            assert [model.id async for model in client.models.list()] == [MODEL, "deepseek_v3"]
            with pytest.raises(BadRequestError):
                await client.chat.completions.create(model=MODEL, messages=[])
            return await asyncio.gather(*(streamed(client, seed) for seed in range(8)))

    assert asyncio.run(run()) == expected


REASONER = """
from npu_zoo.api import FamilySpec, FeatureRow, ReasoningFormat, VariantSpec, hookimpl
from npu_zoo.plugins.deepseek_v3 import FAMILY
from npu_zoo.plugins.deepseek_v3.prompts import PROMPT, TOOLS


@hookimpl
def register_families() -> list[FamilySpec]:
    row = FeatureRow(
        sizes=("demo",), hardware=("cpu",), dtype=("float32",), world_size=(1,), attention=("paged",), source="zoo"
    )
    variant = VariantSpec(
        name="demo",
        size="demo",
        bundled="npu_zoo.plugins.deepseek_v3:demo",
        prompt=PROMPT,
        reasoning=ReasoningFormat(start="<｜Assistant｜>", end="("),
        tools=TOOLS,
    )
    return [
        FamilySpec(
            name="reasoner",
            title="The demo model, which reasons from the beginning of its turn to the first parenthesis",
            architectures=FAMILY.architectures,
            model=FAMILY.model,
            variants=(variant,),
            default_variant="demo",
            config_defaults=FAMILY.config_defaults,
            rows=(row,),
        )
    ]
"""


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with keys and limits, of a model that reasons: a plugin as pip leaves it behind."""
    site = tmp_path_factory.mktemp("site")
    (site / "reasoner_plugin.py").write_text(REASONER)
    info = site / "reasoner-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: reasoner\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[npu_zoo]\nreasoner = reasoner_plugin\n")
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {"PYTHONPATH": path, "NPU_ZOO_API_KEY": "secret"}
    names = ("--served-model-name", "reasoner", "--served-model-name", "org/reasoner")
    options = ("--dtype", "float32", "--threads", "1", "--log-level", "error", "--concurrency-limit", "1")
    with RunningServer(("--model", "reasoner", *names, *options), environ) as server:
        yield server


@pytest.fixture(scope="module")
def thinker(reasoner: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{reasoner.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_reasoning_stands_beside_the_answer(thinker: OpenAI) -> None:
    body: Any = {"model": "reasoner", "messages": CHAT, "temperature": 0, "max_tokens": 40}
    answer = thinker.chat.completions.create(**body)
    message, usage = answer.choices[0].message, answer.usage
    tokens = thinker.post("../tokenize", cast_to=object, body={"messages": CHAT})
    raw = thinker.completions.create(model="reasoner", prompt=tokens["tokens"], temperature=0, max_tokens=40)  # type: ignore[index]
    reasoning, _, content = raw.choices[0].text.partition("(")
    assert (message.reasoning_content, message.content) == (reasoning, content)  # type: ignore[attr-defined]
    assert usage is not None
    assert usage.completion_tokens_details is not None
    assert 0 < (usage.completion_tokens_details.reasoning_tokens or 0) < 40

    deltas = [chunk.choices[0].delta for chunk in thinker.chat.completions.create(**body, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == reasoning
    assert "".join(delta.content or "" for delta in deltas) == content

    again = thinker.chat.completions.create(**{**body, "messages": [*CHAT, message, *CHAT[1:]], "max_tokens": 1})
    assert again.usage is not None


def test_a_form_begins_after_the_reasoning(thinker: OpenAI) -> None:
    body: Any = {"model": "reasoner", "messages": CHAT, "temperature": 0, "max_tokens": 300}
    shaped = thinker.chat.completions.create(**body, extra_body={"structured_outputs": {"regex": "yes|no"}})
    assert shaped.choices[0].message.content in ("yes", "no")
    called = thinker.chat.completions.create(**body, tools=[NOW], tool_choice="required", parallel_tool_calls=False)
    message = called.choices[0].message
    assert [call.function.name for call in message.tool_calls or [] if call.type == "function"] == ["now"]
    assert message.reasoning_content  # type: ignore[attr-defined]


def test_a_name_of_several_parts(thinker: OpenAI) -> None:
    assert [model.id for model in thinker.models.list()] == ["reasoner", "org/reasoner"]
    assert thinker.models.retrieve("org/reasoner").id == "org/reasoner"
    answer = thinker.completions.create(model="org/reasoner", prompt=PROMPT, max_tokens=1)
    assert answer.model == "org/reasoner"


def test_a_key_is_asked_for(reasoner: RunningServer) -> None:
    with OpenAI(base_url=f"{reasoner.url}/v1", api_key="guess", max_retries=0) as client:
        with pytest.raises(AuthenticationError, match="the API key is not accepted") as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(AuthenticationError):
            client.chat.completions.create(model="reasoner", messages=CHAT, stream=True)


def test_a_request_too_many_is_told_when_to_come_again(thinker: OpenAI) -> None:
    body: Any = {"model": "reasoner", "messages": CHAT, "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    with thinker.chat.completions.create(**body, stream=True) as running:
        next(iter(running))
        with pytest.raises(RateLimitError, match="1 may at once") as caught:
            thinker.chat.completions.create(**body)
        assert caught.value.code == "concurrency_limit_exceeded"
        assert int(caught.value.response.headers["retry-after"]) >= 1
    # The server notices a moment later that the client has left; the client's own retries bridge it.
    thinker.with_options(max_retries=5).chat.completions.create(**{**body, "max_tokens": 1})


def test_a_request_does_not_count_beyond_its_last_event(thinker: OpenAI) -> None:
    for _ in range(20):
        stream = thinker.chat.completions.create(model="reasoner", messages=CHAT, max_tokens=1, stream=True)
        assert list(stream)[-1].choices[0].finish_reason


def test_the_middle_is_filled_in(llm: LLM, small_server: RunningServer) -> None:
    params = SamplingParams(temperature=0, max_tokens=16)
    expected = llm.infill("def add(a, b):\n", "\n    return c", params)[0].outputs[0].text
    with OpenAI(base_url=f"{small_server.url}/v1", api_key="none") as client:
        answer = client.completions.create(
            model=CODER, prompt="def add(a, b):\n", suffix="\n    return c", temperature=0, max_tokens=16
        )
        assert answer.choices[0].text == expected
        with pytest.raises(BadRequestError, match="has no format of tool calls"):
            client.chat.completions.create(model=CODER, messages=CHAT, tools=[NOW])
