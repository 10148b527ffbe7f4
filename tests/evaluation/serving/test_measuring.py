"""What is found out of a server before it is measured, and the benchmark as a whole."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npu_zoo.core.errors import NpuZooError, UsageError
from npu_zoo.evaluation.serving.arrivals import ClosedLoop, OpenLoop
from npu_zoo.evaluation.serving.client import Client
from npu_zoo.evaluation.serving.figures import Goal, LevelFigures
from npu_zoo.evaluation.serving.load import LevelRun
from npu_zoo.evaluation.serving.measuring import ServeBench, ServePlan, doubts
from npu_zoo.evaluation.serving.observation import Failure, Observation
from npu_zoo.evaluation.serving.result import MeasuredLevel, ServeResult
from npu_zoo.evaluation.serving.server import ServerError
from npu_zoo.evaluation.serving.work import LengthRange
from npu_zoo.protocol.server_address import ServerAddress

from .stub_server import Handler, Reply, Stub, completion, prompt_length, status, token, usage

PLAN = ServePlan([ClosedLoop(2)], num_requests=4, input_lengths=LengthRange(20, 30), output_lengths=LengthRange(2, 5))


def bench(url: str, plan: ServePlan = PLAN, **changes: Any) -> ServeResult:
    async def run() -> ServeResult:
        async with Client(ServerAddress.parse(url, "--url"), timeout=30) as client:
            result = await ServeBench(client, dataclasses.replace(plan, **changes)).run()
        assert result is not None
        return result

    return asyncio.run(run())


async def tokenize(reply: Reply) -> None:
    """As vLLM does: one token a word."""
    if "prompt" not in reply.body:
        await status(422, "Unprocessable", {"detail": "prompt"})(reply)
    else:
        await reply.json({"tokens": [len(word) + 500 for word in reply.body["prompt"].split()]})


async def llamacpp_tokenize(reply: Reply) -> None:
    await reply.json({"tokens": [7] * len(reply.body.get("content", "").split())})


def refusing(refuses: Callable[[dict[str, Any]], bool], handler: Handler | None = None) -> Handler:
    async def handle(reply: Reply) -> None:
        refused = refuses(reply.body)
        answer = status(400, "Bad Request", {"error": {"message": "unknown"}}) if refused else handler or completion()
        await answer(reply)

    return handle


def sent(stub: Stub, count: int = 4) -> list[Any]:
    """Bodies of the measured requests, which come last."""
    return stub.generations()[-count:]


def test_prompts_are_ids_of_exact_lengths_where_the_server_takes_them() -> None:
    with Stub(completions=completion(), tokenize=tokenize, version=status(200, "OK", {"version": "1.2"})) as stub:
        result = bench(stub.url)
    assert result.prompts == "ids"
    assert result.notes == ()
    assert (result.server.model, result.server.owned_by, result.server.version) == ("stub", "stubs", "1.2")
    assert all(20 <= len(body["prompt"]) <= 30 and set(body["prompt"]) <= set(range(501, 520)) for body in sent(stub))
    assert all(body["ignore_eos"] and body["stream_options"]["include_usage"] for body in sent(stub))
    (level,) = result.levels
    assert level.figures.prompt_tokens == level.figures.asked_prompt_tokens == sum(len(b["prompt"]) for b in sent(stub))
    assert level.figures.output_tokens == level.figures.asked_output_tokens
    assert len(stub.generations()) == 1 + 1 + 4


def test_the_same_seed_asks_for_the_same_and_each_level_for_its_own() -> None:
    seen = []
    for seed in (0, 0, 1):
        with Stub(completions=completion(), tokenize=tokenize) as stub:
            bench(stub.url, loads=[ClosedLoop(1), ClosedLoop(1)], seed=seed)
        seen.append([body["prompt"] for body in sent(stub, 8)])
    assert seen[0] == seen[1] != seen[2]
    assert seen[0][:4] != seen[0][4:]


def test_llama_cpp_s_tokenize_is_understood() -> None:
    with Stub(completions=completion(), tokenize=llamacpp_tokenize) as stub:
        assert bench(stub.url).prompts == "ids"
    assert {token for body in sent(stub) for token in body["prompt"]} == {7}


def test_text_stands_in_where_ids_are_refused_and_its_length_follows_the_server_s_count() -> None:
    async def counting(reply: Reply) -> None:
        await reply.begin_stream()
        await reply.event(token(finish="length"))
        await reply.event(usage(2 * prompt_length(reply.body) + 6, reply.body["max_tokens"]))

    with Stub(completions=refusing(lambda body: isinstance(body["prompt"], list), counting), tokenize=tokenize) as stub:
        result = bench(stub.url)
    assert result.prompts == "words"
    assert "takes no token ids" in result.notes[0]
    figures = result.levels[0].figures
    assert figures.prompt_tokens == pytest.approx(figures.asked_prompt_tokens, abs=4)


def test_members_that_a_server_refuses_are_left_out_and_told() -> None:
    refuses = refusing(lambda body: "ignore_eos" in body or "stream_options" in body)
    with Stub(completions=refuses) as stub:
        result = bench(stub.url)
    assert not any("ignore_eos" in body or "stream_options" in body for body in sent(stub))
    said = "\n".join(result.notes)
    for words in ("takes no ignore_eos", "takes no stream_options", "does not count prompts", "does not count tokens"):
        assert words in said
    assert not result.levels[0].figures.counted_by_server


def test_what_was_asked_for_is_not_given_up() -> None:
    refuses = refusing(lambda body: "ignore_eos" in body)
    with Stub(completions=refuses) as stub, pytest.raises(ServerError, match="refuses the requests: HTTP 400"):
        bench(stub.url, ignore_eos=True)
    with Stub(completions=completion()) as stub, pytest.raises(UsageError, match="--token-id-range"):
        bench(stub.url, tokens="ids")


async def hang_up(reply: Reply) -> None:
    """Close the connection without an answer."""


def test_routes_that_a_server_need_not_have_may_close_the_connection() -> None:
    with Stub(completions=completion(), version=hang_up, tokenize=hang_up) as stub:
        result = bench(stub.url)
    assert (result.prompts, result.server.version) == ("words", None)
    assert result.levels[0].figures.completed == 4


def test_a_form_that_breaks_the_server_gives_way_to_a_simpler_one() -> None:
    broken = status(500, "Server Error", {"error": {"message": "KeyError"}})

    async def handle(reply: Reply) -> None:
        await (broken if "stream_options" in reply.body else completion())(reply)

    with Stub(completions=handle) as stub:
        result = bench(stub.url)
    assert result.levels[0].figures.completed == 4
    assert "the server takes no stream_options" in result.notes[0]
    assert "KeyError" in result.notes[0]


def test_chats_send_one_turn() -> None:
    async def chat(reply: Reply) -> None:
        words = len(reply.body["messages"][0]["content"].split())
        await reply.begin_stream()
        await reply.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        await reply.event({"choices": [{"delta": {"content": "abc"}, "finish_reason": "length"}]})
        await reply.event(usage(words + 40, reply.body["max_tokens"]))
        await reply.event("[DONE]")

    with Stub(chat=chat) as stub:
        result = bench(stub.url, endpoint="chat")
    assert any("a prompt of one word has 41 tokens" in note for note in result.notes)
    assert {seen.characters for seen in result.levels[0].requests} == {(0, 3)}


def test_a_file_is_sent_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "work.jsonl"
    file.write_text('{"prompt": "one two", "max_tokens": 2}\n{"prompt": "three", "max_tokens": 3}\n')
    with Stub(completions=completion()) as stub:
        result = bench(stub.url, dataset=file)
    assert result.prompts == "file"
    assert not result.ignore_eos
    assert {(body["prompt"], body["max_tokens"]) for body in sent(stub)} == {("one two", 2), ("three", 3)}
    assert "has 2 prompts, and 5 were sent" in result.notes[-1]


@pytest.mark.parametrize("counts", [False, True])
def test_answers_of_conversations_are_as_long_as_the_server_s_tokens_say(tmp_path: Path, counts: bool) -> None:
    file = tmp_path / "work.json"
    file.write_text(
        '[{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "%s"}]}]' % ("x " * 40)
    )
    handlers = {"tokenize": tokenize} if counts else {}
    with Stub(completions=completion(), **handlers) as stub:
        bench(stub.url, dataset=file)
    assert {body["max_tokens"] for body in sent(stub)} == {40 if counts else 20}


def test_conversations_with_empty_answers_are_counted_too_and_others_told(tmp_path: Path) -> None:
    file = tmp_path / "work.json"
    human, system = {"from": "human", "value": "hi"}, {"from": "system", "value": "be kind"}
    turns = [[human, {"from": "gpt", "value": text}] for text in ("x " * 40, "")]
    file.write_text(json.dumps([{"conversations": one} for one in [*turns, [system, human]]]))
    with Stub(completions=completion(), tokenize=tokenize) as stub:
        result = bench(stub.url, dataset=file)
    assert {body["max_tokens"] for body in sent(stub)} == {40, 1}
    assert result.notes[0].startswith("1 of 3 conversations were left out: ")
    assert not any("counts no tokens" in note for note in result.notes)


@pytest.mark.parametrize(
    ("handlers", "said"),
    [
        ({"models": status(401, "Unauthorized", {"error": {"message": "no key"}})}, "401: no key; put your key into"),
        ({"models": status(404, "Not Found", {})}, "lists no models at /v1/models .HTTP 404.; name one with --model"),
        ({"completions": status(403, "Forbidden", {})}, "answers HTTP 403 Forbidden; put your key into"),
        ({}, "refuses the requests: HTTP 404 Not Found"),
    ],
)
def test_a_server_that_cannot_be_measured(handlers: dict[str, Handler], said: str) -> None:
    with Stub(**handlers) as stub, pytest.raises(NpuZooError, match=said):
        bench(stub.url)


def test_a_server_that_lists_nothing_is_measured_by_the_name_that_is_given() -> None:
    with Stub(models=status(404, "Not Found", {}), completions=completion()) as stub:
        assert bench(stub.url, model="mine").server.model == "mine"
    assert {body["model"] for body in sent(stub)} == {"mine"}


@pytest.mark.parametrize("code", [429, 500])
def test_a_server_that_answers_nothing_but_errors_is_measured_as_that(code: int) -> None:
    with Stub(completions=status(code, "Reason", {"error": {"message": "no"}})) as stub:
        result = bench(stub.url, goal=Goal(ttft=1000))
    figures = result.levels[0].figures
    assert (figures.completed, figures.failed) == (0, 4)
    assert result.failed
    assert figures.goodput is not None
    assert figures.goodput.share == 0
    assert f"the warm-up request failed (HTTP {code} Reason: no)" in result.notes


def test_the_record_holds_all_that_the_figures_come_from() -> None:
    with Stub(completions=completion([0.01]), tokenize=tokenize) as stub:
        result = bench(stub.url, loads=[OpenLoop(50.0), OpenLoop(200.0)], num_requests=6, goal=Goal(ttft=1000))
    back = ServeResult.model_validate_json(result.model_dump_json())
    assert back == result
    for level in back.levels:
        assert LevelFigures.of(level.requests, Goal(ttft=1000)) == level.figures
        raw = [request.model_dump() for request in level.requests]
        first = [(data["arrivals"][0] - data["sent"]) * 1e3 for data in raw]
        assert level.figures.ttft is not None
        assert level.figures.ttft.p99 == pytest.approx(np.percentile(first, 99))
    headline = result.headline()
    assert headline["completed at rate 50"] == 6
    assert headline["ttft_p50_ms at rate 200"] == back.levels[1].figures.ttft.p50  # type: ignore[union-attr]


def test_a_client_that_is_slow_itself_is_told() -> None:
    seen = [
        Observation(
            index=index,
            due=0.0,
            sent=0.2,
            arrivals=(1.0, 3.0),
            characters=(1, 1),
            ended=3.0,
            status="completed",
            prompt_tokens=11,
            asked_prompt_tokens=10,
            output_tokens=8,
            max_tokens=9,
            counted_by_server=True,
        )
        for index in range(2)
    ]
    level = MeasuredLevel.of(OpenLoop(4.0), LevelRun(seen, client_cpu_share=0.9), None)
    assert [note.removeprefix("rate 4: ").split(":")[0].split(",")[0] for note in doubts(level, full_length=True)] == [
        "requests were sent up to 200 ms late (p99)",
        "this client used 90% of a processor core",
        "4.00 tokens came in an event on average; inter-token latencies are of events",
        "prompts had 22 tokens in all where 20 were asked for",
        "answers had 16 tokens in all where 18 were asked for",
    ]
    assert len(doubts(level, full_length=False)) == 4


def test_answers_without_text_and_requests_that_the_client_could_not_send_are_told() -> None:
    silent = Observation(
        index=0, sent=0, arrivals=(1.0,), characters=(0,), ended=1, status="completed", counted_by_server=True
    )
    unsent = Observation(index=1, sent=0, ended=1, status="failed", failure=Failure(kind="client", message="m"))
    notes = doubts(MeasuredLevel.of(ClosedLoop(1), LevelRun([silent, unsent, unsent]), None), full_length=False)
    assert [note.partition(": ")[2].split(":")[0] for note in notes] == [
        "2 requests failed at this client, and not at the server",
        "1 answers came without text",
    ]
