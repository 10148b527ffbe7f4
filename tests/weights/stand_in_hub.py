"""A server on this machine that answers as Hugging Face and ModelScope do, and fails on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "deepseek-ai/deepseek-coder-1.3b-instruct"
COMMIT = "e063262dac8366fc1f28a4da0ff3c50ea66259ca"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
CONFIG = b'{"architectures": ["LlamaForCausalLM"]}\n'
CHECKPOINT: dict[str, bytes] = {
    ".gitattributes": b"*.bin filter=lfs\n",
    "LICENSE": b"the licence\n",
    "README.md": b"# a model\n",
    "config.json": CONFIG,
    "generation_config.json": b"{}\n",
    "model.safetensors": WEIGHTS,
    "modeling_model.py": b"raise SystemExit('run')\n",
    "pytorch_model.bin": b"pickled" * 100,
    "tokenizer.json": b'{"model": {}}\n',
    "empty.txt": b"",
    "figures/plot.png": b"png",
    "inference/convert.py": b"raise SystemExit('run')\n",
}
WANTED = {
    "LICENSE",
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "empty.txt",
}

Fault = Callable[["Handler", bytes], bool]
"""Answers a request for a file in its own way; False where it leaves the answer to the server."""


@dataclass
class Seen:
    """One request as it came."""

    host: str
    path: str
    headers: dict[str, str]


@dataclass
class StandInHub:
    """What the server holds and how it behaves; every answer is made from this when it is asked for.

    Attributes:
        lfs: paths that Hugging Face keeps as large files, and sends from another host.
        faults: by path, one for each request for the file; those that are left are answered well.
        token: the token that is asked for; empty asks for none.
        listed: entries to put in the place of the ones that the files give.
        hashes: whether ModelScope gives them.
    """

    files: dict[str, bytes] = field(default_factory=lambda: dict(CHECKPOINT))
    lfs: set[str] = field(default_factory=lambda: {"model.safetensors", "pytorch_model.bin"})
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    token: str = ""
    listed: list[dict[str, Any]] | None = None
    page_size: int = 5
    ranges: bool = True
    hashes: bool = True
    etag: str = '"one"'
    seen: list[Seen] = field(default_factory=list)
    port: int = 0
    release: threading.Event = field(default_factory=threading.Event)
    held: threading.Event = field(default_factory=threading.Event)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def requests_for(self, path: str) -> list[Seen]:
        """The requests for a file's content, without the redirects before them."""
        ends = (f"/cdn/{path}",) if path in self.lfs else (f"/{path}",)
        scope = f"FilePath={path}"
        return [s for s in self.seen if s.path.endswith(ends) or scope in s.path]


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\x00" + content).hexdigest()


def cut(after: int) -> Fault:
    """The connection ends after some bytes of the body."""

    def fault(handler: Handler, content: bytes) -> bool:
        body = handler.start_body(content)
        handler.wfile.write(body[:after])
        handler.close_connection = True
        return True

    return fault


def hold(after: int) -> Fault:
    """The connection falls silent after some bytes, until the test releases it."""

    def fault(handler: Handler, content: bytes) -> bool:
        body = handler.start_body(content)
        handler.wfile.write(body[:after])
        handler.wfile.flush()
        handler.hub.held.set()
        handler.hub.release.wait(30)
        handler.close_connection = True
        return True

    return fault


def status(code: int, **headers: str) -> Fault:
    def fault(handler: Handler, content: bytes) -> bool:
        handler.answer(code, b"", **headers)
        return True

    return fault


def body(content: bytes) -> Fault:
    """Another content than the listing says."""

    def fault(handler: Handler, _: bytes) -> bool:
        handler.send_content(content)
        return True

    return fault


def unannounced(content: bytes) -> Fault:
    """A content whose length only the end of the connection tells."""

    def fault(handler: Handler, _: bytes) -> bool:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(content)
        handler.close_connection = True
        return True

    return fault


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.hub.seen.append(Seen(self.headers["Host"], self.path, {k.lower(): v for k, v in self.headers.items()}))
        path = unquote(url.path)
        if path.startswith("/cdn/"):
            self.send_file(path.removeprefix("/cdn/"))
        elif self.hub.token and self.headers["Authorization"] != f"Bearer {self.hub.token}":
            self.answer(401, b"", **{"X-Error-Message": "Invalid username or password."})
        elif path.startswith("/api/v1/models/"):
            self.modelscope(path.removeprefix("/api/v1/models/"), query)
        else:
            self.huggingface(path, query)

    def huggingface(self, path: str, query: dict[str, str]) -> None:
        api = f"/api/models/{REPOSITORY}"
        resolve = f"/{REPOSITORY}/resolve/{COMMIT}/"
        if path in (f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            self.answer_json({"id": REPOSITORY, "sha": COMMIT, "private": False})
        elif path == f"{api}/tree/{COMMIT}" and query["recursive"].lower() == "true":
            self.tree(int(query.get("cursor", "0")))
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.hub.lfs:
            location = f"http://localhost:{self.hub.port}/cdn/{path.removeprefix(resolve)}"
            self.answer(302, b"", Location=location)
        elif path.startswith(resolve):
            self.send_file(path.removeprefix(resolve))
        else:
            self.answer(404, b"", **{"X-Error-Message": "Repository or revision not found"})

    def tree(self, start: int) -> None:
        entries = self.hub.listed if self.hub.listed is not None else [*self.folders(), *self.entries()]
        stop = start + self.hub.page_size
        headers = {}
        if stop < len(entries):  # with the hub's own address, as a mirror passes it on
            following = f"https://huggingface.co/api/models/{REPOSITORY}/tree/{COMMIT}?recursive=true&cursor={stop}"
            headers["Link"] = f'<{following}>; rel="next"'
        self.answer_json(entries[start:stop], **headers)

    def entries(self) -> Iterator[dict[str, Any]]:
        for path, content in self.hub.files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_blob(content)}
            if path in self.hub.lfs:
                sha256 = hashlib.sha256(content).hexdigest()
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n"
                entry["oid"] = git_blob(pointer.encode())
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}
            yield entry

    def folders(self) -> Iterator[dict[str, Any]]:
        for name in sorted({path.split("/")[0] for path in self.hub.files if "/" in path}):
            yield {"type": "directory", "path": name, "size": 0, "oid": git_blob(name.encode())}

    def modelscope(self, path: str, query: dict[str, str]) -> None:
        if path == f"{REPOSITORY}/repo/files" and query["Revision"] == "master":
            files = self.hub.listed if self.hub.listed is not None else list(self.scope_entries())
            self.answer_json({"Code": 200, "Data": {"Files": files}, "Message": "success", "Success": True})
        elif path == f"{REPOSITORY}/repo" and query["Revision"] == "master":
            self.send_file(query["FilePath"])
        else:
            self.answer(
                404, json.dumps({"Code": 10010205001, "Message": "record not found", "Success": False}).encode()
            )

    def scope_entries(self) -> Iterator[dict[str, Any]]:
        for folder in self.folders():
            yield {"Name": folder["path"], "Path": folder["path"], "Type": "tree", "Size": 0, "Sha256": "", "Mode": "0"}
        for path, content in self.hub.files.items():
            sha256 = hashlib.sha256(content).hexdigest() if self.hub.hashes else ""
            name = path.rpartition("/")[2]
            common = {"IsLFS": path in self.hub.lfs, "Mode": "33188", "Revision": COMMIT, "CommitMessage": "upload"}
            yield {"Name": name, "Path": path, "Type": "blob", "Size": len(content), "Sha256": sha256, **common}

    def send_file(self, path: str) -> None:
        content = self.hub.files.get(path)
        if content is None:
            self.answer(404, b"")
        elif not (self.hub.faults[path] and self.hub.faults[path].pop(0)(self, content)):
            self.send_content(content)

    def send_content(self, content: bytes) -> None:
        self.wfile.write(self.start_body(content))

    def start_body(self, content: bytes) -> bytes:
        """The head of an answer with a content, and the bytes that are due after it."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        fresh = self.headers.get("If-Range", self.hub.etag) == self.hub.etag
        first = int(asked[1]) if asked and self.hub.ranges and fresh else 0
        if first and first >= len(content):
            self.answer(416, b"")
            return b""
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("ETag", self.hub.etag)
        self.end_headers()
        return content[first:]

    def answer_json(self, value: Any, **headers: str) -> None:
        self.answer(200, json.dumps(value).encode(), **{"Content-Type": "application/json", **headers})

    def answer(self, code: int, content: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what the tests are about."""


@contextmanager
def serve() -> Iterator[StandInHub]:
    """A running server and what it holds."""
    hub = StandInHub()
    server = _Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.port = server.server_address[1]
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()
        thread.join()
