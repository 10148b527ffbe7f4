"""Finds plugins through entry points and keeps what they registered.

Loading is guarded one plugin at a time: a broken import, a bad signature, a misspelt hook, a raising hook or a name
clash drops that plugin, keeps its error, and leaves the rest working.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, TypeVar

import pluggy
from pydantic import ValidationError

from npu_zoo.core import hookspecs
from npu_zoo.core.errors import NpuZooError, PluginError, UnknownModelError, UsageError, validation_lines
from npu_zoo.core.specs import (
    AttentionBackendSpec,
    EngineSpec,
    FamilySpec,
    KernelSpec,
    QuantizationSpec,
    VariantSpec,
    WeightFormatSpec,
)

PLUGINS_VARIABLE = "NPU_ZOO_PLUGINS"
App = TypeVar("App")

_SPEC_HOOKS: dict[str, type[Any]] = {
    "register_families": FamilySpec,
    "register_kernels": KernelSpec,
    "register_attention_backends": AttentionBackendSpec,
    "register_engines": EngineSpec,
    "register_weight_formats": WeightFormatSpec,
    "register_quantization_methods": QuantizationSpec,
}
_HOOKS = (*_SPEC_HOOKS, "register_commands")


@dataclass(frozen=True)
class SpecFault:
    """Something that a plugin may not register.

    Attributes:
        subject: the hook that gave it, or a family's row.
        axis: of a row, what is at fault.
        family: whose row it is; empty for what is no row.
        row: the row's number, from 1.
    """

    subject: str
    axis: str
    message: str
    family: str = ""
    row: int = 0

    def __str__(self) -> str:
        return f"{self.subject}: {self.message}"


@dataclass
class PluginRecord:
    """One plugin as it was found.

    Attributes:
        target: the entry point's value.
        distribution: name and version of the package that brings it.
        error: why it was dropped; None where it works.
        faults: what a tolerant registry left out of it, by name or row, with the reason.
        registered: names of what it registered, by hook; its commands once the command line has taken them.
        imports_torch: whether torch came along when it was loaded or its hooks were called.
    """

    name: str
    target: str = ""
    distribution: str = ""
    builtin: bool = False
    error: str | None = None
    faults: list[SpecFault] = field(default_factory=list)
    registered: dict[str, list[str]] = field(default_factory=dict)
    imports_torch: bool = False

    @property
    def remarks(self) -> list[str]:
        """What its author should look at, although it loads."""
        found = [] if self.registered or self.error else ["registers nothing"]
        return found + (["imports torch at load time: every command gets slower"] if self.imports_torch else [])


@dataclass(frozen=True)
class Candidate:
    """A plugin that is yet to be loaded."""

    name: str
    load: Callable[[], object]
    target: str = ""
    distribution: str = ""
    builtin: bool = False


class Registry:
    """What the loaded plugins registered, by kind.

    Args:
        tolerant: keep of a plugin what is sound, so that it can be validated; otherwise it is dropped as a whole.
    """

    def __init__(self, *, tolerant: bool = False) -> None:
        self._tolerant = tolerant
        self.plugins: dict[str, PluginRecord] = {}
        self.families: dict[str, FamilySpec] = {}
        self.kernels: dict[str, KernelSpec] = {}
        self.attention_backends: dict[str, AttentionBackendSpec] = {}
        self.engines: dict[str, EngineSpec] = {}
        self.weight_formats: dict[str, WeightFormatSpec] = {}
        self.quantization_methods: dict[str, QuantizationSpec] = {}
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)

    def add(self, candidate: Candidate) -> PluginRecord:
        """Load one plugin and take what it registers; a failure is kept in its record and raised nowhere."""
        record = PluginRecord(candidate.name, candidate.target, candidate.distribution, candidate.builtin)
        if candidate.name in self.plugins:
            first = self.plugins[candidate.name]
            record.name = f"{candidate.name} ({candidate.distribution or candidate.target})"
            record.error = f"the plugin name '{candidate.name}' is taken by {first.distribution or first.target}"
            self.plugins[record.name] = record
            return record
        self.plugins[candidate.name] = record
        try:
            with _foreign_code(record):
                plugin = candidate.load()
                self._register(plugin, candidate.name)
                specs = self._collect(plugin)
            faults = [*self._clashes(specs), *_row_faults(specs)]
            if faults and not self._tolerant:
                raise PluginError("\n".join(map(str, faults)))
            record.faults = faults
        # A plugin is foreign code: whatever it raises, and sys.exit too, must not take the others along.
        except (Exception, SystemExit) as error:
            record.error = _error_text(error)
            self._drop(candidate.name)
            return record
        for hook, found in specs.items():
            kept = {spec.name: _sound(spec) for spec in reversed(found) if self._owner_of(hook, spec.name) is None}
            self._table(hook).update(dict(reversed(kept.items())))
            record.registered[hook] = list(reversed(kept))
        return record

    def collect_commands(self, new_app: Callable[[], App]) -> Iterator[tuple[PluginRecord, App]]:
        """Every plugin with an application that holds its commands, and nothing else.

        A plugin that raises is left out with all that it added; its error is kept in its record.
        """
        for name, plugin in list(self._manager.list_name_plugin()):
            record, app = self.plugins[name], new_app()
            try:
                with _foreign_code(record):
                    self._call("register_commands", plugin, app=app)
            except (Exception, SystemExit) as error:
                record.error = f"register_commands raised {_error_text(error)}"
            else:
                yield record, app

    def with_family(self, family: FamilySpec) -> Registry:
        """The same plugins with a family changed or added, for tests; this registry stays as it is."""
        found = copy.copy(self)
        found.families = {**self.families, family.name: family}
        return found

    def owner(self, family: str) -> str:
        """The name of the plugin that registered a family."""
        return next(r.name for r in self.plugins.values() if family in r.registered.get("register_families", []))

    def find(self, model: str) -> tuple[FamilySpec, VariantSpec | None]:
        """The family and variant of ``family`` or ``family:variant``; the variant is None for a bare family.

        Raises:
            UnknownModelError: there is none; names what exists, and plugins that were dropped.
        """
        name, _, variant_name = model.partition(":")
        family = self.families.get(name)
        if family is None:
            raise UnknownModelError(self._unknown_family(name))
        if not variant_name:
            return family, None
        variant = family.variant(variant_name)
        if variant is None:
            names = [v.name + (f" ({', '.join(v.aliases)})" if v.aliases else "") for v in family.variants]
            raise UnknownModelError(f"{name} has no variant '{variant_name}'; it has: {', '.join(names)}")
        return family, variant

    def _unknown_family(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.families, n=1)
        lines = [f"no model family is named '{name}'" + (f"; did you mean {near[0]}?" if near else "")]
        lines.append(f"families: {', '.join(sorted(self.families)) or 'none'}; `npu-zoo list` shows their variants")
        lines += [f"plugin {r.name} was dropped: {r.error}" for r in self.plugins.values() if r.error]
        return "\n".join(lines)

    def _register(self, plugin: object, name: str) -> None:
        first = self._manager.get_name(plugin)
        if first is not None:
            raise PluginError(f"this is plugin '{first}' once more; keep one of the two entry points")
        misspelt = _misspelt_hook(self._manager, plugin)
        if misspelt:
            near = difflib.get_close_matches(misspelt, _HOOKS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; hooks: {', '.join(_HOOKS)}"
            raise PluginError(f"there is no hook named {misspelt}{hint}")
        unmarked = [h for h in _HOOKS if hasattr(plugin, h) and self._manager.parse_hookimpl_opts(plugin, h) is None]
        if unmarked:
            raise PluginError(f"{unmarked[0]} is not marked with @npu_zoo.hookimpl")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pluggy.PluggyWarning)
            self._manager.register(plugin, name)

    def _drop(self, name: str) -> None:
        # pluggy up to 1.6 keeps an impl with a bad signature registered, 1.7 does not.
        if self._manager.has_plugin(name):
            self._manager.unregister(name=name)

    def _collect(self, plugin: object) -> dict[str, list[Any]]:
        specs: dict[str, list[Any]] = {}
        for hook, kind in _SPEC_HOOKS.items():
            answer = [spec for answers in self._call(hook, plugin) for spec in _as_list(hook, answers)]
            wrong = [item for item in answer if not isinstance(item, kind)]
            if wrong:
                raise PluginError(f"{hook} returned {type(wrong[0]).__name__} where a list of {kind.__name__} is due")
            if answer:
                specs[hook] = answer
        return specs

    def _call(self, hook: str, plugin: object, **kwargs: Any) -> list[Any]:
        # Not subset_hook_caller: up to pluggy 1.6 it leaves in other plugins that implement the hook by specname.
        impls = [impl for impl in getattr(self._manager.hook, hook).get_hookimpls() if impl.plugin is plugin]
        return [impl.function(*(kwargs[name] for name in impl.argnames)) for impl in impls]

    def _clashes(self, specs: dict[str, list[Any]]) -> Iterator[SpecFault]:
        for hook, found in specs.items():
            names = [spec.name for spec in found]
            for name in dict.fromkeys(names):
                owner = self._owner_of(hook, name)
                if owner or names.count(name) > 1:
                    taken = f"is taken by plugin {owner}" if owner else "is registered twice"
                    yield SpecFault(hook, "name", f"the name '{name}' {taken}")

    def _owner_of(self, hook: str, name: str) -> str | None:
        return next((r.name for r in self.plugins.values() if name in r.registered.get(hook, [])), None)

    def _table(self, hook: str) -> dict[str, Any]:
        table: dict[str, Any] = getattr(self, hook.removeprefix("register_"))
        return table


def _row_faults(specs: dict[str, list[Any]]) -> Iterator[SpecFault]:
    families = specs.get("register_families", [])
    for family in {family.name: family for family in reversed(families)}.values():  # the first of each name is kept
        for row, axis, message in family.faults():
            yield SpecFault(f"{family.name} row {row}", axis, message, family.name, row)


def _sound(spec: Any) -> Any:
    return spec.sound() if isinstance(spec, FamilySpec) else spec


@contextlib.contextmanager
def _foreign_code(record: PluginRecord) -> Iterator[None]:
    """Keeps what a plugin prints off standard output, where results go, and notes when it brings torch along."""
    had_torch = "torch" in sys.modules
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        record.imports_torch |= not had_torch and "torch" in sys.modules


def _error_text(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        return "\n".join(validation_lines(error, error.title))
    return f"{type(error).__name__}: {error}"


def _as_list(hook: str, answers: Any) -> Iterable[Any]:
    if not isinstance(answers, (list, tuple)):
        raise PluginError(f"{hook} returned {type(answers).__name__} where a list is due")
    return answers


def _misspelt_hook(manager: pluggy.PluginManager, plugin: object) -> str | None:
    """The first name that an attribute is marked to implement, and that is no hook."""
    for attribute in dir(plugin):
        marked = manager.parse_hookimpl_opts(plugin, attribute)
        if marked is not None and not marked.get("optionalhook"):
            hook = str(marked.get("specname") or attribute)
            if hook not in _HOOKS:
                return hook
    return None


def find_candidates(selection: str | None) -> Iterator[Candidate]:
    """Built-in plugins, then installed ones by name.

    Args:
        selection: the value of ``NPU_ZOO_PLUGINS``: None takes all, an empty string none but the built-in ones, and a
            comma-separated list the named ones beside the built-in ones. A name that is not installed becomes a
            candidate whose loading fails, so that it shows up.
    """
    points = sorted(metadata.entry_points(group=hookspecs.PROJECT), key=lambda p: (not _is_builtin(p), p.name, p.value))
    wanted = None if selection is None else [name.strip() for name in selection.split(",") if name.strip()]
    for point in points:
        if _is_builtin(point) or wanted is None or point.name in wanted:
            yield Candidate(point.name, point.load, point.value, _distribution(point), _is_builtin(point))
    known = {point.name for point in points}
    for name in wanted or ():
        if name not in known:
            yield Candidate(name, functools.partial(_not_installed, name, tuple(sorted(known))))


def _not_installed(name: str, known: tuple[str, ...]) -> object:
    raise UsageError(f"{PLUGINS_VARIABLE} names '{name}', which is not installed; installed: {', '.join(known)}")


def _is_builtin(point: metadata.EntryPoint) -> bool:
    return point.value.startswith("npu_zoo.plugins.")


def _distribution(point: metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else ""


def build_registry(candidates: Iterable[Candidate], *, tolerant: bool = False) -> Registry:
    """A registry of the given plugins, in their order."""
    registry = Registry(tolerant=tolerant)
    for candidate in candidates:
        registry.add(candidate)
    return registry


@functools.cache
def get_registry() -> Registry:
    """This process's registry, built on first use from the installed plugins and ``NPU_ZOO_PLUGINS``."""
    return _in_place[-1] if _in_place else build_registry(find_candidates(os.environ.get(PLUGINS_VARIABLE)))


_in_place: list[Registry] = []


@contextlib.contextmanager
def registry_in_place(registry: Registry) -> Iterator[Registry]:
    """Make a registry this process's own for a while; engines that are made meanwhile find their plugins in it."""
    _in_place.append(registry)
    get_registry.cache_clear()
    try:
        yield registry
    finally:
        _in_place.remove(registry)
        get_registry.cache_clear()


def load_code(reference: str) -> Any:
    """Import what a spec names as ``package.module:attribute``.

    Raises:
        PluginError: the module cannot be imported or has no such attribute.
    """
    module_name, _, attribute = reference.partition(":")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = importlib.import_module(module_name)
    except NpuZooError:
        raise
    except Exception as error:
        raise PluginError(f"cannot import {reference}: {_error_text(error)}") from error
    if not hasattr(module, attribute):
        raise PluginError(f"{module_name} has no attribute '{attribute}', which a spec names")
    return getattr(module, attribute)
