"""What the server's load needs at least: of which model, on a machine that is measured before it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npu_zoo.cli.output import note
from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.core.errors import ConfigError, UsageError
from npu_zoo.dispatch import resolve
from npu_zoo.platforms.detection import is_simulated

if TYPE_CHECKING:
    from npu_zoo.evaluation.record import Machine
    from npu_zoo.evaluation.serving.result import ServeResult
    from npu_zoo.protocol.server_address import ServerAddress


@dataclass(frozen=True)
class FloorOptions:
    """What is said of the model that the server runs; nothing where ``model`` is None."""

    model: str | None
    weights: Path | None
    dtype: str | None
    threads: int | None

    def check(self, address: ServerAddress) -> EngineConfig | None:
        """The request that the server runs.

        Raises:
            UsageError: options are there without the model, the server is elsewhere, or there is no such model.
            ConfigError: torch, which measures the machine, is not installed.
        """
        if self.model is None:
            given = [name for name in ("weights", "dtype", "threads") if getattr(self, name) is not None]
            if given:
                raise UsageError(f"--floor-{given[0]} goes with --floor-model, the model that the server runs")
            return None
        if not address.loopback:
            raise UsageError(f"--floor-model measures this machine, and the server is on {address.host}; leave it out")
        if importlib.util.find_spec("torch") is None:
            raise ConfigError("--floor-model measures the machine with torch: pip install 'npu-zoo[run]'")
        weights = str(self.weights) if self.weights else None
        asked = {"model": self.model, "weights": weights, "dtype": self.dtype, "threads": self.threads}
        config = resolve(EngineArgs.model_validate(asked))
        if is_simulated(config.device):
            raise UsageError("--floor-model: a simulated device has no bandwidth to measure; leave it out")
        return config


def measure_floor(config: EngineConfig | None) -> Machine | None:
    """The machine, before the load; None where nobody asked."""
    if config is None:
        return None
    from npu_zoo.evaluation.machine import measure_apart

    note("measuring what the machine can do, for the shares of it")
    return measure_apart(config)


def with_floors(result: ServeResult, config: EngineConfig | None, machine: Machine | None) -> ServeResult:
    """The result with its levels' floors, where those were asked for."""
    if config is None or machine is None:
        return result
    from npu_zoo.evaluation.work import ModelWork

    return result.on(ModelWork.of(config), machine)
