"""A server of its own for a test or a benchmark."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_ADDRESS = re.compile(r"is served at (https?://\S+)/v1")
_PROGRAM = "npu_zoo.server.child"
_SECONDS_BETWEEN_LOOKS = 0.05


class RunningServer(contextlib.AbstractContextManager["RunningServer"]):
    """`npu-zoo serve` in a process of its own, ready when the ``with`` block begins and ended with it.

    Args:
        arguments: of the command; a free port is chosen unless they name one.
        environ: variables beside this process's.
        timeout: seconds that it may take to be ready, and to end.
        context: of TLS, where the server speaks it.

    Attributes:
        url: where it listens, without a path.
        pid: the supervisor's process.

    Raises:
        RuntimeError: it ends, or is not ready in time; says what it wrote.
    """

    url: str

    def __init__(
        self,
        arguments: Sequence[str],
        environ: Mapping[str, str] | None = None,
        *,
        timeout: float = 120.0,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._arguments = [*arguments, *([] if "--port" in arguments else ["--port", "0"])]
        self._environ = {**os.environ, **(environ or {})}
        self._timeout = timeout
        self._context = context

    def __enter__(self) -> RunningServer:
        self._log = tempfile.TemporaryFile()  # closed in __exit__
        command = [sys.executable, "-m", "npu_zoo", "serve", *self._arguments]
        self._process = subprocess.Popen(
            command, env=self._environ, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            self._await_ready()
        except BaseException:
            self._end(signal.SIGKILL)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end(signal.SIGTERM)

    @property
    def pid(self) -> int:
        """The supervisor's process."""
        return self._process.pid

    @property
    def children(self) -> dict[str, int]:
        """The processes of the server beside the supervisor, by their names, ``engine`` and ``front end``."""
        found = {}
        for pid in _children(self.pid):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
                if _PROGRAM in words:
                    found[words[words.index(_PROGRAM) + 1]] = pid
        return found

    @property
    def log(self) -> str:
        """What it has written."""
        descriptor = self._log.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode("utf-8", "replace")

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return self._process.wait(self._timeout)

    def send_signal(self, number: signal.Signals) -> None:
        """Send the supervisor a signal."""
        self._process.send_signal(number)

    def get(self, path: str) -> tuple[int, Any]:
        """The status of a path that is read, and its JSON or text."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=self._timeout, context=self._context) as response:
                status, body, kind = response.status, response.read(), response.headers.get_content_type()
        except urllib.error.HTTPError as error:
            with error:
                status, body, kind = error.code, error.read(), error.headers.get_content_type()
        return status, json.loads(body) if kind == "application/json" else body.decode()

    def await_status(self, path: str, status: int) -> None:
        """Wait until a path answers with a status."""
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if self.get(path)[0] == status:
                    return
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        raise RuntimeError(f"{path} did not answer with {status} in {self._timeout:g} s:\n{self.log}")

    def _await_ready(self) -> None:
        deadline = time.monotonic() + self._timeout
        while (found := _ADDRESS.search(self.log)) is None:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}:\n{self.log}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server was not ready in {self._timeout:g} s:\n{self.log}")
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        self.url = found[1]
        self.await_status("/health/ready", 200)

    def _end(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)
            try:
                self._process.wait(self._timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()


def _children(pid: int) -> list[int]:
    paths = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in paths for child in path.read_text().split()]
