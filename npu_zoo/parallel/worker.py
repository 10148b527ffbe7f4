"""The program of a worker: ``python -m npu_zoo.parallel.worker DESCRIPTOR PARENT``, started by a WorkerGroup alone."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import npu_zoo
from npu_zoo.parallel.link import Link, Setup, WorkerLink

_PR_SET_PDEATHSIG = 1
_TERMINATED = 128 + signal.SIGTERM


def main(arguments: Sequence[str]) -> int:
    """Run one worker to its end.

    Args:
        arguments: the descriptor of the inherited socket, and the process that started this one.

    Returns:
        The exit code: 0 where the function returned, 1 where it raised. The parent has been told before.
    """
    descriptor, parent = map(int, arguments)
    die_with_parent(parent)
    os.set_inheritable(descriptor, False)  # a process of the worker's must not keep the link open
    connection = socket.socket(fileno=descriptor)
    try:
        with connection.makefile("rb") as stream:
            setup: Setup = pickle.load(stream)
    except (EOFError, OSError, pickle.UnpicklingError):  # asked to stop before the start was told
        return 0
    _import_as_the_parent(setup)
    signal.signal(signal.SIGTERM, _exit)
    link = WorkerLink(setup.rank, connection, parent, setup.interval)
    try:
        if sys.stderr is not None:
            faulthandler.enable()
        npu_zoo.simulate()
        function = load_target(setup.target)
        function(pickle.loads(setup.payload), link)
    except BaseException as error:
        link.send_error(error)
        if isinstance(error, SystemExit):
            raise
        return 1
    link.send_done()
    return 0


def die_with_parent(parent: int) -> None:
    """Have Linux kill this process when its parent ends, however that ends; elsewhere only the link tells."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call above
        os.kill(os.getpid(), signal.SIGKILL)


def load_target(reference: str) -> Callable[[Any, Link], object]:
    """The function that ``package.module:function`` names."""
    module, _, attribute = reference.partition(":")
    function: Callable[[Any, Link], object] = getattr(importlib.import_module(module), attribute)
    return function


def _import_as_the_parent(setup: Setup) -> None:
    sys.path[:] = setup.sys_path
    if setup.pythonpath is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = setup.pythonpath


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(_TERMINATED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
