"""The front end's process: what it is started with, and its program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npu_zoo.core.config import EngineConfig
from npu_zoo.registry import load_code
from npu_zoo.server.channel import Channel


@dataclass(frozen=True)
class FrontEndSetup:
    """What a front end is started with.

    Attributes:
        config: of the engine.
        options: the front end's own; whatever the supervisor was given, pickled on the way.
        engine_path: the Unix socket of the engine, for an :class:`~npu_zoo.server.client.EngineClient`.
        grace_period: seconds that running requests may take after a SIGTERM.
    """

    config: EngineConfig
    options: Any
    engine_path: str
    grace_period: float


@dataclass(frozen=True)
class FrontEndStart:
    """What the process runs.

    Attributes:
        function: ``package.module:function``, called as ``function(descriptor, setup)`` in the main thread. The
            descriptor is of the listening TCP socket, which the function takes over. It serves until SIGTERM, then
            refuses new requests, and returns once the running ones have finished or the grace period is over.
        listener: the descriptor.
    """

    function: str
    listener: int
    setup: FrontEndSetup


def run(start: FrontEndStart, control: Channel) -> None:
    """The program of the front end's process, as :mod:`npu_zoo.server.child` calls it."""
    load_code(start.function)(start.listener, start.setup)
