"""Where what can be made again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The project's folder beneath ``XDG_CACHE_HOME`` or ``~/.cache``, whether it exists or not.

    Raises:
        RuntimeError: neither the variable nor a home directory is there.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npu-zoo"
