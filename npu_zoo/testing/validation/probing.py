"""Plugins that would take this process along when they are loaded: each is loaded in a process of its own first."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Collection, Iterator

from npu_zoo.registry import PLUGINS_VARIABLE, find_candidates
from npu_zoo.testing.validation.processes import environment_of_children

_LOADED = "npu-zoo: loaded"
_LOAD = f"""
import sys
from importlib.metadata import EntryPoint
try:
    EntryPoint(sys.argv[1], sys.argv[2], "npu_zoo").load()
except BaseException:
    pass  # a registry tells what is wrong
print({_LOADED!r}, flush=True)
"""


def unloadable_plugins(timeout: float) -> dict[str, str]:
    """Installed plugins that end a process which loads them, or do not come back, by name with what happened.

    Args:
        timeout: seconds for each.
    """
    candidates = find_candidates(os.environ.get(PLUGINS_VARIABLE))
    found = {c.name: _probe(c.name, c.target, timeout) for c in candidates if not c.builtin and c.target}
    return {name: what for name, what in found.items() if what}


def _probe(name: str, target: str, timeout: float) -> str:
    """What happens to a process that loads a plugin; empty where it comes back."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _LOAD, name, target]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return f"a process that loads it did not come back within {timeout:g} s"
    if _LOADED in done.stdout:
        return ""
    return f"a process that loads it ends, with code {done.returncode}: {done.stderr.strip()[-300:]}".rstrip(": ")


@contextlib.contextmanager
def without_plugins(names: Collection[str]) -> Iterator[None]:
    """Have processes that are started meanwhile load every other plugin."""
    if not names:
        yield
        return
    candidates = find_candidates(os.environ.get(PLUGINS_VARIABLE))
    others = [c.name for c in candidates if not c.builtin and c.target and c.name not in names]
    with environment_of_children({PLUGINS_VARIABLE: ",".join(others)}):
        yield
