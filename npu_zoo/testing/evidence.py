"""Whether evidence still speaks of the code at hand: which code that is, and which records have gone stale."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path

import npu_zoo
from npu_zoo.core.evidence import EvidenceRecord, code_digest, row_digest, source_digest
from npu_zoo.core.specs import FamilySpec
from npu_zoo.platforms.caches import cache_folder
from npu_zoo.registry import PluginRecord
from npu_zoo.testing.files import write_whole

_ROOMS = ("engine", "nn", "plugins/native")
_SINGLE = ("core/attention.py", "core/parallel.py", "parallel/device_groups.py", "parallel/sends.py")
_KEPT = 4096
"""Files whose digests are remembered; the oldest go first."""


def evidence_files(family: FamilySpec, plugin: PluginRecord) -> list[Path]:
    """What a family's evidence rests on: its plugin, the engine, the layers, the kernels, and how ranks talk."""
    package = Path(npu_zoo.__file__).parent
    common = [file for room in _ROOMS for file in (package / room).rglob("*.py")]
    return [*common, *(package / name for name in _SINGLE), *plugin_files(family, plugin)]


def plugin_files(family: FamilySpec, plugin: PluginRecord) -> list[Path]:
    """The Python files of a family's plugin: its package, or the modules that its entry point and its model are in."""
    modules = dict.fromkeys(reference.partition(":")[0] for reference in (plugin.target, family.model))
    found = {file for module in modules if module for file in _files_of(module)}
    return sorted(found)


def _files_of(module: str) -> list[Path]:
    owner = ".".join(module.split(".")[:3]) if module.startswith("npu_zoo.plugins.") else module.partition(".")[0]
    spec = importlib.util.find_spec(owner)
    if spec is None or (spec.origin is None and not spec.submodule_search_locations):
        return []
    if spec.submodule_search_locations:
        return [file for place in spec.submodule_search_locations for file in Path(place).rglob("*.py")]
    return [Path(str(spec.origin))]


def current_code(family: FamilySpec, plugin: PluginRecord) -> str:
    """Today's digest of :func:`evidence_files`."""
    return digest_of_files(evidence_files(family, plugin))


def digest_of_files(files: Iterable[Path]) -> str:
    """:func:`npu_zoo.core.evidence.code_digest` of some files, of which those that were seen before are not parsed."""
    memory = _remembered()
    before = len(memory)

    def digest_of(source: bytes) -> str:
        key = hashlib.sha256(source).hexdigest()
        if key not in memory:
            memory[key] = source_digest(source)
        return memory[key]

    code = code_digest(files, digest_of)
    if len(memory) > before:
        _remember(memory)
    return code


def stale_records(family: FamilySpec, plugin: PluginRecord) -> list[EvidenceRecord]:
    """Records that speak of other code than that at hand, or of a row that the family no longer has."""
    if not family.records:
        return []
    code, rows = current_code(family, plugin), {row_digest(row) for row in family.rows}
    return [record for record in family.records if record.code != code or record.row not in rows]


def _place() -> Path:
    return cache_folder() / "source-digests.json"


@functools.cache
def _remembered() -> dict[str, str]:
    """Digests of sources by the hash of their bytes: reading a syntax tree takes longer than a listing may."""
    try:
        found = json.loads(_place().read_text("utf-8"))
    except (OSError, ValueError, RuntimeError):  # there is none, it is damaged, or there is no home
        return {}
    sound = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    return found if sound else {}


def _remember(memory: dict[str, str]) -> None:
    newest = dict(list(memory.items())[-_KEPT:])
    with contextlib.suppress(OSError, RuntimeError):  # what cannot be kept is computed again
        write_whole(_place(), json.dumps(newest))
