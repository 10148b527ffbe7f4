"""What is validated: the parts of a registry that single plugins brought."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from npu_zoo.core.errors import NpuZooError, PluginError, UnknownModelError, UsageError
from npu_zoo.core.evidence import EvidenceRecord, row_digest
from npu_zoo.core.features import FeatureRow
from npu_zoo.core.specs import FamilySpec, VariantSpec
from npu_zoo.registry import PLUGINS_VARIABLE, Candidate, PluginRecord, Registry, build_registry, find_candidates
from npu_zoo.testing.shapes import config_of
from npu_zoo.testing.validation.claims import Subject

_KINDS = {
    "register_kernels": "kernel",
    "register_attention_backends": "attention backend",
    "register_engines": "engine",
    "register_weight_formats": "weight format",
    "register_quantization_methods": "quantization method",
    "register_families": "family",
}


@dataclass(frozen=True)
class Part:
    """What one plugin brought to a registry.

    Attributes:
        only: the families to look at; all of the plugin's where empty.
    """

    record: PluginRecord
    registry: Registry
    only: tuple[str, ...] = ()

    @property
    def families(self) -> list[FamilySpec]:
        """The plugin's families that are looked at."""
        names = self.record.registered.get("register_families", [])
        return [self.registry.families[name] for name in names if not self.only or name in self.only]

    @property
    def specs(self) -> Iterator[tuple[str, Any]]:
        """Every spec with the word for its kind; where single families are looked at, theirs alone."""
        for hook, kind in _KINDS.items():
            if hook == "register_families":
                yield from ((kind, family) for family in self.families)
            elif not self.only:
                table = getattr(self.registry, hook.removeprefix("register_"))
                yield from ((kind, table[name]) for name in self.record.registered.get(hook, []))

    def rows(self, family: FamilySpec) -> Iterator[tuple[int, FeatureRow]]:
        """A family's sound rows, each with its place among them, from 0."""
        yield from enumerate(family.rows)

    @property
    def readable(self) -> Part:
        """The same where variants whose bundled checkpoint cannot be read are as those without hyperparameters."""
        registry = self.registry
        for family in self.families:
            variants = tuple(v.model_copy(update=_NO_SHAPE) if bundled_fault(v, family) else v for v in family.variants)
            registry = registry.with_family(family.model_copy(update={"variants": variants}))
        return replace(self, registry=registry)

    def subject(self, family: FamilySpec, row: FeatureRow) -> Subject:
        """A row as its author numbered it, from 1, with those that are left out."""
        left_out = {fault.row for fault in self.record.faults if fault.family == family.name}
        total = len(family.rows) + len(left_out)
        numbers = [number for number in range(1, total + 1) if number not in left_out]
        return Subject(self.record.name, family.name, numbers[family.rows.index(row)], name=row.describe())

    def subject_of_record(self, family: FamilySpec, record: EvidenceRecord) -> Subject:
        """The row that a record speaks of, or else the family."""
        row = next((row for row in family.rows if row_digest(row) == record.row), None)
        return self.subject(family, row) if row else Subject(self.record.name, family.name)


_NO_SHAPE = {"bundled": "", "config": None}


def bundled_fault(variant: VariantSpec, family: FamilySpec) -> str:
    """Why the checkpoint that a variant names as bundled cannot be read; empty where it can, or where none is named."""
    try:
        config_of(variant, family)
    except (NpuZooError, ImportError, ValueError) as error:
        return str(error)
    return ""


def validation_registry(left_out: Mapping[str, str] | None = None) -> Registry:
    """The installed plugins, of which the sound parts are kept whatever else they brought.

    Args:
        left_out: plugins that are not loaded, by name with the reason.
    """
    reasons = left_out or {}
    candidates = find_candidates(os.environ.get(PLUGINS_VARIABLE))
    kept = (_refused(c, reasons[c.name]) if c.name in reasons else c for c in candidates)
    return build_registry(kept, tolerant=True)


def _refused(candidate: Candidate, reason: str) -> Candidate:
    def load() -> object:
        raise PluginError(reason)

    return replace(candidate, load=load)


def parts_of(registry: Registry, plugins: Sequence[str] = (), families: Sequence[str] = ()) -> list[Part]:
    """The parts of named plugins, and of those that brought the named families; of all where none is named.

    Raises:
        UsageError: a plugin of that name is not installed.
        UnknownModelError: no plugin registers a family of that name.
    """
    for name in plugins:
        if name not in registry.plugins:
            raise UsageError(f"no plugin is named '{name}'; installed: {', '.join(registry.plugins)}")
    for name in families:
        if name not in registry.families:
            dropped = [f"plugin {r.name} was dropped: {r.error}" for r in registry.plugins.values() if r.error]
            known = f"no model family is named '{name}'; families: {', '.join(registry.families) or 'none'}"
            raise UnknownModelError("\n".join([known, *dropped]))
    owners = {registry.owner(name) for name in families}
    everything = not plugins and not families
    return [
        Part(record, registry, () if everything or record.name in plugins else tuple(families))
        for record in registry.plugins.values()
        if everything or record.name in plugins or record.name in owners
    ]
