"""How the ranks of a run come together: started from the first, or by a launcher such as torchrun."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.errors import EngineError
from npu_zoo.engine.device import open_device
from npu_zoo.parallel.environment import LaunchEnvironment
from npu_zoo.parallel.groups import LOOPBACK, MEETING_TIMEOUT, Host, Joined, join, lead_store, prefixed
from npu_zoo.parallel.launched import LaunchedGroup, join_store
from npu_zoo.parallel.ports import launch_ports, require_launch
from npu_zoo.parallel.processes import WorkerGroup
from npu_zoo.parallel.supervised import SupervisedRanks

_TRIES = 20
_LOOK_S = 0.05
_FOLLOWER = "npu_zoo.engine.executor:follow"


@dataclass(frozen=True)
class Assignment:
    """What a rank is started with.

    Attributes:
        port: of this host, which the ranks meet at.
    """

    config: EngineConfig
    rank: int
    port: int


@dataclass(frozen=True)
class Start:
    """The first rank's hold on the others.

    Attributes:
        ranks: what supervises them.
        store: shared by all.
        host: of the first rank.
        port: which they meet at.
    """

    ranks: SupervisedRanks
    store: Any
    host: Host
    port: int


def launch_environment(config: EngineConfig) -> LaunchEnvironment | None:
    """This process's place among the ranks that a launcher has started; None where none has.

    Raises:
        ConfigError: the environment does not fit the run.
    """
    split = config.split
    return LaunchEnvironment.from_environ(os.environ, {"tp": split.tp, "pp": split.pp, "dp": split.dp})


def start_ranks(config: EngineConfig, environment: LaunchEnvironment | None) -> Start:
    """Have all ranks but this one started, or find those that are.

    Raises:
        HardwareError: a port that is needed is taken.
        EngineError: a process or socket cannot be had.
    """
    idle_is_hanging = config.device == "cpu"
    if environment is None:
        return _start_here(config, idle_is_hanging=idle_is_hanging)
    store = join_store(environment)
    group = LaunchedGroup(store, environment, idle_is_hanging=idle_is_hanging)
    host = Host(environment.local_rank, environment.local_world_size, group.address)
    return Start(group, prefixed(store, group.attempt), host, environment.master_port)


def join_ranks(
    config: EngineConfig, rank: int, store: Any, host: Host, check: Callable[[], object] | None = None
) -> Joined:
    """Meet the other ranks; every rank calls it.

    Args:
        check: raises where another rank has failed; the first rank has it, and waits with it for the others to be
            there, since nothing ends an operation that waits for one that never came.

    Raises:
        HardwareError: this rank has no device.
        EngineError: a rank is not there in time.
    """
    open_device(config, host.local_rank, host.local_size)
    store.set(f"here/{rank}", b"")
    if check is not None:
        _await_all(store, config, check)
    timeout = timedelta(seconds=config.collective_timeout)
    return join(store, config.split.place(rank), host, timeout, config.device)


def _await_all(store: Any, config: EngineConfig, check: Callable[[], object]) -> None:
    deadline = time.monotonic() + MEETING_TIMEOUT.total_seconds()
    for rank in range(config.world_size):
        while not store.check([f"here/{rank}"]):
            check()
            if time.monotonic() > deadline:
                raise EngineError(f"rank {rank} was not there within {MEETING_TIMEOUT.total_seconds():g} s")
            time.sleep(_LOOK_S)


def _start_here(config: EngineConfig, *, idle_is_hanging: bool) -> Start:
    size = config.world_size
    store = _lead(config)
    assignments = [Assignment(config, rank, store.port) for rank in range(1, size)]
    # What torch warns of in every rank, the first one says for all.
    environs = [{"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")} for _ in assignments]
    workers = WorkerGroup(_FOLLOWER, assignments, environs=environs, idle_is_hanging=idle_is_hanging)
    return Start(workers, store, Host(0, size, LOOPBACK), store.port)


def _lead(config: EngineConfig, tries: int = _TRIES) -> Any:
    """The store, at a port that is looked for again where somebody was faster."""
    found = launch_ports(config.world_size, config.hardware, os.environ)
    require_launch(found)
    try:
        return lead_store(found[0].ports[0], config.world_size, MEETING_TIMEOUT)
    except OSError:
        if tries == 1:
            raise
    return _lead(config, tries - 1)
