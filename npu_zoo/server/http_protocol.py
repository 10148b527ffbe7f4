"""HTTP as uvicorn speaks it, with limits to what a connection may be kept waiting for."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from npu_zoo.protocol.errors import ApiError

_READ_AHEAD = 16384
"""Bytes of further requests that are taken while one is answered; reading is what notices that a client has left."""

_INVALID = "this is no HTTP/1.1 request"
_TOO_LONG = "the request's line and headers are too long; send fewer or shorter ones"


class PatientProtocol(H11Protocol):
    """Closes connections whose clients keep it waiting for too long.

    uvicorn bounds the time between two requests of a connection and nothing else.

    Attributes:
        head_timeout: seconds for a request's line and headers, from the connection or the first byte of a further
            request; and for what is left of a body when its request has been answered.
        send_timeout: seconds that a client may take nothing of what is sent.
    """

    head_timeout: float = 10.0
    send_timeout: float = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receiving, self._sending = _Deadline(self.loop), _Deadline(self.loop)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See :class:`asyncio.Protocol`."""
        super().connection_made(cast(asyncio.Transport, _LingeringTransport(transport, self._end_later)))
        # What the system does not take at once pauses writing, so that the time until it does can be told.
        transport.set_write_buffer_limits(high=1, low=0)
        self._watch_client()

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch_client()
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) <= _READ_AHEAD:
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """See uvicorn: what was sent ahead may be the beginning of a further request."""
        super().on_response_complete()
        self._watch_client()

    def pause_writing(self) -> None:
        """See :class:`asyncio.Protocol`."""
        super().pause_writing()
        self._expect_progress(math.inf)

    def resume_writing(self) -> None:
        """See :class:`asyncio.Protocol`."""
        super().resume_writing()
        self._sending.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        self._receiving.stop()
        self._sending.stop()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def send_400_response(self, msg: str) -> None:
        """See uvicorn: called for what is no HTTP, in place of a request or amid its body."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # what the application still sends has nowhere to go
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._send_error(_of_protocol(sys.exc_info()[1]))
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """A wish for another protocol, which HTTP lets a server pass over, is nothing to warn of."""

    def _watch_client(self) -> None:
        """See to the deadline of what the client owes: a head, or the rest of a body that nobody waits for."""
        if self.transport.is_closing():
            return
        idle = self.conn.their_state is h11.IDLE
        begun = self.cycle is None or (idle and bool(self.conn.trailing_data[0]))
        answered = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        if answered or (idle and begun):
            self._receiving.start(self.head_timeout, self._give_up)
        else:
            self._receiving.stop()
        if idle and not begun and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _expect_progress(self, before: float) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent < before:
            self._sending.start(self.send_timeout, partial(self._expect_progress, unsent))
        else:
            self.transport.abort()

    def _give_up(self) -> None:
        if self.conn.our_state is not h11.IDLE:
            self.transport.abort()
            return
        self._send_error(ApiError(408, f"the request's headers did not arrive within {self.head_timeout:g} s"))
        self.transport.close()

    def _send_error(self, error: ApiError) -> None:
        """Answer in place of the application."""
        body = json.dumps(error.body()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        head = h11.Response(status_code=error.status, headers=headers, reason=HTTPStatus(error.status).phrase)
        bodiless = self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
        for event in (head, h11.Data(data=b"" if bodiless else body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    def _end_later(self, end: Callable[[], None]) -> bool:
        """Whether the client may still be sending, so that a connection closed now would take its answer along."""
        self._receiving.stop()
        if self.conn.their_state not in (h11.SEND_BODY, h11.ERROR):
            return False
        self.flow.resume_reading()
        self._receiving.start(self.head_timeout, end)
        return True


class _Deadline:
    """A call that is made unless it is stopped in time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None

    def start(self, seconds: float, act: Callable[[], None]) -> None:
        """Begin to wait, unless it waits already."""
        if self._timer is None:
            self._timer = self._loop.call_later(seconds, self._pass, act)

    def stop(self) -> None:
        """Nothing is waited for any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _pass(self, act: Callable[[], None]) -> None:
        self._timer = None
        act()


class _LingeringTransport:
    """A transport that is closed for sending at first, where its client may still be sending."""

    def __init__(self, transport: asyncio.Transport, end_later: Callable[[Callable[[], None]], bool]) -> None:
        self._transport, self._end_later = transport, end_later
        self._ending = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._ending or self._transport.is_closing()

    def close(self) -> None:
        if self._ending or self._transport.is_closing():
            return
        self._ending = True
        if not self._end_later(self._transport.abort):
            self._transport.close()
        elif self._transport.can_write_eof():
            self._transport.write_eof()


def protocol_with(*, head_timeout: float, send_timeout: float) -> type[Any]:
    """A protocol with limits of its own."""
    limits = {"head_timeout": head_timeout, "send_timeout": send_timeout}
    return type("PatientProtocol", (PatientProtocol,), limits)


def _of_protocol(error: BaseException | None) -> ApiError:
    if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
        return ApiError(431, _TOO_LONG)
    return ApiError(400, _INVALID)
