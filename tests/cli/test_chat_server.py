"""``chat --server`` against a stand-in server with faults."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from npu_zoo.cli.chat import Conversation
from npu_zoo.cli.server_answers import OpenAIServer, ServerAnswerer, ServerError
from npu_zoo.core.errors import ConfigError

Respond = Callable[["Handler"], None]


class Handler(http.server.BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers), None))
        self.server.models(self)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        answer = self.server.answers[min(self.server.answered, len(self.server.answers) - 1)]
        self.server.answered += 1
        answer(self)

    def log_message(self, *args: object) -> None:
        pass


class StandIn(http.server.ThreadingHTTPServer):
    """Answers the nth request with the nth of its answers, and all further ones with the last."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self.models: Respond = sends(200, {"object": "list", "data": [{"id": "first"}]})
        self.answers: list[Respond] = []
        self.answered = 0
        self.hung_up = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for _, _, body in self.seen if body is not None]


def sends(status: int, body: Any, **headers: str) -> Respond:
    """A whole answer; headers' underscores are hyphens."""

    def respond(handler: Handler) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        handler.wfile.write(raw)

    return respond


def streams(*pieces: bytes, then: Respond | None = None) -> Respond:
    """A body in pieces, each in a packet of its own; the connection ends it."""

    def respond(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.end_headers()
        for piece in pieces:
            handler.wfile.write(piece)
            handler.wfile.flush()
        if then is not None:
            then(handler)
        handler.close_connection = True

    return respond


def event(delta: dict[str, Any] | None = None, finish: str | None = None, **members: Any) -> bytes:
    choices = [{"index": 0, "delta": delta or {}, "finish_reason": finish}]
    return f"data: {json.dumps({'choices': choices, **members}, ensure_ascii=False)}\n\n".encode()


def says(*texts: str) -> Respond:
    pieces = [event({"role": "assistant", "content": ""}), *(event({"content": text}) for text in texts)]
    usage = b'data: {"choices": [], "usage": {"total_tokens": 3}}\n\n'
    return streams(*pieces, event(finish="stop"), usage, b"data: [DONE]\n\n")


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as stand_in:
        thread = threading.Thread(target=stand_in.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield stand_in
        stand_in.shutdown()
        thread.join()


def talk(server: StandIn, *lines: str, key: str | None = None, **parameters: Any) -> list[dict[str, str]]:
    given = iter(lines)

    def read_line() -> str:
        for line in given:
            return line
        raise EOFError

    conversation = Conversation(ServerAnswerer(OpenAIServer(server.url, key), None, parameters))
    conversation.loop(read_line)
    return conversation.messages


def contents(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


def test_turns_go_to_the_server_with_all_that_was_said(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers = [says("Hel", "lo"), says("again")]
    talk(server, "hi", "/system be brief", "one", "two", "/clear", "three", temperature=0.5)
    assert capsys.readouterr().out.startswith("Hello\n(system message set)\nagain\n")
    first, *_, two, three = server.bodies
    assert first == {
        "model": "first",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "temperature": 0.5,
    }
    assert contents(two["messages"]) == ["be brief", "one", "again", "two"]
    assert contents(three["messages"]) == ["be brief", "three"]
    assert [path for path, _, _ in server.seen] == ["/v1/models", *["/v1/chat/completions"] * 4]


def test_reasoning_is_shown_and_stays_out_of_the_history(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    deltas = [event({"reasoning_content": "Why"}), event({"reasoning_content": "?", "content": None})]
    server.answers = [streams(*deltas, event({"content": "So"}), event(finish="stop"), b"data: [DONE]\n\n")]
    assert contents(talk(server, "hi")) == ["hi", "So"]
    assert capsys.readouterr().out == "Why?\n\nSo\n\n"


def test_a_stream_in_an_odd_form_is_the_same_answer(server: StandIn) -> None:
    body = event({"content": "grün "}).replace(b"\n", b"\r\n") + b": keep-alive\r\n\r\n"
    body += b'data: {"choices":\ndata: [{"delta": {"content": "\xe6\x95\xb0"}}]}\n\n' + event(finish="length")
    server.answers = [streams(*(body[i : i + 1] for i in range(len(body))))]
    assert contents(talk(server, "hi")) == ["hi", "grün 数"]


def test_a_server_that_does_not_stream_answers_all_the_same(server: StandIn) -> None:
    message = {"role": "assistant", "content": "whole"}
    server.answers = [sends(200, {"choices": [{"message": message, "finish_reason": "stop"}]})]
    assert contents(talk(server, "hi")) == ["hi", "whole"]


def cut(handler: Handler) -> None:
    """End the connection with a reset, as the end of a process does while there is something unread."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.connection.close()


def chunked(handler: Handler) -> None:
    """A chunked body that ends in the middle of a chunk."""
    piece = event({"content": "ab"})
    handler.wfile.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        + f"{len(piece):x}\r\n".encode()
        + piece
        + b"\r\n100\r\ndata"
    )
    handler.close_connection = True


GARBAGE = b'data: {"choices": [}\n\n'


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (streams(event({"content": "ab"})), "lost in the middle of the answer"),
        (streams(event({"content": "ab"}), b'data: {"cho'), "lost in the middle of the answer"),
        (streams(event({"content": "ab"}), then=cut), "lost in the middle of the answer"),
        (chunked, "lost in the middle of the answer"),
        (streams(event({"content": "ab"}), GARBAGE), "no JSON"),
        (streams(event({"content": "ab"}), b"data: 7\n\n"), "no answer"),
        (streams(event({"content": "ab"}), b'data: {"error": {"message": "out of\\u001b[2J blocks"}}\n\n'), "blocks"),
        (streams(event({"content": "ab"}), b"\xfe" * 2**21), "no stream of tokens"),
    ],
)
def test_an_answer_that_breaks_off_is_said_and_the_conversation_goes_on(
    server: StandIn, capsys: pytest.CaptureFixture[str], answer: Respond, said: str
) -> None:
    server.answers = [answer, says("fine")]
    assert contents(talk(server, "hi", "on")) == ["hi", "ab", "on", "fine"]
    captured = capsys.readouterr()
    assert captured.out == "ab\nfine\n\n"
    assert said in captured.err
    assert "what came of the answer is kept" in captured.err
    assert "\x1b" not in captured.err


def refusal(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "x", "param": None, "code": None}}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (sends(401, refusal("Incorrect API key")), ["401", "Incorrect API key", "NPU_ZOO_API_KEY"]),
        (sends(429, refusal("slow down"), Retry_After="7"), ["429", "slow down", "try again in 7 s"]),
        (sends(429, b""), ["429", "try again later"]),
        (sends(503, b"<html>\x1b[2J busy"), ["503"]),
        (sends(500, {"error": "plain text"}), ["500", "plain text"]),
        (sends(400, {"detail": [{"loc": 1}]}), ["400", "loc"]),
        (sends(404, refusal("no model\x1b[2J of that name " * 100)), ["404", "no model", "…"]),
        (sends(404, b"<html>"), ["404", "--model"]),
        (sends(307, b"", Location="http://elsewhere/"), ["307", "http://elsewhere/"]),
        (sends(200, b"<html>", Content_Type="text/html"), ["no JSON"]),
        (sends(200, {"hello": 1}), ["no answer"]),
        (cut, ["gave no answer"]),
        (streams(), ["lost"]),
    ],
)
def test_a_refusal_is_shown_and_what_was_said_is_forgotten(
    server: StandIn, capsys: pytest.CaptureFixture[str], answer: Respond, words: list[str]
) -> None:
    server.answers = [answer, says("fine")]
    assert contents(talk(server, "hi", "on")) == ["on", "fine"]
    captured = capsys.readouterr()
    assert [word for word in words if word not in captured.err] == []
    assert "\x1b" not in captured.err
    assert contents(server.bodies[1]["messages"]) == ["on"]


def too_long(most: int) -> Respond:
    """Refuses conversations of more messages, as servers say it."""
    error = {**refusal("too long")["error"], "code": "context_length_exceeded"}

    def respond(handler: Handler) -> None:
        count = len(handler.server.bodies[-1]["messages"])
        (says("fine") if count <= most else sends(400, {"error": error}))(handler)

    return respond


def test_the_oldest_turns_go_where_the_server_says_that_there_are_too_many(
    server: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers = [too_long(3)]
    assert contents(talk(server, "a", "b", "c")) == ["b", "fine", "c", "fine"]
    captured = capsys.readouterr()
    assert captured.err == "(the 2 oldest message(s) no longer fit and are forgotten)\n"
    assert contents(server.bodies[-1]["messages"]) == ["b", "fine", "c"]


def test_nothing_is_forgotten_where_that_does_not_help(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers = [says("one"), says("two"), too_long(0), too_long(0), too_long(0), says("three")]
    assert contents(talk(server, "a", "b", "c", "d")) == ["a", "one", "b", "two", "d", "three"]
    assert "too long" in capsys.readouterr().err


def test_an_interrupt_closes_the_connection_of_a_silent_server(
    server: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait(handler: Handler) -> None:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        if handler.connection.recv(1) == b"":
            server.hung_up.set()

    server.answers = [streams(event({"content": "ab"}), then=wait), says("fine")]
    assert contents(talk(server, "hi", "on")) == ["hi", "ab", "on", "fine"]
    assert capsys.readouterr().out == "ab\n(stopped)\nfine\n\n"
    assert server.hung_up.wait(10)


def test_an_interrupt_before_the_first_word_stops_too(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    def wait(handler: Handler) -> None:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        handler.connection.recv(1)

    server.answers = [wait, says("fine")]
    talk(server, "hi", "on")
    assert capsys.readouterr().out == "\n(stopped)\nfine\n\n"


def test_a_server_that_is_not_there_is_said(server: StandIn) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServerError, match=f"127.0.0.1:{port} cannot be reached: .*refused"):
        ServerAnswerer(OpenAIServer(f"http://127.0.0.1:{port}"), None, {})
    server.shutdown()


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (sends(200, {"data": []}), "serves no model"),
        (sends(200, {"models": ["a"]}), "lists no models"),
        (sends(200, b"<html>"), "no JSON"),
        (sends(404, b""), "--model"),
    ],
)
def test_a_server_that_names_no_model(server: StandIn, models: Respond, words: str) -> None:
    server.models = models
    with pytest.raises(ServerError, match=words):
        ServerAnswerer(OpenAIServer(server.url), None, {})
    assert ServerAnswerer(OpenAIServer(server.url), "mine", {}).model == "mine"


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_url_may_name_the_version(server: StandIn, end: str) -> None:
    assert OpenAIServer(server.url + end).models() == ["first"]
    assert OpenAIServer(server.url.removeprefix("http://") + end).models() == ["first"]


@pytest.mark.parametrize(
    "url", ["", "ftp://a", "http://", "http://a:b", "http://a:99999", "http://me:pw@a", "http://a?k=1"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--server"):
        OpenAIServer(url)


def test_a_proxy_is_not_asked_for_this_machine(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert OpenAIServer(server.url).models() == ["first"]


def test_the_command_talks_with_the_server(cli: Callable, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    server.models = sends(200, {"data": [{"id": "first"}, {"id": "second"}]})
    server.answers = [says("Hello")]
    monkeypatch.setenv("NPU_ZOO_API_KEY", " secret\n")
    monkeypatch.setenv("NPU_ZOO_MODEL", "deepseek_coder")
    ran = cli("chat", "--server", server.url, "--max-tokens", "5", "--stop", "x", stdin="hi\n")
    assert (ran.code, ran.out) == (0, "Hello\n\n")
    assert "first, second" in ran.err
    (body,) = server.bodies
    assert {key: body[key] for key in body if key != "messages"} == {
        "model": "first",
        "stream": True,
        "max_tokens": 5,
        "stop": ["x"],
    }
    assert {headers["Authorization"] for _, headers, _ in server.seen} == {"Bearer secret"}
    cli("chat", "--server", server.url, "--model", "second", stdin="hi\n")
    assert server.bodies[-1]["model"] == "second"


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("fault", ["refused", "broken off"])
def test_input_that_no_terminal_gives_ends_with_the_failure_of_an_answer(
    cli: Callable, server: StandIn, fault: str, at: int
) -> None:
    failed = sends(500, {"error": "broken"}) if fault == "refused" else streams(event({"content": "Hel"}))
    server.answers = [failed, says("fine")] if at == 0 else [says("fine"), failed]
    ran = cli("chat", "--server", server.url, stdin="hi\non\n")
    assert (ran.code, "fine" in ran.out, "error: " in ran.err) == (1, True, True)


def test_the_key_comes_from_the_variable_that_is_named(
    cli: Callable, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers = [says("Hello")]
    monkeypatch.setenv("MY_KEY", "other")
    assert cli("chat", "--server", server.url, "--api-key-env", "MY_KEY", stdin="hi\n").code == 0
    assert server.seen[-1][1]["Authorization"] == "Bearer other"
    ran = cli("chat", "--server", server.url, "--api-key-env", "NO_KEY", stdin="hi\n")
    assert (ran.code, "NO_KEY" in ran.err) == (2, True)
    monkeypatch.setenv("MY_KEY", "two\nlines")
    assert "no key has" in cli("chat", "--server", server.url, "--api-key-env", "MY_KEY").err


def test_options_of_a_model_here_are_refused(cli: Callable) -> None:
    ran = cli("chat", "--server", "http://localhost:1", "--weights", "w", "--tp", "2")
    assert ran.code == 2
    assert "--weights" in ran.err
    assert "--tp" in ran.err
    assert cli("chat", "--api-key-env", "X").code == 2


def test_no_torch_is_imported(server: StandIn) -> None:
    server.answers = [says("Hello")]
    program = (
        "import sys\nfrom npu_zoo.cli import main\n"
        f"code = main(['chat', '--server', {server.url!r}])\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'fastapi'} & set(sys.modules)\n"
        "sys.exit(f'{heavy}' if heavy else code)"
    )
    ran = subprocess.run([sys.executable, "-c", program], input="hi\n", capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "Hello\n\n"), ran.stderr
