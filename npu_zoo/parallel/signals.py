"""Signals that are acted on at once, wherever the main thread is; Python's own handlers wait for it."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Collection


def act_on_signals(numbers: Collection[signal.Signals], act: Callable[[signal.Signals], None]) -> None:
    """Have a thread call ``act`` when one of the signals comes, which then does nothing else; for the whole process.

    Where this is not the main thread, which alone may ask for it, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    heard, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.detach(), warn_on_full_buffer=False)  # open as long as the process
    for number in numbers:
        signal.signal(number, _nothing)
    threading.Thread(target=_listen, args=(heard, set(numbers), act), name="signals", daemon=True).start()


def _listen(heard: socket.socket, numbers: set[signal.Signals], act: Callable[[signal.Signals], None]) -> None:
    with heard, contextlib.suppress(OSError):
        while data := heard.recv(1):
            if data[0] in numbers:
                act(signal.Signals(data[0]))


def _nothing(number: int, frame: object) -> None:
    """The thread acts."""
