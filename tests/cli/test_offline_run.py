"""``run`` over files of prompts of every form, with an engine that says its prompts back."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from npu_zoo.cli.prompt_file import PromptFile
from npu_zoo.cli.run_key import RunKey
from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.core.engine import CompletionOutput, Engine, EngineStats, RequestMetrics, RequestOutput
from npu_zoo.core.errors import EngineError, PromptError
from npu_zoo.core.sampling import SamplingParams, StructuredOutputs
from npu_zoo.dispatch import resolve
from npu_zoo.engine.llm import LLM
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.protocol.answering import Answering
from npu_zoo.testing import unchecked_config

MODEL = ("--model", "deepseek_coder:demo", "--hardware", "cpu")

TOO_LONG = 200


class EchoEngine(Engine):
    """Finishes one request a step, the one that came last; ``before_step`` is called with the step's number."""

    end: ClassVar[dict[str, Any]] = {"finish_reason": "stop"}

    def __init__(self, config: EngineConfig, before_step: Callable[[int], None] = lambda step: None) -> None:
        self.config = config
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.options: list[dict[str, Any]] = []
        self._waiting: dict[str, tuple[list[int], SamplingParams]] = {}
        self._before_step = before_step
        self._steps = 0

    def add_request(self, request_id: str, prompt: Any, sampling_params: SamplingParams, **options: Any) -> None:
        if len(prompt) > TOO_LONG:
            raise PromptError(f"the prompt has {len(prompt)} tokens")
        self.options.append(options)
        self.asked.append((list(prompt), sampling_params))
        self._waiting[request_id] = self.asked[-1]

    def step(self) -> list[RequestOutput]:
        self._steps += 1
        self._before_step(self._steps)
        request_id, (prompt, params) = self._waiting.popitem()
        text = " ".join(map(str, prompt))
        outputs = [CompletionOutput(i, text, list(prompt), **self.end) for i in range(params.n)]
        return [RequestOutput(request_id, None, prompt, outputs, True, RequestMetrics(1.0, 1.5, 3.0))]

    def abort_request(self, request_id: str) -> RequestOutput | None:
        self._waiting.pop(request_id, None)
        return None

    def has_unfinished_requests(self) -> bool:
        return bool(self._waiting)

    def stats(self) -> EngineStats:
        return EngineStats()

    def render_chat(self, messages: Any, *, add_generation_prompt: bool = True) -> list[int]:
        raise NotImplementedError

    def render_fim(self, prefix: str, suffix: str) -> list[int]:
        raise NotImplementedError

    def explain(self) -> dict[str, Any]:
        return {"max_model_len": self.config.max_model_len}

    def shutdown(self) -> None:
        pass


class Started(list[EchoEngine]):
    """The engines that were started, and what further ones do before each step."""

    def __init__(self) -> None:
        super().__init__()
        self.before_step: Callable[[int], None] = lambda step: None


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    made = Started()

    class EchoLLM(SimpleNamespace):
        def __enter__(self) -> EchoLLM:
            return self

        def __exit__(self, *exc_info: object) -> None:
            pass

    def from_config(config: EngineConfig, progress: Any = None) -> EchoLLM:
        made.append(EchoEngine(config, made.before_step))
        return EchoLLM(engine=made[-1])

    monkeypatch.setattr(LLM, "from_config", from_config)
    return made


@pytest.fixture
def encode(cli: Callable, started: Started, tmp_path: Path) -> Callable[[Any], list[int]]:
    """The token ids of a text or a conversation under the demo's tokenizer."""
    (tmp_path / "one.txt").write_text("x")
    cli("run", *MODEL, "--prompts-file", str(tmp_path / "one.txt"), "--output", str(tmp_path / "one.out"))
    encoder = PromptEncoder(started.pop().config)
    return lambda prompt: encoder.encode(prompt) if isinstance(prompt, str) else encoder.render_chat(prompt)


def results(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def write_lines(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# Forms


def test_a_text_file_gives_an_object_for_each_line(
    cli: Callable, started: Started, encode: Callable, tmp_path: Path
) -> None:
    lines = [f"prompt {number} \u2028\x0c\x85 end" for number in range(5)]
    (tmp_path / "p.txt").write_bytes("\ufeff{}\r\n\r\n{}\n  \n{}\r\n{}\n{}".format(*lines).encode())
    ran = cli("run", *MODEL, "--prompts-file", str(tmp_path / "p.txt"), "--output", str(tmp_path / "out"))
    assert (ran.code, ran.out) == (0, "")
    found = {result["index"]: result for result in results((tmp_path / "out").read_text())}
    assert [found[index]["prompt"] for index in range(5)] == lines
    assert [found[index]["line"] for index in range(5)] == [1, 3, 5, 6, 7]
    assert found[2]["token_ids"] == encode(lines[2])
    assert "2 blank line(s) skipped, 5 prompt(s) read" in ran.err
    assert "5 succeeded, 0 failed" in ran.err
    assert "5 of 5 prompts" in ran.err
    assert "prompts/s" in ran.err


def test_json_lines_have_prompts_of_every_kind(
    cli: Callable, started: Started, encode: Callable, tmp_path: Path
) -> None:
    path = write_lines(
        tmp_path / "p.jsonl",
        {"prompt": "one", "id": "a"},
        {"messages": user("two"), "id": 7},
        {"prompt_token_ids": [3, 4]},
        {"fim_prefix": "def f(", "fim_suffix": "pass"},
    )
    ran = cli("run", *MODEL, "--prompts-file", path)
    assert ran.code == 0
    one, two, three, four = sorted(results(ran.out), key=lambda result: result["index"])
    assert (one["id"], one["prompt"], one["token_ids"]) == ("a", "one", encode("one"))
    assert (two["id"], two["messages"], two["token_ids"]) == (7, user("two"), encode(user("two")))
    assert (three["prompt_token_ids"], three["token_ids"], three["prompt"]) == ([3, 4], [3, 4], None)
    assert (four["fim_prefix"], four["fim_suffix"]) == ("def f(", "pass")
    assert "id" not in three
    assert cli("run", *MODEL, "--prompts-file", path, "--chat").code == 0
    assert started[-1].asked[0][0] == encode(user("one"))


def test_a_line_s_priority_and_time_reach_the_engine(cli: Callable, started: Started, tmp_path: Path) -> None:
    lines = {"prompt": "a", "priority": -2, "max_time": 1.5}, {"prompt": "b", "priority": None}
    assert cli("run", *MODEL, "--prompts-file", write_lines(tmp_path / "p.jsonl", *lines)).code == 0
    found = sorted((options["priority"], options["max_time"]) for options in started[0].options)
    assert found == [(-2, 1.5), (0, None)]


def test_a_line_s_sampling_parameters_go_over_the_command_line_s(
    cli: Callable, started: Started, tmp_path: Path
) -> None:
    path = write_lines(
        tmp_path / "p.jsonl",
        {"prompt_token_ids": [1]},
        {"prompt_token_ids": [2], "temperature": 1, "stop": "x", "seed": 5, "n": 2, "max_tokens": None},
        {"prompt_token_ids": [3], "stop": ["a", "b"], "logprobs": 2, "logit_bias": {"7": -100}},
        {"prompt_token_ids": [4], "structured_outputs": {"json": {"type": "object"}}},
        {"prompt_token_ids": [5], "structured_outputs": {"regex": "a+"}},
        {"prompt_token_ids": [6], "structured_outputs": None},
    )
    assert cli("run", *MODEL, "--prompts-file", path, "--max-tokens", "9", "--choice", "y").code == 0
    asked = {prompt[0]: params for prompt, params in started[0].asked}
    base = {"temperature": 0.0, "max_tokens": 9, "structured_outputs": StructuredOutputs(choice=("y",))}
    assert asked[1] == SamplingParams(**base)
    assert asked[2] == SamplingParams(**{**base, "temperature": 1, "stop": "x", "seed": 5, "n": 2, "max_tokens": None})
    assert asked[3] == SamplingParams(**base, stop=["a", "b"], logprobs=2, logit_bias={7: -100})
    assert asked[4].structured_outputs == StructuredOutputs(json='{"type": "object"}')
    assert asked[5].structured_outputs == StructuredOutputs(regex="a+")
    assert asked[6].structured_outputs is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"', ["the line is not JSON", "column 15"]),
        ("[1]", ["JSON object", "list"]),
        ('{"prompt": "a", "temperature": NaN}', ["NaN"]),
        ("[" * 100_000, ["nests deeper"]),
        ({"prompt": "a", "temprature": 1}, ["unknown key 'temprature'", "did you mean temperature?"]),
        ({"promt": "a"}, ["unknown key 'promt'", "did you mean prompt?"]),
        ({"id": "a"}, ["one of prompt", "none"]),
        ({"prompt": "a", "messages": user("b")}, ["one of prompt", "prompt and messages"]),
        ({"prompt": ["a"]}, ["prompt is list"]),
        ({"prompt": "a", "id": 1.5}, ["id=1.5"]),
        ({"prompt_token_ids": [1, True]}, ["prompt_token_ids"]),
        ({"prompt_token_ids": "1,2"}, ["prompt_token_ids"]),
        ({"messages": []}, ["at least one"]),
        ({"messages": [{"role": "user"}]}, ["message 0", "content"]),
        ({"fim_prefix": 7}, ["fim_prefix is int"]),
        ({"prompt": "a", "temperature": -1}, ["temperature=-1"]),
        ({"prompt": "a", "temperature": "hot"}, ["temperature='hot'"]),
        ({"prompt": "a", "n": 0}, ["n=0"]),
        ({"prompt": "a", "ignore_eos": "yes"}, ["ignore_eos='yes'"]),
        ({"prompt": "a", "logit_bias": {"x": 1}}, ["logit_bias"]),
        ({"prompt": "a", "structured_outputs": {"regx": "a"}}, ["unknown key 'regx'", "did you mean regex?"]),
        ({"prompt": "a", "structured_outputs": {"regex": "a", "grammar": "b"}}, ["regex and grammar"]),
        ({"prompt": "a", "max_time": 0}, ["max_time must be above 0, not 0"]),
        ({"prompt": "a", "priority": "high"}, ["priority must be an integer"]),
        ({"messages": user("a"), "tools": []}, ["'tools'", "batch form"]),
        ({"prompt": "a", "structured_outputs": "json"}, ["structured_outputs='json' is no object"]),
    ],
)
def test_a_line_that_makes_no_sense_is_refused_before_anything_runs(
    cli: Callable, started: Started, tmp_path: Path, line: Any, words: list[str]
) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "fine"}, "", line)
    ran = cli("run", *MODEL, "--prompts-file", path, "--output", str(tmp_path / "out"))
    assert (ran.code, started) == (2, [])
    assert f"{path}, line 3: " in ran.err
    assert [word for word in words if word not in ran.err] == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "first", "form"),
    [
        ("p.txt", '{"prompt": "a"}', "txt"),
        ("p.txt", "a", "txt"),
        ("p", "a", "txt"),
        ("p.py", '{"a": 1}', "txt"),
        ("p", '{"prompt_token_ids": [1]}', "jsonl"),
        ("p.jsonl", '{"prompt": "a"}', "jsonl"),
        ("p.JSONL", "a", "jsonl"),
        ("p.jsonl", '{"custom_id": "a"}', "batch"),
        ("p", '{"url": "/v1/completions", "body": {}}', "batch"),
    ],
)
def test_the_form_of_a_file_is_told_by_its_name_and_first_line(
    cli: Callable, started: Started, tmp_path: Path, name: str, first: str, form: str
) -> None:
    path = write_lines(tmp_path / name, "", first)
    out = ("--output", str(tmp_path / "out"))
    ran = cli("run", *MODEL, "--prompts-file", path, *out)
    if form == "txt":
        assert results((tmp_path / "out").read_text())[0]["prompt"] == first
    elif form == "batch":
        assert "custom_id" in (ran.err + (tmp_path / "out").read_text() if ran.code != 2 else ran.err)
    else:
        assert (ran.code == 0) == first.startswith("{")
    asked = cli("run", *MODEL, "--prompts-file", path, "--prompts-format", form, *out)
    assert asked.code == ran.code
    assert "another run" not in asked.err


def test_standard_input_may_be_json_lines_and_is_known_again(cli: Callable, started: Started, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"prompt_token_ids": [number]}) + "\n" for number in range(1, 4))
    arguments = ("run", *MODEL, "--prompts-file", "-", "--output", str(tmp_path / "out"))
    assert cli(*arguments, stdin=lines).code == 0
    assert len(results((tmp_path / "out").read_text())) == 3
    assert cli(*arguments, stdin=lines).code == 0
    assert len(started) == 1
    assert "the input file has changed" in cli(*arguments, stdin=lines + lines).err


def test_an_empty_file_is_refused(cli: Callable, started: Started, tmp_path: Path) -> None:
    for content in ("", "\n \n", "\ufeff"):
        (tmp_path / "p.jsonl").write_text(content)
        ran = cli("run", *MODEL, "--prompts-file", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "out"))
        assert (ran.code, "holds no prompt" in ran.err) == (2, True)
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    ran = cli("run", *MODEL, "--prompts-file", str(tmp_path / "p.jsonl"))
    assert (ran.code, "not UTF-8: line 2" in ran.err) == (2, True)


def test_a_prompt_that_cannot_run_fails_alone(cli: Callable, started: Started, tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "p.jsonl",
        {"prompt_token_ids": [1]},
        {"prompt_token_ids": [1] * (TOO_LONG + 1), "id": "long"},
        {"prompt": "half of \ud800"},
        {"prompt_token_ids": [2]},
    )
    ran = cli("run", *MODEL, "--prompts-file", path, "--output", str(tmp_path / "out"))
    assert ran.code == 1
    assert "2 succeeded, 2 failed" in ran.err
    found = {result["index"]: result for result in results((tmp_path / "out").read_text())}
    assert set(found) == {0, 1, 2, 3}
    assert found[1]["error"] == {"type": "PromptError", "message": f"the prompt has {TOO_LONG + 1} tokens"}
    assert found[1]["id"] == "long"
    assert found[2]["prompt"] == "half of \ud800"
    assert found[2]["error"]["type"] == "PromptError"
    assert found[2]["error"]["message"].startswith("prompt holds")


def test_a_failed_line_runs_again_once_its_result_is_deleted(cli: Callable, started: Started, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write_lines(tmp_path / "p.jsonl", {"prompt_token_ids": [1]}, {"prompt_token_ids": [10**9]})
    arguments = ("run", *MODEL, "--prompts-file", path, "--output", str(out))
    assert cli(*arguments).code == 1
    out.write_text("".join(line for line in out.read_text().splitlines(keepends=True) if '"error"' not in line))
    assert cli(*arguments).code == 1
    assert [result["index"] for result in results(out.read_text())] == [0, 1]
    assert len(started[1].asked) == 0


# Batches


def chat(custom_id: str, text: str = "hi", **body: Any) -> dict[str, Any]:
    whole = {"model": "deepseek_coder", "messages": user(text), "max_tokens": 5, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": whole}


def test_a_batch_is_answered_line_by_line(cli: Callable, started: Started, encode: Callable, tmp_path: Path) -> None:
    completion = {"model": "deepseek_coder:demo", "prompt": [[3, 4], [5]], "max_tokens": 2, "n": 2}
    path = write_lines(
        tmp_path / "b.jsonl",
        chat("first", temperature=0.5, seed=3),
        {"custom_id": "second", "method": "POST", "url": "/v1/completions", "body": completion},
    )
    ran = cli("run", *MODEL, "--prompts-file", path, "--top-p", "0.5")
    assert ran.code == 0
    found = {result["custom_id"]: result for result in results(ran.out)}
    assert len({result["id"] for result in found.values()}) == 2
    for result in found.values():
        assert set(result) == {"id", "custom_id", "response", "error"}
        assert result["id"].startswith("batch_req_")
        assert result["error"] is None
        assert set(result["response"]) == {"status_code", "request_id", "body"}
        assert result["response"]["status_code"] == 200
    answer, texts = (found[name]["response"]["body"] for name in ("first", "second"))
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == " ".join(map(str, encode(user("hi"))))
    assert texts["object"] == "text_completion"
    assert [choice["text"] for choice in texts["choices"]] == ["3 4", "3 4", "5", "5"]
    (params,) = [params for prompt, params in started[-1].asked if prompt == encode(user("hi"))]
    assert (params.temperature, params.top_p, params.seed, params.max_tokens) == (0.5, 0.5, 3, 5)


def test_refused_lines_of_a_batch_say_why_and_the_others_run(cli: Callable, started: Started, tmp_path: Path) -> None:
    lines = {
        "fine": (200, chat("fine")),
        "wrong type": (400, chat("wrong type", temperature="hot")),
        "no model": (404, chat("no model", model="gpt-4o")),
        "long": (400, chat("long", "long " * 300)),
        "stream": (400, chat("stream", stream=True)),
        "url": (404, {**chat("url"), "url": "/v1/embeddings"}),
        "method": (405, {**chat("method"), "method": "GET"}),
        "body": (400, {**chat("body"), "body": [1]}),
        "nothing": (404, {"custom_id": "nothing"}),
    }
    path = write_lines(tmp_path / "b.jsonl", *(line for _, line in lines.values()))
    ran = cli("run", *MODEL, "--prompts-file", path, "--output", str(tmp_path / "out"))
    assert ran.code == 1
    assert "1 succeeded, 8 failed" in ran.err
    found = {result["custom_id"]: result["response"] for result in results((tmp_path / "out").read_text())}
    assert {name: response["status_code"] for name, response in found.items()} == {
        name: status for name, (status, _) in lines.items()
    }
    for name, response in found.items():
        if name != "fine":
            assert set(response["body"]["error"]) == {"message", "type", "param", "code"}
    assert found["wrong type"]["body"]["error"]["param"] == "temperature"
    again = cli("run", *MODEL, "--prompts-file", path, "--output", str(tmp_path / "out"))
    assert (again.code, len(started)) == (1, 1)
    assert "1 succeeded, 8 failed" in again.err


def test_a_fault_of_ours_fails_its_line_and_tells_no_details(
    cli: Callable, started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, messages: Any, **options: Any) -> list[int]:
        raise ZeroDivisionError("in /secret/path.py")

    path = write_lines(tmp_path / "b.jsonl", chat("a"))
    monkeypatch.setattr(PromptEncoder, "render_chat", broken)
    ran = cli("run", *MODEL, "--prompts-file", path)
    assert ran.code == 1
    (found,) = results(ran.out)
    assert found["response"]["status_code"] == 500
    assert "secret" not in ran.out
    assert "ZeroDivisionError" in ran.err


def test_an_output_that_lost_its_form_fails_its_line(
    cli: Callable, started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EchoEngine, "end", {"finish_reason": "error", "stop_reason": "no token keeps the form"})
    ran = cli("run", *MODEL, "--prompts-file", write_lines(tmp_path / "b.jsonl", chat("a")))
    assert ran.code == 1
    response = results(ran.out)[0]["response"]
    assert (response["status_code"], response["body"]["error"]["code"]) == (400, "output_failed")
    assert response["body"]["error"]["message"] == "no token keeps the form"


def test_an_answer_that_cannot_be_made_fails_its_line(
    cli: Callable, started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, outputs: Any) -> dict[str, Any]:
        raise ZeroDivisionError("in /secret/path.py")

    monkeypatch.setattr(Answering, "response", broken)
    ran = cli("run", *MODEL, "--prompts-file", write_lines(tmp_path / "b.jsonl", chat("a")))
    assert ran.code == 1
    assert results(ran.out)[0]["response"]["status_code"] == 500
    assert "secret" not in ran.out
    assert "ZeroDivisionError" in ran.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (chat("a"), ["'a'", "line 1 too"]),
        ({**chat("b"), "custom_id": None}, ["custom_id"]),
        ({"method": "POST", "url": "/v1/chat/completions", "body": {}}, ["custom_id"]),
        ('{"custom_id": "b", ', ["not JSON"]),
    ],
)
def test_a_batch_whose_answers_could_not_be_told_apart_is_refused(
    cli: Callable, started: Started, tmp_path: Path, line: Any, words: list[str]
) -> None:
    path = write_lines(tmp_path / "b.jsonl", chat("a"), line)
    ran = cli("run", *MODEL, "--prompts-file", path)
    assert (ran.code, started) == (2, [])
    assert f"{path}, line 2: " in ran.err
    assert [word for word in words if word not in ran.err] == []


def test_a_batch_may_call_the_model_by_another_name(cli: Callable, started: Started, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "b.jsonl", chat("a", model="gpt-4o-mini"))
    assert cli("run", *MODEL, "--prompts-file", path).code == 1
    ran = cli("run", *MODEL, "--prompts-file", path, "--served-model-name", "gpt-4o-mini")
    assert (ran.code, results(ran.out)[0]["response"]["body"]["model"]) == (0, "gpt-4o-mini")


# Output files


JSONL = [{"prompt_token_ids": [number], "id": f"n{number}"} for number in range(10, 22)]
BATCH = [chat(f"c{number}", str(number)) for number in range(12)]


def parse_run(path: Path) -> dict[Any, Any]:
    """What results say, by what tells them apart; fails where one is there twice."""
    found: dict[Any, Any] = {}
    for result in results(path.read_text()):
        name = result.get("custom_id", result.get("id"))
        assert name not in found
        body = result["response"]["body"]["choices"] if "response" in result else result["text"]
        found[name] = body
    return found


@pytest.mark.parametrize("lines", [JSONL, BATCH], ids=["jsonl", "batch"])
def test_a_run_goes_on_wherever_it_was_cut_off(
    cli: Callable, started: Started, tmp_path: Path, lines: list[dict[str, Any]]
) -> None:
    out = tmp_path / "out"
    arguments = ("run", *MODEL, "--prompts-file", write_lines(tmp_path / "p.jsonl", *lines), "--output", str(out))
    assert cli(*arguments).code == 0
    whole, expected = out.read_bytes(), parse_run(out)
    assert len(expected) == 12
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    cuts = [0, 1, 9, 15, ends[0] - 1, ends[0], ends[0] + 1, ends[4] + 5, ends[10], ends[10] + 7, len(whole) - 1]
    for cut in cuts:
        out.write_bytes(whole[:cut])
        ran = cli(*arguments)
        assert ran.code == 0, ran.err
        kept = sum(end <= cut for end in ends)
        assert parse_run(out) == expected
        assert out.read_bytes().startswith(whole[: ends[kept - 1] if kept else 0])
        assert len(started[-1].asked) == 12 - kept
        assert (f"holds {kept} of 12 results" in ran.err) == (kept > 0)


def test_a_finished_run_is_only_looked_at(cli: Callable, started: Started, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("run", *MODEL, "--prompts-file", write_lines(tmp_path / "p.jsonl", *JSONL), "--output", str(out))
    cli(*arguments)
    before = out.read_bytes()
    ran = cli(*arguments, "--max-num-seqs", "3")
    assert (ran.code, len(started), out.read_bytes()) == (0, 1, before)
    assert "12 succeeded, 0 failed" in ran.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--max-tokens", "7"), "sampling parameters"),
        (("--regex", "a+"), "structured output"),
        (("--chat",), "--chat"),
        (("--dtype", "fp32"), "the model, its weights, dtype"),
        (("--engine-seed", "4"), "the model"),
        ((), "the input file has changed"),
    ],
)
def test_results_of_another_run_stay(
    cli: Callable, started: Started, tmp_path: Path, change: tuple[str, ...], words: str
) -> None:
    out = tmp_path / "out"
    base = (*MODEL, "--dtype", "bf16")
    write = ("--prompts-file", write_lines(tmp_path / "p.jsonl", *JSONL), "--output", str(out))
    cli("run", *base, *write)
    before = out.read_bytes()[:-100]
    out.write_bytes(before)
    if not change:
        write_lines(tmp_path / "p.jsonl", *JSONL, JSONL[0])
    ran = cli("run", *base, *write, *change)
    assert (ran.code, out.read_bytes(), len(started)) == (2, before, 1)
    assert "holds results of another run" in ran.err
    assert words in ran.err


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "config.json", "chat_template.jinja"])
def test_a_checkpoint_s_settings_count_by_their_contents(tmp_path: Path, name: str) -> None:
    config = resolve(EngineArgs(model="deepseek_coder"))
    weights = Path(shutil.copytree(config.weights, tmp_path / "weights"))
    (weights / "chat_template.jinja").write_text("{{ messages }}")
    config = unchecked_config(config, weights=str(weights))
    before = RunKey.of("0" * 64, config, {})
    text = (weights / name).read_bytes()
    (weights / name).write_bytes(text[:-1] + b" ")
    assert before.changes(RunKey.of("0" * 64, config, {})).startswith("the model")
    (weights / name).write_bytes(text)
    assert before == RunKey.of("0" * 64, config, {})


@pytest.mark.parametrize(
    "content", [b"notes\n", b"notes", b'{"a": 1}', b'{"index": 1}\n', b'{"id": "x"}\n', b"[]\n", b"\n", b"\xff\xfe"]
)
def test_what_is_no_result_is_never_overwritten(
    cli: Callable, started: Started, tmp_path: Path, content: bytes
) -> None:
    out = tmp_path / "out"
    out.write_bytes(content)
    path = write_lines(tmp_path / "p.jsonl", *JSONL)
    ran = cli("run", *MODEL, "--prompts-file", path, "--output", str(out))
    assert (ran.code, started, out.read_bytes()) == (2, [], content)
    assert "holds no results of this command" in ran.err
    assert "delete it" in ran.err
    ran = cli("run", *MODEL, "--prompts-file", path, "--output", path)
    assert (ran.code, len(Path(path).read_text().splitlines())) == (2, 12)


def test_a_line_that_is_damaged_or_there_twice_is_named(cli: Callable, started: Started, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("run", *MODEL, "--prompts-file", write_lines(tmp_path / "p.jsonl", *JSONL), "--output", str(out))
    cli(*arguments)
    whole = out.read_text().splitlines(keepends=True)
    for wrong in (whole[0], "{}\n", whole[3][:40] + "\n"):
        out.write_text("".join([*whole[:3], wrong, *whole[4:6]]))
        ran = cli(*arguments)
        assert ran.code == 2
        assert f"{out}, line 4: " in ran.err
    assert len(started) == 1


@pytest.mark.parametrize("kind", ["directory", "device", "no such directory", "pipe"])
def test_what_cannot_hold_results_is_refused(cli: Callable, started: Started, tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    paths = {
        "directory": tmp_path,
        "device": Path("/dev/null"),
        "no such directory": tmp_path / "no" / "out",
        "pipe": tmp_path / "pipe",
    }
    path = write_lines(tmp_path / "p.jsonl", *JSONL)
    ran = cli("run", *MODEL, "--prompts-file", path, "--output", str(paths[kind]))
    assert (ran.code, started) == (2, [])
    assert str(paths[kind]) in ran.err


def test_two_processes_cannot_write_one_file(cli: Callable, started: Started, tmp_path: Path) -> None:
    with (tmp_path / "out").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        path = write_lines(tmp_path / "p.jsonl", *JSONL)
        ran = cli("run", *MODEL, "--prompts-file", path, "--output", str(tmp_path / "out"))
    assert (ran.code, started) == (2, [])
    assert "another process writes" in ran.err


def test_a_full_disk_keeps_whole_lines_and_the_run_goes_on_later(
    cli: Callable, started: Started, tmp_path: Path
) -> None:
    def interrupt(step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    started.before_step = interrupt
    out = tmp_path / "out"
    arguments = ("run", *MODEL, "--prompts-file", write_lines(tmp_path / "p.jsonl", *JSONL), "--output", str(out))
    ran = cli(*arguments)
    assert ran.code == 130
    assert len(parse_run(out)) == 5
    assert not started[0].has_unfinished_requests()
    assert "5 of 12 prompts" in ran.err
    assert "7 of 12 lines are left; the same command goes on with them" in ran.err
    started.before_step = lambda step: None
    assert cli(*arguments).code == 0
    assert len(parse_run(out)) == 12
    assert len(started[1].asked) == 7


def test_a_second_interrupt_ends_at_once(cli: Callable, started: Started, tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    started.before_step = interrupt
    out = tmp_path / "out"
    path = write_lines(tmp_path / "p.jsonl", *JSONL)
    assert cli("run", *MODEL, "--prompts-file", path, "--output", str(out)).code == 130
    assert len(parse_run(out)) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"n21"', '"x21"'),
        lambda text: text + text,
        lambda text: text.replace('"n21"', "broken"),
        lambda text: text[:-200],
    ],
)
def test_an_input_that_changes_while_it_is_run_is_noticed(
    cli: Callable, started: Started, tmp_path: Path, change: Callable[[str], str]
) -> None:
    path = tmp_path / "p.jsonl"
    started.before_step = lambda step: path.write_text(change(path.read_text())) if step == 1 else None
    write_lines(path, *JSONL[:4], *[{"prompt": "x" * 2**16}] * 8, *JSONL[4:])
    arguments = ("--output", str(tmp_path / "out"), "--max-num-seqs", "2")
    ran = cli("run", *MODEL, "--prompts-file", str(path), *arguments)
    assert ran.code == 2
    assert "was changed while it was run" in ran.err


def test_an_engine_that_dies_leaves_what_is_finished(cli: Callable, started: Started, tmp_path: Path) -> None:
    def die(step: int) -> None:
        if step == 5:
            raise EngineError("a rank died")

    started.before_step = die
    path = write_lines(tmp_path / "p.jsonl", *JSONL)
    ran = cli("run", *MODEL, "--prompts-file", path, "--output", str(tmp_path / "out"))
    assert ran.code == 1
    assert "a rank died" in ran.err
    assert "8 of 12 lines are left" in ran.err
    assert len(parse_run(tmp_path / "out")) == 4


def test_an_interrupt_without_an_output_file_tells_of_one(cli: Callable, started: Started, tmp_path: Path) -> None:
    started.before_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 5 else None
    ran = cli("run", *MODEL, "--prompts-file", write_lines(tmp_path / "p.jsonl", *JSONL))
    assert (ran.code, len(results(ran.out))) == (130, 5)
    assert "--output FILE" in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", "a"), "--prompts-file alone"),
        (("--prompt-token-ids", "1"), "--prompts-file alone"),
        (("--fim-prefix", "a"), "--prompts-file alone"),
        (("--echo",), "--echo"),
        (("--served-model-name", "a"), "batch files"),
        (("--prompts-format", "batch", "--chat"), "--chat"),
        (("--prompts-format", "batch", "--regex", "a"), "structured output"),
        (("--prompts-format", "batch", "--logprobs", "1"), "logprobs"),
        (("--prompts-format", "xml"), "xml"),
    ],
)
def test_options_without_a_meaning_are_refused(
    cli: Callable, started: Started, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    path = write_lines(tmp_path / "p.jsonl", *JSONL)
    ran = cli("run", *MODEL, "--prompts-file", path, *arguments)
    assert (ran.code, started) == (2, [])
    assert words in ran.err
    assert "--prompts-file alone" in cli("run", *MODEL, "--output", str(tmp_path / "out"), "--prompt", "a").err


def test_a_large_file_is_never_held_as_a_whole(tmp_path: Path) -> None:
    line = "x" * 99 + "\n"
    with (tmp_path / "p.txt").open("w") as file:
        file.writelines(line for _ in range(100_000))
    with PromptFile(tmp_path / "p.txt") as prompts:
        tracemalloc.start()
        assert sum(1 for _ in prompts.lines()) == 100_000
        assert tracemalloc.get_traced_memory()[1] < 200_000
        tracemalloc.stop()


def test_a_long_run_keeps_no_more_than_runs(cli: Callable, started: Started, tmp_path: Path) -> None:
    waiting: list[int] = []
    started.before_step = lambda step: waiting.append(len(started[-1]._waiting))
    lines = ({"prompt_token_ids": [number % 100 + 1]} for number in range(3000))
    path = write_lines(tmp_path / "p.jsonl", *lines)
    ran = cli("run", *MODEL, "--prompts-file", path, "--output", str(tmp_path / "out"), "--max-num-seqs", "5")
    assert ran.code == 0
    assert max(waiting) == 10
    found = results((tmp_path / "out").read_text())
    assert sorted(result["index"] for result in found) == list(range(3000))
