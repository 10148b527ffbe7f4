"""Channels over a pair of sockets: order, ends that go away, and sides that do not read."""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from collections.abc import Iterator
from queue import Queue
from typing import Any

import pytest

from npu_zoo.server.channel import Channel, ChannelClosed, frame

SECONDS = 30.0


class End:
    """A channel, and what it has been told."""

    def __init__(self, connection: socket.socket) -> None:
        self.frames: Queue[Any] = Queue()
        self.closed = threading.Semaphore(0)
        self.idle = threading.Semaphore(0)
        self.channel = Channel(connection, "the other", self.frames.put, self.closed.release, self.idle.release)
        self.channel.start()

    def messages(self, count: int) -> list[Any]:
        found: list[Any] = []
        while len(found) < count:
            found += self.frames.get(timeout=SECONDS)
        return found


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


Pair = tuple[socket.socket, socket.socket]


def test_messages_of_both_sides_arrive_in_their_order(pair: Pair) -> None:
    ends = list(map(End, pair))
    for number in range(2000):
        ends[0].channel.send(number)
        ends[1].channel.send(-number)
    assert ends[1].messages(2000) == list(range(2000))
    assert ends[0].messages(2000) == [-number for number in range(2000)]
    for end in ends:
        end.channel.close()
        end.channel.join()


def test_sending_never_waits_and_what_is_queued_goes_out_together(pair: Pair) -> None:
    sender = End(pair[0])
    large = "x" * 1_000_000
    for _ in range(20):
        sender.channel.send(large)
    assert not sender.channel.idle
    reader = End(pair[1])
    assert reader.messages(20) == [large] * 20
    assert sender.idle.acquire(timeout=SECONDS)
    assert sender.channel.idle
    sender.channel.close()
    reader.channel.join()


def test_flush_waits_for_what_was_sent_before_the_end(pair: Pair) -> None:
    sender, reader = End(pair[0]), End(pair[1])
    sender.channel.send(["last words"] * 100_000)
    sender.channel.flush(SECONDS)
    sender.channel.close()
    assert reader.messages(1) == [["last words"] * 100_000]
    reader.channel.join()


@pytest.mark.parametrize("rest", [b"", struct.pack(">Q", 100) + b"half", b"\0\0"])
def test_the_end_of_the_other_side_is_told_once_after_the_last_whole_frame(pair: Pair, rest: bytes) -> None:
    end = End(pair[0])
    pair[1].sendall(frame([1, 2]) + rest)
    pair[1].close()
    assert end.closed.acquire(timeout=SECONDS)
    assert end.messages(2) == [1, 2]
    with pytest.raises(ChannelClosed, match="gone"):
        end.channel.send(3)
    end.channel.close()
    end.channel.flush(SECONDS)
    end.channel.join()
    assert not end.closed.acquire(blocking=False)


def test_a_writer_that_waits_ends_with_the_channel(pair: Pair) -> None:
    end = End(pair[0])
    end.channel.send("x" * 10_000_000)
    end.channel.close()
    assert end.closed.acquire(timeout=SECONDS)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_frame_that_cannot_be_read_ends_the_channel(pair: Pair) -> None:
    end = End(pair[0])
    data = pickle.dumps([1])[:-1]
    pair[1].sendall(struct.pack(">Q", len(data)) + data)
    assert end.closed.acquire(timeout=SECONDS)
    end.channel.join()  # or another test would be told of the exception
