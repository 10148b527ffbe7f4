"""A server of a test's own, in a thread: it does what no real one could be brought to do when asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

MODELS = {"object": "list", "data": [{"id": "stub", "object": "model", "owned_by": "stubs", "max_model_len": 4096}]}


class Reply:
    """What goes back on one connection."""

    def __init__(self, writer: asyncio.StreamWriter, body: Any, headers: Mapping[str, str]) -> None:
        self._writer, self.body, self.headers = writer, body, headers

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def json(self, data: Any, status: int = 200, reason: str = "OK") -> None:
        body = json.dumps(data).encode()
        head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        await self.raw(head.encode() + b"Connection: close\r\n\r\n" + body)

    async def begin_stream(self, *, chunked: bool = False) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
        await self.raw(head + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"\r\n"))

    async def event(self, data: Any) -> None:
        await self.raw(f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode())


Handler = Callable[[Reply], Awaitable[None]]


def token(text: str = "ab", finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


def usage(prompt: int, output: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}}


def prompt_length(body: Mapping[str, Any]) -> int:
    prompt = body.get("prompt", "")
    return len(prompt.split()) if isinstance(prompt, str) else len(prompt)


def completion(delays: Sequence[float] = (), *, with_usage: bool = True, chunked: bool = False) -> Handler:
    """A whole answer of max_tokens tokens, each after a delay."""

    async def handle(reply: Reply) -> None:
        count = reply.body["max_tokens"]
        await reply.begin_stream()
        for number in range(count):
            await asyncio.sleep(delays[number % len(delays)] if delays else 0)
            await reply.event(token(finish="length" if number == count - 1 else None))
        if with_usage and reply.body.get("stream_options", {}).get("include_usage"):
            await reply.event(usage(prompt_length(reply.body), count))
        await reply.event("[DONE]")

    return handle


async def list_models(reply: Reply) -> None:
    await reply.json(MODELS)


def status(code: int, reason: str, data: Any) -> Handler:
    async def handle(reply: Reply) -> None:
        await reply.json(data, code, reason)

    return handle


class Stub(contextlib.AbstractContextManager["Stub"]):
    """Attributes:
    bodies: of the requests so far, by path.
    keys: their Authorization headers.
    running, most: requests under way, now and at most.
    """

    def __init__(self, **handlers: Handler) -> None:
        self.handlers: dict[str, Handler] = {"/v1/models": list_models}
        for name, handler in handlers.items():
            path = "/tokenize" if name == "tokenize" else "/version" if name == "version" else f"/v1/{name}"
            self.handlers[path.replace("chat", "chat/completions")] = handler
        self.bodies: list[tuple[str, Any]] = []
        self.keys: list[str | None] = []
        self.running = self.most = 0
        self._writers: list[asyncio.StreamWriter] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def generations(self) -> list[Any]:
        return [body for path, body in self.bodies if path.endswith("completions")]

    def __enter__(self) -> Stub:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _close(self) -> None:
        self._server.close()
        await _some_turns()  # in which connections that were just made come to their handlers
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await _some_turns()  # in which transports close their sockets

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        data = await reader.readexactly(int(headers.get("content-length", 0)))
        path, body = head[0].split()[1], json.loads(data) if data else None
        self.bodies.append((path, body))
        self.keys.append(headers.get("authorization"))
        handler = self.handlers.get(path, status(404, "Not Found", {"detail": "Not Found"}))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await handler(Reply(writer, body, headers))
        finally:
            self.running -= 1


async def _some_turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)
