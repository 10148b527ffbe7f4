"""A model for as long as a command needs it, and what people are told of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from npu_zoo.cli.output import note
from npu_zoo.cli.progress import LoadingProgress
from npu_zoo.core.config import EngineConfig
from npu_zoo.parallel.environment import LaunchEnvironment
from npu_zoo.parallel.processes import exit_on_sigterm
from npu_zoo.platforms.ports import MASTER_PORT

if TYPE_CHECKING:
    from npu_zoo.engine.llm import LLM


@contextlib.contextmanager
def loaded(config: EngineConfig) -> Iterator[LLM]:
    """A loaded model, until the end of the block.

    In a rank that :func:`follows` it works for the first one until the run is over, and does not come back.
    """
    from npu_zoo.engine.llm import LLM

    with exit_on_sigterm(), LoadingProgress() as loading:
        llm = LLM.from_config(config, progress=loading)
    with exit_on_sigterm(), llm:
        if config.world_size > 1 or config.device != "cpu":
            explained = llm.engine.explain()
            _tell_port(explained["master_port"])
            _tell_memory(explained, config)
        if remark := llm.engine.explain().get("packed_weights", {}).get("remark"):
            note(remark)
        yield llm


def is_launched() -> bool:
    """Whether other ranks wait for this one to start, even where it has nothing left to do."""
    return LaunchEnvironment.from_environ(os.environ) is not None


def follows() -> bool:
    """Whether a launcher started this process as another rank than the first, which alone reads and writes files."""
    environment = LaunchEnvironment.from_environ(os.environ)
    return environment is not None and environment.rank > 0


def tell_notes(config: EngineConfig) -> None:
    """Write a checked request's remarks."""
    for text in config.notes:
        note(text)


def _tell_port(port: int | None) -> None:
    """Where ranks have met, if it is not where they were to."""
    if port is not None and port != int(os.environ.get("MASTER_PORT") or MASTER_PORT):
        note(f"port {MASTER_PORT} is in use; the ranks meet at {port} (`npu-zoo ports` shows by whom)")


def _tell_memory(explained: dict[str, Any], config: EngineConfig) -> None:
    """How a device's memory is shared out, where the engine measured it."""
    if explained.get("activation_bytes") is None:
        return
    weights, activations, cache = (
        f"{explained[f'{name}_bytes'] / 2**30:,.2f} GiB" for name in ("parameter", "reserved", "kv_cache")
    )
    note(
        f"memory of {config.hardware}: weights {weights}, {activations} kept for activations (measured), "
        f"keys and values {cache} for {explained['kv_cache_tokens']:,} tokens"
    )
