"""For pytest: the conformance suite of an installed plugin, one test per claim, and fixtures for a plugin's own tests.

``pytest --npu-zoo-plugin NAME`` collects the suite, and beside it the tests of files that are named. Unless the option
or a fixture is used, nothing of the package is imported.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from npu_zoo.registry import Registry
    from npu_zoo.testing.validation.claims import Claim, Level

_LEVELS = ("spec", "build", "run")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the suite."""
    group = parser.getgroup("npu-zoo", "conformance of npu-zoo's plugins")
    group.addoption(
        "--npu-zoo-plugin",
        action="append",
        default=[],
        metavar="NAME",
        help="Collect the conformance suite of this installed plugin; repeatable.",
    )
    group.addoption(
        "--npu-zoo-level",
        choices=_LEVELS,
        default="run",
        help="How far the suite goes: spec (data alone), build (shapes) or run (tiny models on the CPU). Default: run.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse names of plugins that are not installed, before xdist starts processes that would pass over it."""
    names = config.getoption("--npu-zoo-plugin")
    if names and not hasattr(config, "workerinput"):
        from npu_zoo.core.errors import UsageError
        from npu_zoo.testing.validation.scope import parts_of, validation_registry

        try:
            parts_of(validation_registry(), names)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Collect the suites before what was asked for; where no file is named, nothing else."""
    config = session.config
    names = config.getoption("--npu-zoo-plugin")
    if names:
        config.pluginmanager.register(_Suites(names, config.getoption("--npu-zoo-level")))
        if config.args_source is not pytest.Config.ArgsSource.ARGS:
            config.args = []


class _Suites:
    """Adds the suites of some plugins to what was collected."""

    def __init__(self, names: list[str], level: Level) -> None:
        self._names, self._level = names, level

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Put the suites first."""
        from npu_zoo.testing.validation.scope import parts_of, validation_registry
        from npu_zoo.testing.validation.suite import claims_of

        registry = validation_registry()
        claims = claims_of(parts_of(registry, self._names), self._level)
        suites: dict[str, ConformanceSuite] = {}
        added: list[pytest.Item] = []
        for claim in claims:
            plugin = claim.subject.plugin
            if plugin not in suites:
                suites[plugin] = ConformanceSuite.from_parent(
                    session, name=f"npu-zoo:{plugin}", nodeid=f"npu-zoo:{plugin}"
                )
                suites[plugin].registry = registry
            added.append(ConformanceTest.from_parent(suites[plugin], name=claim.id, claim=claim))
        items[:0] = added


class ConformanceSuite(pytest.Collector):
    """The claims of one plugin."""

    registry: Registry

    def collect(self) -> list[pytest.Item]:
        """Nothing more: the claims are added to the session's tests."""
        return []


class ConformanceTest(pytest.Item):
    """One claim."""

    def __init__(self, *, claim: Claim, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.claim = claim

    def runtest(self) -> None:
        """Judge the claim with the plugins as they are installed."""
        from npu_zoo.registry import registry_in_place

        parent = self.parent
        assert isinstance(parent, ConformanceSuite)
        with registry_in_place(parent.registry):
            outcome = self.claim.judge()
        if outcome.status == "skipped":
            pytest.skip(outcome.message)
        if outcome.status == "fails":
            raise ConformanceFailure(outcome.message)
        self.user_properties += list(outcome.figures.items())

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        """What is wrong, without a traceback of this module."""
        if isinstance(excinfo.value, ConformanceFailure):
            axis = self.claim.subject.axis
            return f"{self.claim.subject.describe()}\naxis: {axis or '-'}\nclaim: {self.claim.text}\n\n{excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """The claim as one line."""
        return self.path, None, self.name


class ConformanceFailure(Exception):
    """A claim that does not hold."""


@pytest.fixture
def isolated_registry() -> Iterator[Callable[..., Registry]]:
    """Call it with plugins: the zoo's own kernels and they are this process's registry until the test ends."""
    from npu_zoo.testing.assertions import isolated_registry as isolated

    with contextlib.ExitStack() as stack:
        yield functools.partial(_enter, stack, isolated)


def _enter(stack: contextlib.ExitStack, isolated: Any, *plugins: Any) -> Registry:
    registry: Registry = stack.enter_context(isolated(*plugins))
    return registry
