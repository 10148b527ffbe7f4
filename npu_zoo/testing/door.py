"""The one way past the feature matrix, for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from npu_zoo.core.config import _SEAL, EngineConfig


def unchecked_config(base: EngineConfig, **changes: Any) -> EngineConfig:
    """A checked request with changes that nothing has checked.

    An engine takes an :class:`~npu_zoo.core.config.EngineConfig` only, and only :func:`npu_zoo.dispatch.resolve` makes
    one, so that nobody runs what the matrix has not seen. A test needs such runs all the same: an attention backend
    that is not registered, a KV cache of three blocks, sizes that no row offers. This is how it writes them.

    Args:
        base: what ``resolve`` made.
        changes: fields of the config with their new values.

    Raises:
        TypeError: a name is no field of the config.
    """
    return dataclasses.replace(base, **changes, seal=_SEAL)
