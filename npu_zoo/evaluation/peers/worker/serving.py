"""Commands and replies are lines of JSON. What a library prints goes to standard error, so it cannot be a reply."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import traceback
from typing import Any

from .driver import LoadOptions, Request, make_driver

COMMANDS = ("load", "run", "cache_bytes", "peak_memory")


class Worker:
    """One method per command."""

    def __init__(self, engine: str) -> None:
        self.driver = make_driver(engine)
        self.device = "cpu"

    def load(self, options: dict[str, Any]) -> None:
        """Load the engine."""
        self.device = options["device"]
        self.driver.load(LoadOptions(**options))

    def run(self, requests: list[dict[str, Any]], static_batch: int, longest: int) -> dict[str, Any]:
        """Run requests; the fields of a :class:`~.timeline.Run`."""
        run = self.driver.run([Request(**request) for request in requests], static_batch, longest)
        return dataclasses.asdict(run)

    def cache_bytes(self, requests: list[dict[str, Any]]) -> float:
        """Bytes of cache per token."""
        return self.driver.cache_bytes([Request(**request) for request in requests])

    def peak_memory(self) -> int:
        """The most memory that the engine has had, in bytes: resident, or on a CUDA device what torch took of it.

        Raises:
            NotImplementedError: the engine takes a device's memory by itself.
        """
        if self.device != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if "torch" not in sys.modules:
            raise NotImplementedError("this engine does not tell what it takes of a device's memory")
        return int(sys.modules["torch"].cuda.max_memory_reserved())


def main(arguments: list[str]) -> None:
    """Answer commands until standard input ends.

    Args:
        arguments: the engine, and the cores to run on where they are given, as ``0,1``.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if len(arguments) > 1:
        os.sched_setaffinity(0, [int(core) for core in arguments[1].split(",")])
    worker = Worker(arguments[0])
    for line in sys.stdin:
        print(json.dumps(_answer(worker, json.loads(line))), file=replies, flush=True)


def _answer(worker: Worker, arguments: dict[str, Any]) -> dict[str, Any]:
    command = arguments.pop("command")
    try:
        if command not in COMMANDS:
            raise ValueError(f"unknown command '{command}'; known: {', '.join(COMMANDS)}")
        return {"result": getattr(worker, command)(**arguments)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
