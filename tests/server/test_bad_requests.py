"""Requests that no answer can be given to: each is told why, and nobody else notices."""

from __future__ import annotations

import itertools
import json
import re
import string
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from npu_zoo import LLM, SamplingParams
from npu_zoo.testing.serving import RunningServer

MODEL = "deepseek_v3:demo"
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
JSON = {"Content-Type": "application/json"}
HEAD = f'{{"model": "{MODEL}", "prompt": "a"'
USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SECRETS = re.compile(r"site-packages|\.py\b|Traceback|npu_zoo\.|/home|/usr")
LONGEST_S = 20.0


@dataclass(frozen=True)
class Case:
    """A request and what is to come of it; a status of None is any but a server's error."""

    path: str
    body: bytes
    status: int | None = 400
    param: str | None = None
    said: str = ""
    headers: dict[str, str] = field(default_factory=lambda: JSON)
    method: str = "POST"


def raw(body: bytes | str, param: str | None = None, said: str = "", *, path: str = TEXT, **more: Any) -> Case:
    return Case(path, body.encode() if isinstance(body, str) else body, param=param, said=said, **more)


def text(param: str | None, said: str = "", **fields: Any) -> Case:
    body = {"model": MODEL, "prompt": "def f(x):", "max_tokens": 4, **fields}
    return Case(TEXT, json.dumps(body).encode(), param=param, said=said)


def chat(param: str | None, said: str = "", **fields: Any) -> Case:
    body = {"model": MODEL, "messages": [USER], "max_tokens": 4, **fields}
    return Case(CHAT, json.dumps(body).encode(), param=param, said=said)


def with_number(name: str, literal: str, said: str = "") -> Case:
    return raw(f'{HEAD}, "{name}": {literal}}}', name, said)


def formed(**form: Any) -> Case:
    return text("structured_outputs", "structured_outputs cannot be used", structured_outputs=form)


def schemed(schema: Any, param: str = "response_format", said: str = "response_format cannot be used") -> Case:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return chat(param, said, response_format=form)


def tool(parameters: Any = None, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **fields}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


BODIES = {
    "empty": raw(b"", said="not JSON"),
    "cut off": raw(b'{"model": ', said="column 11"),
    "no JSON": raw(b"prompt=a", said="not JSON"),
    "a list": raw(b"[]", said="a JSON object, not a list"),
    "null": raw(b"null", said="not null"),
    "a number": raw(b"1", said="not a number"),
    "a string": raw(b'"a"', said="not a string"),
    "no UTF-8": raw(b'{"prompt": "\xff"}', said="not UTF-8: byte 12"),
    "UTF-16": raw('{"prompt": "a"}'.encode("utf-16"), said="not UTF-8"),
    "brackets": raw(b'{"prompt": ' + b"[" * 100_000, said="nests deeper"),
    "nested": raw(f'{{"model": "{MODEL}", "prompt": {"[" * 200}{"]" * 200}}}', "prompt.0.0", "nests deeper"),
    "half a pair": raw(b'{"model": "m", "prompt": "a\\ud800"}', "prompt", "half a surrogate pair"),
    "half a pair in a name": raw(b'{"\\udc00": 1}', "\\udc00", "half a surrogate pair"),
    "fields twice": raw(f'{{"model": "{MODEL}", "prompt": "a", "n": 1, "n": -2}}', "n", "at least 1, not -2"),
    "nothing": raw(b"{}", "model", "model is required; prompt is required"),
    "nulls": text("model", "must be a string, not null", model=None, prompt=None),
    "too large": raw(b'{"prompt": "' + b"a" * 5_000_000 + b'"}', said="4194304 bytes may be sent", status=413),
    "no type": raw(b"{}", said="of no stated type", status=415, headers={}),
    "another type": raw(b"{}", said="text/plain", status=415, headers={"Content-Type": "text/plain"}),
    "a form": raw(b"prompt=a", status=415, headers={"Content-Type": "application/x-www-form-urlencoded"}),
    "packed": raw(b"{}", said="in the coding 'gzip'", status=415, headers={**JSON, "Content-Encoding": "gzip"}),
    "another method": raw(b"", said="does not take GET", status=405, method="GET"),
    "a method of its own": raw(b"", said="does not take BREW", status=405, method="BREW"),
    "another path": raw(b"{}", said="there is nothing at /v1/complete", status=404, path="/v1/complete"),
    "a path with a slash": raw(b"{}", said="nothing at /tokenize/", status=404, path="/tokenize/"),
    "another host": raw(b"{}", said="--allowed-host", headers={**JSON, "Host": "evil.example"}),
    "no host": raw(b"{}", said="--allowed-host", headers={**JSON, "Host": "["}),
}

NUMBERS = {
    "NaN": with_number("temperature", "NaN", "temperature is NaN"),
    "Infinity": with_number("top_p", "-Infinity", "top_p is -Infinity"),
    "beyond floats": with_number("temperature", "1e999", "finite"),
    "digits": with_number("max_tokens", "9" * 4000, "(4000 characters)"),
    "more digits": with_number("seed", "9" * 5000, "an integer of 5000 digits"),
    "digits for a float": with_number("temperature", "9" * 4000),
    "digits below": raw(f'{HEAD}, "logit_bias": {{"1": {"9" * 400}}}}}', "logit_bias.1", "must be a number"),
    "negative": text("max_tokens", "at least 0, not -1", max_tokens=-1),
    "a float": text("n", "must be an integer, not 1.5", n=1.5),
    "true": text("max_tokens", "must be an integer, not true", max_tokens=True),
    "text": text("temperature", 'must be a number, not "1"', temperature="1"),
    "many faults": text("top_p", "and 1 more faults", n=0, seed="a", top_p=0, top_k=-2, min_p=2, logprobs=-1),
    "n": text("n", "at most 32768, not 1000000", n=10**6),
    "n within the type": text("n", "n asks for 1000 answers", n=1000),
    "n of all prompts": text("n", "2560 answers to all prompts", n=10, prompt=["a"] * 256),
    "temperature": text("temperature", "at most 2, not 2.1", temperature=2.1),
    "log-probabilities": text("logprobs", "at most 20", logprobs=1000),
    "log-probabilities of a chat": chat("top_logprobs", "at most 20", logprobs=True, top_logprobs=1000),
    "min_tokens": text("min_tokens", "min_tokens=10 is above the 4 tokens", min_tokens=10),
    "priority": text("priority", "at most 2147483647", priority=2**31),
    "max_time": text("max_time", "above 0", max_time=0),
    "best_of": text("best_of", "best_of is 3 where n is 1", best_of=3),
    "none without echo": text("max_tokens", "without echo", max_tokens=0),
}

PROMPTS = {
    "too long": text("prompt", "max_model_len=2048 leaves room for 2047", prompt="word " * 5000),
    "too long ids": text("prompt", "the prompt has 5000 tokens", prompt=[1] * 5000),
    "too long chat": chat("messages", "the prompt has", messages=[{"role": "user", "content": "word " * 5000}]),
    "no room": text("max_tokens", "ask for at most 8", prompt=[5] * 2040, max_tokens=9),
    "empty list": text("prompt", "not empty", prompt=[]),
    "empty lists": text("prompt.0", "at least 1", prompt=[[]]),
    "mixed": text("prompt.1", "must be a string, not 1", prompt=["a", 1]),
    "booleans": text("prompt", "a list of token ids", prompt=[True]),
    "too many": text("prompt", "at most 256", prompt=["a"] * 300),
    "no token": text("prompt", "ids are 0 to 1023", prompt=[5, 1024]),
    "negative token": text("prompt.0", "at least 0", prompt=[-1]),
    "suffix": text("suffix", "no fill-in-the-middle format", suffix="a"),
    "a thousand stops": text("stop", "1000 stop strings; at most 16", stop=[str(n) for n in range(1000)]),
    "empty stop": text("stop", "empty string", stop=["a", ""]),
    "long stop": text("stop", "5000 characters", stop="a" * 5000),
    "stop of numbers": text("stop.0", "must be a string", stop=[1]),
    "stop token": text("stop_token_ids", "5000, which is no token id", stop_token_ids=[5000]),
    "bias of no token": text("logit_bias", "'a', which is no token id", logit_bias={"a": 1}),
    "bias out of range": text("logit_bias.5", "at most 100", logit_bias={"5": 101}),
    "many biases": text("logit_bias", "at most 1024", logit_bias={str(n): 1 for n in range(2000)}),
    "stream_options": text("stream_options", "stream alone", stream_options={"include_usage": True}),
}

NAMES = {
    "unknown model": text("model", "served: deepseek_v3:demo, deepseek_v3", model="gpt-4"),
    "lines in a model": text("model", r"'a\r\nSet-Cookie: b'", model="a\r\nSet-Cookie: b"),
    "long model": text("model", "x" * 200, model="x" * 100_000),
    "NUL": text("model", r"'\x00'", model="\0"),
    "unknown field": text("temprature", "did you mean temperature?", temprature=1),
    "another server's": text("guided_json", "use structured_outputs", guided_json={}),
    "OpenAI's old": chat("functions", "use tools", functions=[]),
    "inside": text(
        "stream_options.include_use", "did you mean include_usage?", stream=True, stream_options={"include_use": 1}
    ),
}
NAMES = {name: Case(**{**vars(case), "status": 404 if case.param == "model" else 400}) for name, case in NAMES.items()}

MESSAGES = {
    "none": chat("messages", "at least 1", messages=[]),
    "no list": chat("messages", "must be a list", messages="hi"),
    "null": chat("messages.0", "an object whose role is", messages=[None]),
    "role": chat("messages.0", "an object whose role is", messages=[{"role": "king", "content": "a"}]),
    "no content": chat("messages.1.content", "is required", messages=[USER, {"role": "user"}]),
    "null content": chat("messages.0.content", "a string or a list", messages=[{"role": "user", "content": None}]),
    "nothing said": chat("messages.1.content", "no tool_calls", messages=[USER, {"role": "assistant"}]),
    "an image": chat(
        "messages.0.content.0.type",
        "text parts only",
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    ),
    "too many": chat("messages", "at most 4096", messages=[USER] * 5000),
    "a result of no call": chat(
        "messages.1", "no message with tool_calls", messages=[USER, {"role": "tool", "content": "4"}]
    ),
    "a result of another call": chat(
        "messages.2.tool_call_id",
        'is "c2"',
        messages=[
            USER,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": "4", "tool_call_id": "c2"},
        ],
    ),
    "arguments that are no text": chat(
        "messages.1.tool_calls.0.function.arguments",
        "must be a string",
        messages=[USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]}],
    ),
    "a template's variable": chat("messages", "reads no variable", chat_template_kwargs={"nothing": 1}),
    "max_tokens twice": chat("max_completion_tokens", "contradicts", max_completion_tokens=5),
    "top_logprobs alone": chat("top_logprobs", "logprobs alone", top_logprobs=2),
}

TOOLS = {
    "null": chat("tools.0", "must be an object", tools=[None]),
    "no name": chat("tools.0.function.name", "is required", tools=[{"type": "function", "function": {}}]),
    "name": chat("tools.0.function.name", "does not", tools=[tool(name="a b")]),
    "type": chat("tools.0.type", "must be 'function'", tools=[{**tool(), "type": "web"}]),
    "twice": chat("tools", "two functions of the name f", tools=[tool(), tool()]),
    "too many": chat("tools", "at most 128", tools=[tool(name=f"f{n}") for n in range(200)]),
    "parameters of another type": chat(
        "tools.1.function.parameters", 'not of "array"', tools=[tool(name="g"), tool({"type": "array"})]
    ),
    "parameters of no type": chat("tools.0.function.parameters", 'not of "objec"', tools=[tool({"type": "objec"})]),
    "parameters that lead nowhere": chat(
        "tools.1.function.parameters",
        "Pointer '/x' does not exist",
        tools=[tool(name="g"), tool({"properties": {"a": {"$ref": "#/x"}}})],
        tool_choice="required",
    ),
    "parameters that nothing meets": chat(
        "tools.0.function.parameters",
        "Unsatisfiable",
        tools=[tool({"properties": {"a": False}, "required": ["a"]})],
        tool_choice="required",
    ),
    "choice without tools": chat("tool_choice", "there are none", tool_choice="required"),
    "choice of another": chat(
        "tool_choice",
        "not among the tools: f",
        tools=[tool()],
        tool_choice={"type": "function", "function": {"name": "g"}},
    ),
    "choice of no kind": chat("tool_choice", "'none', 'auto' or 'required'", tools=[tool()], tool_choice="always"),
    "a form that leaves no room": chat(
        "structured_outputs", "no room for tool calls", tools=[tool()], structured_outputs={"regex": "a"}
    ),
}

FORMS = {
    "none": text("structured_outputs", "given none", structured_outputs={}),
    "two": text("structured_outputs", "given regex and choice", structured_outputs={"regex": "a", "choice": ["a"]}),
    "unknown": text("structured_outputs.reg", "did you mean regex?", structured_outputs={"reg": "a"}),
    "no choice": text("structured_outputs.choice", "at least 1", structured_outputs={"choice": []}),
    "empty choice": text("structured_outputs.choice.0", "at least 1", structured_outputs={"choice": [""]}),
    "both": chat(
        "structured_outputs", "both say", structured_outputs={"regex": "a"}, response_format={"type": "json_object"}
    ),
    "format": chat("response_format.type", 'not "xml"', response_format={"type": "xml"}),
    "format as text": chat("response_format", "must be an object", response_format="json"),
    "no schema": chat("response_format.json_schema", "is required", response_format={"type": "json_schema"}),
    "no name": chat(
        "response_format.json_schema.name",
        "is required",
        response_format={"type": "json_schema", "json_schema": {"schema": {}}},
    ),
    "schema of a list": text("structured_outputs.json", "an object, true or false", structured_outputs={"json": []}),
    "schema that is false": formed(json=False),
    "schema of no type": schemed({"type": "strin"}),
    "schema with a wrong word": schemed({"required": 5}),
    "schema that nothing meets": schemed({"type": "number", "minimum": 5, "maximum": 4}),
    "schema of digits": with_number("structured_outputs", f'{{"json": {{"minimum": {"9" * 4000}}}}}'),
    "schema beyond floats": raw(
        f'{HEAD}, "structured_outputs": {{"json": {{"minimum": 1e400}}}}}}', "structured_outputs.json"
    ),
    "schema from a file": schemed({"$ref": "file:///etc/passwd"}),
    "schema from elsewhere": schemed({"$ref": "http://127.0.0.1:9/a"}),
    "regex": formed(regex="("),
    "regex that looks ahead": formed(regex="(?=a)b"),
    "grammar without a start": formed(grammar='x: "a"'),
    "grammar of nothing": formed(grammar="start: nothing"),
    "grammar with a NUL": formed(grammar='start: "\0"'),
    "grammar from a file": formed(grammar='%import /etc/passwd\nstart: "a"'),
}


def chain(rules: int, last: str) -> str:
    """Rules that each lead to the next one."""
    names = ["".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=3)][:rules]
    lines = [f'{name}:"a"{following}' for name, following in itertools.pairwise(names)]
    return "\n".join([f"start: {names[0]}", *lines, f"{names[-1]}: {last}"])


def doubled(what: str, times: int) -> str:
    """A token of 2 to the power of ``times`` parts."""
    return "\n".join([f"start: T{times}", f"T0: {what}", *(f"T{n}: T{n - 1} T{n - 1}" for n in range(1, times + 1))])


def alternatives(depth: int, name: str = "p") -> dict[str, Any]:
    """Objects to choose from, 5 to the power of ``depth``."""
    if not depth:
        return {"type": "object", "properties": {name: {}}}
    return {"anyOf": [alternatives(depth - 1, f"{name}{n}") for n in range(5)]}


def referring(times: int, schema: Callable[[dict[str, str]], dict[str, Any]]) -> dict[str, Any]:
    """Schemas that are each made of the next one."""
    definitions = {f"{n}": schema({"$ref": f"#/$defs/{n + 1}"}) for n in range(times)}
    return {"$defs": {**definitions, f"{times}": {}}, "$ref": "#/$defs/0"}


def maybe(case: Case) -> Case:
    """A form that a server may take as well, as long as it costs it nothing much."""
    return Case(case.path, case.body, None)


BOMBS = {
    "deep": schemed(nested(400), "response_format.json_schema.schema", "nests deeper"),
    "deep text": formed(json=json.dumps(nested(400))),
    "deeper text": text(
        "structured_outputs.json", "no JSON", structured_outputs={"json": '{"not":' * 7000 + "{}" + "}" * 7000}
    ),
    "wide": maybe(schemed({"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(1500)}})),
    "recursive": schemed({"$ref": "#"}),
    "recursive by two": schemed(
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    ),
    "a long way": maybe(formed(json=referring(1200, lambda following: {"items": following}))),
    "enum": maybe(schemed({"enum": [f"value {n}" for n in range(3000)]})),
    "larger enum": schemed(
        {"enum": [f"value {n}" for n in range(9000)]}, "response_format.json_schema.schema", "at most 65536"
    ),
    "minLength": maybe(schemed({"type": "string", "minLength": 10**9})),
    "minItems": maybe(schemed({"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}})),
    "minItems of digits": formed(json='{"type": "array", "minItems": ' + "9" * 400 + "}"),
    "alternatives": maybe(schemed(alternatives(4))),
    "alternatives of all": schemed(
        {
            "allOf": [
                {"anyOf": [{"type": "object", "properties": {f"p{a}.{b}": {"type": "string"}}} for a in range(4)]}
                for b in range(20)
            ]
        }
    ),
    "doubled objects": maybe(
        schemed(
            referring(60, lambda following: {"properties": {"a": following, "b": following}, "required": ["a", "b"]})
        )
    ),
    "divisors": schemed({"allOf": [{"type": "integer", "multipleOf": n} for n in (10007, 10009, 10037, 10039)]}),
    "pattern": maybe(schemed({"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"})),
    "empty patterns": formed(json={"type": "string", "pattern": "a*" * 20_000}),
    "nested regex": formed(regex="(" * 20_000 + ")" * 20_000),
    "repeated regex": maybe(formed(regex="(((a{1,1000}){1,1000}){1,1000})")),
    "empty regex": formed(regex="a*" * 30_000),
    "ambiguous regex": maybe(formed(regex="(.*)(.*)(.*)(.*)a.{25}")),
    "long regex": text(
        "structured_outputs.regex", "70000 bytes; at most 65536", structured_outputs={"regex": "a" * 70_000}
    ),
    "choices": maybe(text("", structured_outputs={"choice": [str(n) for n in range(8000)]})),
    "more choices": text(
        "structured_outputs.choice", "at most 8192", structured_outputs={"choice": [str(n) for n in range(100_000)]}
    ),
    "nested grammar": formed(grammar="start: " + "(" * 10_000 + '"a"' + ")" * 10_000),
    "long way of rules": maybe(formed(grammar=chain(4000, '"a"'))),
    "long way to nothing": formed(grammar=chain(4000, "nothing")),
    "doubled rules": maybe(
        formed(grammar='start: t40\nt0: "a"?\n' + "\n".join(f"t{n}: t{n - 1} t{n - 1}" for n in range(1, 41)))
    ),
    "doubled tokens": formed(grammar=doubled("/a*/", 14)),
    "more doubled tokens": formed(grammar=doubled("/a*/", 30)),
    "doubled alternatives": formed(grammar=doubled("/a*b?/", 14)),
    "intersections": formed(grammar="start: T\nT: " + " & ".join(f"/.*a.{{{n}}}/" for n in range(1, 16))),
    "repeated rules": maybe(formed(grammar='start: ("a"{0,100000}){0,100000}')),
}

OTHERS = {
    "nothing to tokenize": raw(b"{}", "prompt", "or messages is required", path="/tokenize"),
    "tools of a text": raw(json.dumps({"prompt": "a", "tools": [tool()]}), "tools", "messages alone", path="/tokenize"),
    "tokens as text": raw(b'{"tokens": "a"}', "tokens", "must be a list", path="/detokenize"),
    "tokens of another model": raw(b'{"tokens": [5000]}', "tokens", "ids are 0 to 1023", path="/detokenize"),
    "negative tokens": raw(b'{"tokens": [-1]}', "tokens.0", "at least 0", path="/detokenize"),
}

KINDS = {
    "body": BODIES,
    "number": NUMBERS,
    "prompt": PROMPTS,
    "name": NAMES,
    "message": MESSAGES,
    "tool": TOOLS,
    "form": FORMS,
    "bomb": BOMBS,
    "other": OTHERS,
}
CASES = {f"{kind}: {name}": case for kind, cases in KINDS.items() for name, case in cases.items()}


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


def send(http: httpx.Client, case: Case) -> httpx.Response:
    return http.request(case.method, case.path, content=case.body, headers=case.headers)


def check(case: Case, response: httpx.Response) -> None:
    assert response.headers["x-request-id"]
    if case.status is None and response.status_code == 200:
        return
    assert response.status_code == (case.status or 400), response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert case.said in error["message"]
    assert len(error["message"]) < 1500
    assert not SECRETS.search(error["message"])
    if case.status is not None:
        assert error["param"] == case.param


class Beside:
    """Does something again and again in a thread of its own, as long as the block lasts."""

    def __init__(self, act: Callable[[], str]) -> None:
        self.results: list[str] = []
        self._act, self._over = act, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            self.results.append(self._act())


def streamed(http: httpx.Client, body: dict[str, Any]) -> str:
    found = ""
    with http.stream("POST", TEXT, json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                found += json.loads(line[6:])["choices"][0]["text"]
    return found


IDLE = {
    "vllm:num_requests_running": 0.0,
    "vllm:num_requests_waiting": 0.0,
    "vllm:kv_cache_usage_perc": 0.0,
    "npu_zoo_requests_in_flight": 0.0,
    "npu_zoo_engine_restarts_total": 0.0,
}


def wait_idle(server: RunningServer) -> None:
    """Wait until the server holds nothing for anybody; what it tells comes after the last answer."""
    deadline = time.monotonic() + 10
    while (found := gauges(server)) != IDLE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found == IDLE


def gauges(server: RunningServer) -> dict[str, float]:
    families = text_string_to_metric_families(server.get("/metrics")[1])
    samples = [sample for family in families for sample in family.samples]
    return {sample.name: sample.value for sample in samples if sample.name in IDLE}


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.long)])
def test_nobody_else_notices(server: RunningServer, http: httpx.Client, oracle: LLM, step: int) -> None:
    body = {"model": MODEL, "prompt": "def f(x):", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
    params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
    expected = oracle.generate("def f(x):", params)[0].outputs[0].text
    processes = server.children
    with Beside(lambda: streamed(http, body)) as beside:
        for case in [*CASES.values()][::step]:
            check(case, send(http, case))
    assert beside.results
    assert set(beside.results) == {expected}
    assert server.children == processes
    assert server.get("/health/ready") == (200, {"status": "ok"})
    wait_idle(server)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_wrong_is_told(http: httpx.Client, case: Case) -> None:
    start = time.monotonic()
    check(case, send(http, case))
    assert time.monotonic() - start < LONGEST_S


def test_a_stream_that_cannot_begin_has_a_status(http: httpx.Client) -> None:
    response = http.post(CHAT, json={"model": MODEL, "messages": [], "stream": True})
    assert (response.status_code, response.headers["content-type"]) == (400, "application/json")
