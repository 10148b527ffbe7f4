"""How a rank that somebody else started finds rank 0's process and proves that it belongs to the run.

Rank 0 listens, and leaves in the store that all ranks share where, and a random token. A rank connects and sends the
token and its number. Nothing of a connection is unpickled before its token was compared. Then the rank sends the
messages of :mod:`npu_zoo.parallel.link`, and rank 0 answers in single bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import pickle
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

from npu_zoo.core.errors import WorkerError

WELCOME, HEARD, STOP, FAILED, TERMINATE, KILL = b"w", b"h", b"s", b"f", b"t", b"k"
"""What rank 0 says: come in; a heartbeat was heard; end, as the run has ended or has failed; SIGTERM; SIGKILL."""

GONE_S = 7
"""Seconds after which a host that no longer answers counts as gone. One whose processes are stopped still answers."""

_KEY = "npu_zoo/supervisor"
_GREETING = struct.Struct("!32sI")
_MAX_HOST = 255
_SECONDS_TO_GREET = 5.0
_SECONDS_BETWEEN_TRIES = 0.2


class Store(Protocol):
    """What is needed of a key-value store that all ranks share; torch.distributed's TCPStore has it."""

    def set(self, key: str, value: str, /) -> None:
        """Set a key's value."""
        ...

    def get(self, key: str, /) -> bytes:
        """A key's value, waiting for it; raises an error of its own after a time-out."""
        ...


@dataclass(frozen=True)
class Meeting:
    """Where rank 0's process is supervised from.

    Attributes:
        host: its name.
        address, port: where it listens.
        token: what a rank has to show, 32 bytes in hexadecimal digits.
    """

    host: str
    address: str
    port: int
    token: str

    @property
    def attempt(self) -> str:
        """A name for this start of the ranks, which all of them know and no earlier start had."""
        return f"npu_zoo/{hashlib.sha256(bytes.fromhex(self.token)).hexdigest()[:16]}"


Admit = Callable[[int, str, socket.socket], bool]
"""Given a rank, its host and its connection; whether the rank was expected."""


class Reception:
    """Listens for ranks, and lets those in that know the token.

    Args:
        store: shared by all ranks.
        address: this host's, as the others reach it.
        admit: called in a thread of its own for each that does.
    """

    def __init__(self, store: Store, address: str, admit: Admit) -> None:
        self._admit = admit
        self._listener = _listen(address)
        token = secrets.token_bytes(32)
        self.meeting = Meeting(socket.gethostname(), address, self._listener.getsockname()[1], token.hex())
        self._token = token
        store.set(_KEY, json.dumps(asdict(self.meeting)))
        threading.Thread(target=self._receive, name="reception of ranks", daemon=True).start()

    def close(self) -> None:
        """Listen no longer; those that were let in stay."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _receive(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._greet, args=(connection,), name="greeting", daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(_SECONDS_TO_GREET)
            token, rank = _GREETING.unpack(_read_exactly(connection, _GREETING.size))
            if not hmac.compare_digest(token, self._token):
                raise ConnectionRefusedError("a wrong token")
            (length,) = _read_exactly(connection, 1)
            host = _read_exactly(connection, length).decode(errors="replace")
            connection.settimeout(None)
            notice_absence(connection)
            if not self._admit(rank, host, connection):
                raise ConnectionRefusedError(f"rank {rank} is not expected")
        except OSError:
            connection.close()


def find_supervisor(store: Store, rank: int, fallback: str, timeout: float) -> tuple[socket.socket, Meeting]:
    """Connect to rank 0's process; waits for it, and passes over what an earlier start left in the store.

    Args:
        store: shared by all ranks.
        rank: this one.
        fallback: another address of rank 0's host.
        timeout: seconds.

    Raises:
        WorkerError: it was not found in time.
    """
    deadline = time.monotonic() + timeout
    meeting: Meeting | None = None
    why: object = "it has not told where it listens"
    while time.monotonic() < deadline:
        try:
            meeting = Meeting(**json.loads(store.get(_KEY)))
        except RuntimeError as error:  # torch's stores
            why = str(error).partition("\n")[0]
            break
        for address in dict.fromkeys((meeting.address, fallback)):
            try:
                return _present(meeting, address, rank), meeting
            except OSError as error:
                why = error
        time.sleep(_SECONDS_BETWEEN_TRIES)
    where = f"on {meeting.host} ({meeting.address}:{meeting.port})" if meeting else f"on {fallback}"
    raise WorkerError(f"rank {rank} did not reach rank 0 {where} within {timeout:g} s: {why}", 0)


def read_pickles(connection: socket.socket, take: Callable[[object], None]) -> Exception:
    """Give every object of a connection that was let in to ``take``, to its end; returns what ended it."""
    try:
        with connection.makefile("rb") as stream:
            while True:
                take(pickle.load(stream))
    except Exception as error:
        return error


def notice_absence(connection: socket.socket) -> None:
    """Have the kernel fail a connection whose other host does not answer for :data:`GONE_S` seconds."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, GONE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE_S * 1000)


def _listen(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, 0), family=family)
    except OSError:  # not this host's own, as behind a translation of addresses
        return socket.create_server(("", 0), family=family)


def _present(meeting: Meeting, address: str, rank: int) -> socket.socket:
    connection = socket.create_connection((address, meeting.port), timeout=_SECONDS_TO_GREET)
    try:
        notice_absence(connection)
        host = socket.gethostname().encode()[:_MAX_HOST]
        connection.sendall(_GREETING.pack(bytes.fromhex(meeting.token), rank) + bytes([len(host)]) + host)
        if connection.recv(1) != WELCOME:
            raise ConnectionRefusedError("rank 0's process does not expect this rank")
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection


def _read_exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionResetError("closed before it was greeted")
        data += part
    return data
