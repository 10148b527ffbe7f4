"""Who is served, and how much of it: keys, rates, queues, names, origins and time, as clients see them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from npu_zoo.testing.serving import RunningServer

from .raw_http import Answer, Connection, ask, wait_until
from .real_server import GREEDY, LONG, MODEL, PATH, SHORT, complete, is_idle, metric, paused, start

pytestmark = pytest.mark.slow

KEYS = {owner: f"sk-key-of-{owner}-5d41402abc4b" for owner in ("rated", "busy", "other", "third", "fourth", "patient")}
OWN = "a key in the environment"
ORIGIN = "https://app.example"
HOST = {"Host": "api.example"}
OPEN = ("/health", "/health/live", "/health/ready", "/metrics", "/version", "/openapi.json")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with every limit that there is; nothing may wait in it."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# ours\n" + "\n".join(KEYS.values()) + "\n")
    arguments = ["--api-key-file", str(file), "--rate-limit", "9", "--concurrency-limit", "2", "--max-queue", "0"]
    arguments += ["--allowed-host", "api.example", "--allowed-host", "127.0.0.1", "--cors-origin", ORIGIN]
    arguments += ["--request-timeout", "1", "--head-timeout", "1", "--log-format", "json"]
    with start(*arguments, sequences=3, NPU_ZOO_API_KEY=OWN) as server:
        yield server
        assert is_idle(server)
        assert not [key for key in (*KEYS.values(), OWN) if key in server.log]


def by(owner: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[owner]}"}


def tokenize(server: RunningServer, headers: dict[str, str]) -> Answer:
    return ask(server.url, "POST", "/tokenize", {"prompt": "a b c"}, headers)


def assert_too_many(answer: Answer, code: str) -> None:
    assert (answer.status, answer.error["code"], answer.error["type"]) == (429, code, "rate_limit_error")
    assert 1 <= int(answer.headers["Retry-After"]) <= 60


@pytest.mark.parametrize("path", OPEN)
def test_what_monitors_read_needs_no_key(guarded: RunningServer, path: str) -> None:
    assert ask(guarded.url, "GET", path).status == 200


@pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {KEYS['other']}", f"Bearer {KEYS['other']}x"])
def test_everything_else_needs_one(guarded: RunningServer, header: str | None) -> None:
    given = {"Authorization": header} if header else {}
    messages = {"messages": [{"role": "user", "content": "hi"}]}
    bodies = {"/v1/completions": SHORT, "/v1/chat/completions": messages, "/tokenize": {"prompt": "a"}}
    bodies |= {"/detokenize": {"tokens": [5]}}
    answers = [ask(guarded.url, "POST", path, body, given) for path, body in bodies.items()]
    answers += [ask(guarded.url, "GET", path, None, given) for path in ("/v1/models", f"/v1/models/{MODEL}")]
    assert [answer.status for answer in answers] == [401] * 6
    assert {answer.error["code"] for answer in answers} == {"invalid_api_key"}
    assert {answer.headers["WWW-Authenticate"] for answer in answers} == {"Bearer"}
    simple = ask(guarded.url, "POST", "/chat", {"prompt": "a"}, given)
    assert (simple.status, list(simple.json)) == (401, ["error"])


def test_keys_of_the_file_and_of_the_environment_are_accepted(guarded: RunningServer) -> None:
    for key in (KEYS["other"], OWN):
        assert complete(guarded, SHORT, {"Authorization": f"Bearer {key}"}).status == 200


def test_a_key_has_its_rate(guarded: RunningServer) -> None:
    assert [tokenize(guarded, by("rated")).status for _ in range(9)] == [200] * 9
    refused = tokenize(guarded, by("rated"))
    assert_too_many(refused, "rate_limit_exceeded")
    assert "9 requests a minute" in refused.error["message"]
    assert_too_many(complete(guarded, SHORT, by("rated")), "rate_limit_exceeded")
    assert tokenize(guarded, by("other")).status == 200


@contextlib.contextmanager
def held(server: RunningServer, *owners: str) -> Iterator[list[Connection]]:
    """A request of each owner, which the engine does not move on with."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(Connection(server.url)) for _ in owners]
        with paused(server.children["engine"]):
            for connection, owner in zip(connections, owners, strict=True):
                connection.post(PATH, SHORT, by(owner))
            wait_until(lambda: metric(server, "npu_zoo_requests_in_flight") == len(owners))
            yield connections
        assert [connection.answer().status for connection in connections] == [200] * len(owners)


def test_a_key_has_so_many_requests_at_once(guarded: RunningServer) -> None:
    with held(guarded, "busy", "busy"):
        assert_too_many(tokenize(guarded, by("busy")), "concurrency_limit_exceeded")
        assert tokenize(guarded, by("other")).status == 200
    assert tokenize(guarded, by("busy")).status == 200


def test_a_full_queue_refuses_whoever_comes(guarded: RunningServer) -> None:
    refusals = metric(guarded, "npu_zoo_requests_rejected_total", reason="queue_full")
    with held(guarded, "third", "third", "fourth"):
        refused = complete(guarded, SHORT, by("fourth"))
        assert_too_many(refused, "queue_full")
        assert metric(guarded, "npu_zoo_requests_rejected_total", reason="queue_full") == refusals + 1
    assert complete(guarded, SHORT, by("fourth")).status == 200


def test_room_is_counted_in_completions(guarded: RunningServer) -> None:
    several = {**SHORT, "n": 3, "temperature": 1}
    with held(guarded, "third"):
        assert_too_many(complete(guarded, several, by("fourth")), "queue_full")
        assert_too_many(complete(guarded, {**SHORT, "prompt": ["a", "b", "c"]}, by("fourth")), "queue_full")
    assert len(complete(guarded, several, by("fourth")).texts) == 3


@pytest.mark.parametrize("more", [{"n": 4, "temperature": 1}, {"prompt": ["a", "b"], "n": 2, "temperature": 1}])
def test_what_never_has_room_is_no_matter_of_time(guarded: RunningServer, more: dict[str, Any]) -> None:
    answer = complete(guarded, {**SHORT, **more}, {"Authorization": f"Bearer {OWN}"})
    assert (answer.status, answer.error["param"]) == (400, "n")
    assert "4 completions" in answer.error["message"]
    assert "3 at most" in answer.error["message"]


@pytest.mark.parametrize("limited", [{}, {"max_time": 100}])
def test_a_request_that_takes_too_long_ends_as_it_is(guarded: RunningServer, limited: dict[str, float]) -> None:
    answer = complete(guarded, {**LONG, **limited}, by("patient"))
    assert answer.status == 200
    (choice,) = answer.json["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "max_time")
    assert answer.json["usage"]["completion_tokens"] < 1900
    with Connection(guarded.url) as connection:
        connection.post(PATH, {**LONG, **limited, "stream": True}, by("patient"))
        *events, done = connection.events()
    assert done == "[DONE]"
    assert json.loads(events[-1])["choices"][0]["finish_reason"] == "length"


def test_a_request_may_have_less_time_than_the_server_gives(small_server: RunningServer) -> None:
    answer = complete(small_server, {**LONG, "max_time": 0.2})
    assert answer.json["choices"][0]["stop_reason"] == "max_time"


def test_a_slow_head_is_answered(guarded: RunningServer) -> None:
    with Connection(guarded.url) as connection:
        connection.send(b"POST /v1/completions HTTP/1.1\r\nHost: api.")
        assert connection.answer().status == 408
        assert connection.closed()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:80", "localhost:8000", "LOCALHOST", "localhost.", "[::1]:9"])
def test_a_server_on_the_loopback_answers_to_its_names(small_server: RunningServer, host: str) -> None:
    assert ask(small_server.url, "GET", "/version", None, {"Host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "[::2]", "", "a b", "::1"]
)
def test_and_to_no_other(small_server: RunningServer, host: str) -> None:
    """A page that made its own name stand for 127.0.0.1 would read what it answers."""
    for method, path in (("GET", "/v1/models"), ("POST", PATH), ("GET", "/health"), ("GET", "/nowhere")):
        answer = ask(small_server.url, method, path, {}, {"Host": host})
        assert (answer.status, answer.error["code"]) == (400, "host_not_allowed")
        assert "localhost" in answer.error["message"]
        assert answer.headers["X-Request-Id"]


def test_names_can_be_allowed(guarded: RunningServer) -> None:
    assert ask(guarded.url, "GET", "/version", None, HOST).status == 200
    assert ask(guarded.url, "GET", "/version", None, {"Host": "localhost"}).status == 400


def preflight(server: RunningServer, origin: str) -> Answer:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    headers |= {"Access-Control-Request-Headers": "authorization,content-type"}
    return ask(server.url, "OPTIONS", PATH, None, headers)


def test_no_web_origin_is_let_in(small_server: RunningServer) -> None:
    answers = [preflight(small_server, ORIGIN), ask(small_server.url, "GET", "/version", None, {"Origin": ORIGIN})]
    assert not [name for answer in answers for name in answer.headers if name.lower().startswith("access-control")]
    assert answers[0].status == 405


def test_a_named_web_origin_is_let_in(guarded: RunningServer) -> None:
    allowed = preflight(guarded, ORIGIN)
    assert (allowed.status, allowed.headers["Access-Control-Allow-Origin"]) == (200, ORIGIN)
    assert "POST" in allowed.headers["Access-Control-Allow-Methods"]
    assert "authorization" in allowed.headers["Access-Control-Allow-Headers"].lower()
    for path, status in (("/version", 200), ("/v1/models", 401), ("/nowhere", 404)):  # errors can be read as well
        answer = ask(guarded.url, "GET", path, None, {"Origin": ORIGIN})
        assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (status, ORIGIN)
        assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]


def test_other_web_origins_are_not(guarded: RunningServer) -> None:
    for origin in ("https://evil.example", "null", f"{ORIGIN}.evil.example", "http://app.example"):
        answers = [preflight(guarded, origin), ask(guarded.url, "GET", "/version", None, {"Origin": origin})]
        assert not [answer for answer in answers if answer.headers["Access-Control-Allow-Origin"]]


def test_a_page_cannot_send_a_request_without_asking_first(small_server: RunningServer) -> None:
    """What forms and simple requests of a page may send is not taken for JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None):
        answer = ask(small_server.url, "POST", PATH, GREEDY, {"Content-Type": kind})
        assert answer.status == 415
        assert "application/json" in answer.error["message"]
