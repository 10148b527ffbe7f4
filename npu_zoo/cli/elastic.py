"""torch's elastic launcher as ``npu-zoo launch`` uses it: what its ranks may say, and what is said of their end.

torch is imported when ranks are started.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_zoo.core.errors import EngineError, HardwareError, WorkerError
from npu_zoo.parallel.children import describe_end

MEETING_TIMEOUT_S = 900
"""How long a node waits for the others."""

_SECONDS_TO_END = 10
_SIGNALLED = 128
_LED_TO = {-signal.SIGTERM, -signal.SIGINT, _SIGNALLED + signal.SIGTERM, _SIGNALLED + signal.SIGINT}
"""Exit codes of ranks that were ended because of another, or of the user."""


@dataclass(frozen=True)
class Launch:
    """Ranks to start on this node.

    Attributes:
        nnodes: nodes of the run.
        node_rank: this one's number; None where the nodes shall agree on it.
        nproc: ranks of each node.
        leads: whether this one is where the nodes meet.
        address, port: where that is.
        local_address: this node's, as the others reach it.
        max_restarts: how often all ranks are started anew after a failure.
        run_id: a name of the run that all nodes share.
        command: what each rank runs: a command of npu-zoo with its arguments.
    """

    nnodes: int
    node_rank: int | None
    nproc: int
    leads: bool
    address: str
    port: int
    local_address: str
    max_restarts: int
    run_id: str
    command: tuple[str, ...]


class PortTaken(HardwareError):
    """Something listens where the nodes would meet; no rank was started."""


class RankOutput:
    """Rank 0 has the terminal; of the others standard error is shown, and standard output is not. A ``LogsSpecs``.

    Args:
        folder: where standard errors are kept until they are shown.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._starts = 0

    @property
    def root_log_dir(self) -> str:
        """The folder."""
        return str(self._folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> Any:
        """Where each local rank's output goes, by the variables that it is started with."""
        from torch.distributed.elastic.multiprocessing import LogsDest

        self._starts += 1
        folder = self._folder / str(self._starts)
        folder.mkdir()
        others = [local for local, environ in envs.items() if environ["RANK"] != "0"]
        shown = {local: str(folder / f"stderr-{local}") for local in others}
        return LogsDest(
            stdouts={local: os.devnull if local in shown else "" for local in envs},
            stderrs={local: shown.get(local, "") for local in envs},
            tee_stderrs=shown,
            error_files={local: str(folder / f"error-{local}") for local in envs},
        )


def start(launch: Launch) -> int:
    """Start the ranks of this node, and wait for their end; no rank outlives this process.

    Returns:
        The exit code.

    Raises:
        WorkerError: a rank failed, and rank 0 has not told of it.
        PortTaken: the port was taken since it was looked at.
        EngineError: the nodes did not meet.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    with tempfile.TemporaryDirectory(prefix="npu-zoo-launch-") as folder, _quiet(), _interruptible():
        config = _config(launch, Path(folder))
        try:
            elastic_launch(config, sys.executable)(*_arguments(launch.command))
        except SignalException as error:
            return _SIGNALLED + int(error.sigval)
        except ChildFailedError as error:
            return _code({rank: failure.exitcode for rank, failure in error.failures.items()})
        except (RendezvousError, RuntimeError, ValueError) as error:
            where, reason = f"{launch.address}:{launch.port}", str(error).partition("\n")[0]
            if launch.leads and "EADDRINUSE" in str(error):
                raise PortTaken(f"port {launch.port}, where the nodes would meet, was taken just now") from error
            raise EngineError(f"the {launch.nnodes} nodes did not meet at {where}, or lost it: {reason}") from error
    return 0


def _config(launch: Launch, folder: Path) -> Any:
    from torch.distributed.launcher.api import LaunchConfig

    own = {"is_host": launch.leads} if launch.node_rank is None else {"rank": launch.node_rank}
    return LaunchConfig(
        min_nodes=launch.nnodes,
        max_nodes=launch.nnodes,
        nproc_per_node=launch.nproc,
        run_id=launch.run_id,
        rdzv_backend="c10d" if launch.node_rank is None else "static",
        rdzv_endpoint=f"[{launch.address}]:{launch.port}"
        if ":" in launch.address
        else f"{launch.address}:{launch.port}",
        rdzv_configs={"timeout": MEETING_TIMEOUT_S, **own},
        max_restarts=launch.max_restarts,
        logs_specs=RankOutput(folder),  # type: ignore[arg-type]
        log_line_prefix_template="[rank ${rank}] ",
        local_addr=launch.local_address,
        shutdown_timeout=_SECONDS_TO_END,
    )


def _arguments(command: Sequence[str]) -> list[str]:
    """What each rank's interpreter is given; the launcher reads ``$`` as the begin of a name."""
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []  # the working directory is not where to import from
    arguments = [*safe_path, "-m", "npu_zoo.cli.rank", str(os.getpid()), *command]
    return [argument.replace("$", "$$") for argument in arguments]


def _code(ends: Mapping[int, int]) -> int:
    """The exit code where ranks of this node failed.

    Args:
        ends: how each of them ended, by rank; negative for signals, as subprocess has it.

    Raises:
        WorkerError: names the rank whose end brought the others about, where rank 0 has not told of an error itself.
    """
    if ends.get(0, 0) > 0 and ends[0] not in _LED_TO:
        return ends[0]
    rank = min(ends, key=lambda rank: (ends[rank] in _LED_TO, ends[rank] > 0, rank))
    host = socket.gethostname()
    raise WorkerError(f"rank {rank} on {host} {describe_end(ends[rank])}; what it said stands above", rank, host)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the launcher's own log from the terminal, unless torch's variable asks for it."""
    if os.environ.get("LOGLEVEL"):
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let a Ctrl-C end this process while it waits for other nodes, which happens outside the interpreter.

    Once there are ranks, the launcher has handlers of its own, and ends them.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")]
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
