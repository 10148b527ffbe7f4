"""A process per engine, which stays loaded: the parent's end of its pipe."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import npu_zoo
from npu_zoo.core.errors import EngineError
from npu_zoo.evaluation.peers.engines import InstalledEngine
from npu_zoo.evaluation.peers.worker.driver import LoadOptions, Request
from npu_zoo.evaluation.peers.worker.timeline import Run

WORKER = Path(__file__).with_name("worker")
_LAST_LINES = 5


class PeerError(EngineError):
    """An engine under comparison raised, or its process ended."""


class RunRefused(PeerError):
    """A run's times are not those of its case; its process goes on."""


class PeerProcess:
    """An engine's process, with its threads set before anything is imported.

    It has a session of its own, so that a Ctrl-C reaches this process alone, which ends it with all that it started.

    Args:
        threads: as OpenMP and MKL are told; None leaves it to them.
        cores: that it may run on; all that this process may when empty.

    Attributes:
        started: when the process was created, in seconds on the machine's monotonic clock.
    """

    def __init__(self, engine: InstalledEngine, threads: int | None = None, cores: Sequence[int] = ()) -> None:
        self.engine = engine
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.started = time.monotonic()
        pinned = [",".join(map(str, cores))] if cores else []
        # ru_maxrss starts at the parent's memory, so the parent stays free of torch.
        self.process = subprocess.Popen(
            [engine.python, str(WORKER), engine.name, *pinned],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=child_environment(dict(os.environ), threads, own=engine.own),
            start_new_session=True,
        )

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(gently=kind is None)

    def close(self, *, gently: bool = True) -> None:
        """End the process and what it started; ``gently`` lets it leave by itself first."""
        # A command that never reached a dead child is still in the pipe's buffer.
        with contextlib.suppress(BrokenPipeError):
            _pipe(self.process.stdin).close()
        if gently:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        _pipe(self.process.stdout).close()
        self._log.close()

    def call(self, command: str, **arguments: Any) -> Any:
        """Run a command and wait for its result.

        Raises:
            PeerError: it raised, or the process ended.
        """
        try:
            print(json.dumps({"command": command, **arguments}), file=_pipe(self.process.stdin), flush=True)
            line = _pipe(self.process.stdout).readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"its process {_ended(self.process.wait())} in '{command}'{self._last_lines()}")
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(f"'{command}' failed: {reply['error']}")
        return reply["result"]

    def load(self, options: LoadOptions) -> None:
        """Load the engine."""
        self.call("load", options=dataclasses.asdict(options))

    def run(self, requests: Sequence[Request], static_batch: int = 0, longest: int = 0) -> Run:
        """Run requests.

        Args:
            static_batch: rows of one batch where the driver cannot batch continuously; 0 takes all at once.
            longest: tokens that each sequence gets room for at least.

        Raises:
            PeerError: as :meth:`call`, and when a request got another number of tokens than it asked for.
        """
        given = list(map(dataclasses.asdict, requests))
        run = Run(**self.call("run", requests=given, static_batch=static_batch, longest=longest))
        wanted = [request.max_tokens for request in requests]
        if run.output_lengths != wanted:
            raise PeerError(f"it returned {run.output_lengths} tokens where {wanted} were asked for")
        return run

    def cache_bytes(self, requests: Sequence[Request]) -> float:
        """Bytes of cache per token with these requests."""
        return float(self.call("cache_bytes", requests=list(map(dataclasses.asdict, requests))))

    def peak_memory(self) -> int:
        """The largest resident size that it has had, in bytes."""
        return int(self.call("peak_memory"))

    def _last_lines(self) -> str:
        self._log.seek(0)
        lines = [line.rstrip() for line in self._log.readlines() if line.strip()][-_LAST_LINES:]
        return "; it last said: " + " | ".join(lines) if lines else ""


def child_environment(environment: Mapping[str, str], threads: int | None, *, own: bool = False) -> dict[str, str]:
    """The environment of every child: threads, no network, byte code cached as any installation has it.

    Args:
        own: the child runs in this interpreter, and finds this very package.
    """
    kept = {name: value for name, value in environment.items() if name != "PYTHONDONTWRITEBYTECODE"}
    fixed = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if threads:
        fixed |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if own:
        paths = [str(Path(npu_zoo.__file__).resolve().parents[1]), environment.get("PYTHONPATH", "")]
        fixed["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return {**kept, **fixed}


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    told = " (as when memory runs out)" if -status == signal.SIGKILL else ""
    return f"was ended by signal {-status}{told}"


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise PeerError("the process has no pipe")
    return stream
