"""What a plugin's author asserts in pytest: that its specs, its matrix and its kernels hold what they claim."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from npu_zoo.core.specs import FamilySpec
from npu_zoo.registry import Candidate, Registry, build_registry, find_candidates, get_registry, registry_in_place
from npu_zoo.testing.validation.claims import Claim, Outcome
from npu_zoo.testing.validation.scope import Part

_NATIVE = "native"


@contextlib.contextmanager
def isolated_registry(*plugins: Any) -> Iterator[Registry]:
    """Have the zoo's own kernels, backends, engine and formats in this process with the given plugins, and no others.

    Args:
        plugins: modules or objects that implement hooks, in the order in which they are loaded.

    Raises:
        AssertionError: one of them does not load; says why.
    """
    with registry_in_place(_registry_of(plugins, tolerant=False)) as registry:
        broken = [f"{record.name}: {record.error}" for record in registry.plugins.values() if record.error]
        if broken:
            raise AssertionError("\n".join(broken))
        yield registry


def assert_spec_valid(plugin: Any) -> None:
    """Assert what a plugin's specs claim that data alone can tell; see `npu-zoo validate --level spec`.

    Args:
        plugin: a module or object that implements hooks, or the name of an installed plugin.

    Raises:
        AssertionError: every claim that does not hold, with its row and axis.
    """
    from npu_zoo.testing.validation import spec

    with _part(plugin) as part:
        _require(spec.claims(part))


def assert_matrix_builds(family: FamilySpec | str) -> None:
    """Assert that every variant builds for every row, on each of its world sizes, and fits the row's hardware.

    Args:
        family: a spec, or the name of a registered one.

    Raises:
        AssertionError: every claim that does not hold, with its row and axis.
    """
    from npu_zoo.testing.validation import build

    registry = get_registry()
    if isinstance(family, FamilySpec) and registry.families.get(family.name) is not family:
        registry = registry.with_family(family)
    name = family if isinstance(family, str) else family.name
    registry.find(name)
    with registry_in_place(registry):
        part = Part(registry.plugins[registry.owner(name)], registry, (name,))
        _require(claim for claim in build.claims(part) if claim.subject.family == name)


def assert_kernels_match_reference(plugin: Any) -> None:
    """Assert that a plugin's kernels compute what the references of their operations do, in each of their dtypes.

    Kernels of chips that this machine does not have, real or simulated, are left out.

    Args:
        plugin: a module or object that implements hooks, or the name of an installed plugin.

    Raises:
        AssertionError: every kernel that differs, by how much; or no kernel of the plugin can be run here.
    """
    from npu_zoo.testing.validation import run

    with _part(plugin) as part:
        outcomes = _require(claim for claim in run.claims(part) if claim.subject.name.startswith("kernel "))
    if outcomes and all(outcome.status == "skipped" for outcome in outcomes):
        raise AssertionError(f"no kernel could be run here: {outcomes[0].message}")


@contextlib.contextmanager
def _part(plugin: Any) -> Iterator[Part]:
    """A plugin's part of a tolerant registry, which is this process's own meanwhile."""
    if isinstance(plugin, str):
        registry, name = build_registry(find_candidates(None), tolerant=True), plugin
    else:
        registry = _registry_of([plugin], tolerant=True)
        name = list(registry.plugins)[-1]
    if name not in registry.plugins:
        raise AssertionError(f"no plugin is named '{name}'; installed: {', '.join(registry.plugins)}")
    with registry_in_place(registry):
        yield Part(registry.plugins[name], registry)


def _registry_of(plugins: Iterable[Any], *, tolerant: bool) -> Registry:
    native = [candidate for candidate in find_candidates("") if candidate.name == _NATIVE]
    own = [_candidate(plugin) for plugin in plugins]
    return build_registry([*native, *own], tolerant=tolerant)


def _candidate(plugin: Any) -> Candidate:
    """A plugin under the name of its entry point where it is installed, else under its module's."""
    target = getattr(plugin, "__name__", type(plugin).__name__)
    for candidate in find_candidates(None):
        if candidate.target.partition(":")[0] == target:
            return Candidate(candidate.name, lambda: plugin, candidate.target, candidate.distribution)
    return Candidate(target, lambda: plugin, target)


def _require(claims: Iterable[Claim]) -> list[Outcome]:
    outcomes = [claim.judge() for claim in claims]
    failed = [
        f"{outcome.subject.describe()} [{outcome.subject.axis}]: {outcome.text}: {outcome.message}"
        for outcome in outcomes
        if outcome.status == "fails"
    ]
    if failed:
        raise AssertionError("\n".join(failed))
    return outcomes
