"""Messages between two processes of this host, over a pair of connected sockets.

A frame is its length in eight bytes and a pickled list of messages; each side reads only what its own program wrote.
Each end has a thread that reads and one that writes, so that neither side's loop waits for the other side.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

_LENGTH = struct.Struct(">Q")

OnMessages = Callable[[Sequence[Any]], None]


class ChannelClosed(ConnectionError):
    """The other side is gone, or this end was closed."""


class Channel:
    """One end. Its callbacks run in its own threads and must not wait.

    What is sent while the writer is at work goes out together as the next frame. Nothing limits how much that may be:
    who sends without being asked has to look at :attr:`idle` (see :attr:`on_idle`).

    Args:
        connection: a stream socket; it belongs to the channel from now on.
        name: of the other side, for its threads.
        on_messages: called with the messages of each frame.
        on_closed: called once, after the last frame, when the other side is gone or this end was closed.
        on_idle: called each time that everything sent has been handed to the system.
    """

    def __init__(
        self,
        connection: socket.socket,
        name: str,
        on_messages: OnMessages,
        on_closed: Callable[[], None],
        on_idle: Callable[[], None] | None = None,
    ) -> None:
        self._connection = connection
        self._on_messages, self._on_closed, self._on_idle = on_messages, on_closed, on_idle
        self._changed = threading.Condition()
        self._queued: list[Any] = []
        self._writing = self._closed = False
        self._reader = threading.Thread(target=self._read, name=f"from {name}", daemon=True)
        self._writer = threading.Thread(target=self._write, name=f"to {name}", daemon=True)

    def start(self) -> None:
        """Begin to read and write."""
        self._reader.start()
        self._writer.start()

    @property
    def idle(self) -> bool:
        """Whether everything sent has been handed to the system."""
        with self._changed:
            return not self._queued and not self._writing

    def send(self, message: Any) -> None:
        """Queue a message; what it holds must not change any more.

        Raises:
            ChannelClosed: nobody will read it.
        """
        with self._changed:
            if self._closed:
                raise ChannelClosed("the other process is gone")
            self._queued.append(message)
            self._changed.notify_all()

    def flush(self, timeout: float) -> None:
        """Wait until everything sent has been handed to the system, or the other side is gone; seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not (self._queued or self._writing), timeout)

    def close(self) -> None:
        """End the connection; what has not gone out is dropped."""
        self._end()

    def join(self) -> None:
        """Wait for the last frame and ``on_closed``, where the other side is gone or this end was closed."""
        self._reader.join()

    def _read(self) -> None:
        try:
            with contextlib.suppress(OSError, EOFError), self._connection.makefile("rb") as stream:
                while True:
                    self._on_messages(read_frame(stream.read))
        finally:
            self._end()
            self._on_closed()

    def _write(self) -> None:
        try:
            with contextlib.suppress(OSError):
                while messages := self._take():
                    self._connection.sendall(frame(messages))
                    self._wrote()
        finally:
            self._end()
            self._reader.join()
            self._connection.close()

    def _take(self) -> list[Any]:
        """What is queued, once there is something; nothing at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queued or self._closed)
            messages, self._queued = ([] if self._closed else self._queued), []
            self._writing = bool(messages)
            return messages

    def _wrote(self) -> None:
        with self._changed:
            self._writing = False
            idle = not self._queued
            self._changed.notify_all()
        if idle and self._on_idle is not None:
            self._on_idle()

    def _end(self) -> None:
        with self._changed:
            self._closed, self._queued = True, []
            self._changed.notify_all()
            with contextlib.suppress(OSError):  # it has ended, or was closed
                self._connection.shutdown(socket.SHUT_RDWR)


def frame(messages: Sequence[Any]) -> bytes:
    """Messages as they travel."""
    data = pickle.dumps(list(messages), pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data


def read_frame(read: Callable[[int], bytes]) -> list[Any]:
    """The messages of the next frame.

    Args:
        read: returns as many bytes as asked for, fewer only at the end.

    Raises:
        EOFError: the other side has ended, perhaps inside a frame.
    """
    (length,) = _LENGTH.unpack(_exactly(read, _LENGTH.size))
    messages: list[Any] = pickle.loads(_exactly(read, length))
    return messages


def _exactly(read: Callable[[int], bytes], count: int) -> bytes:
    data = read(count)
    if len(data) < count:
        raise EOFError("the other side has ended")
    return data
