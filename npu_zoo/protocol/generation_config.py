"""Defaults of requests that a checkpoint brings along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from npu_zoo.checkpoint import read_generation_config
from npu_zoo.core.errors import ConfigError, WeightsError
from npu_zoo.protocol.sampling import check_defaults

_READ = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def generation_defaults(directory: str | Path) -> dict[str, Any]:
    """What generation_config.json says of fields that a request may leave unset; the file's other keys are not read.

    Raises:
        WeightsError: the file cannot be read, or holds a value that no request could have.
    """
    found = read_generation_config(directory)
    try:
        return check_defaults({name: found[name] for name in _READ if found.get(name) is not None})
    except ConfigError as error:
        raise WeightsError(f"generation_config.json: {error}; mend it, or give defaults of your own") from error
