"""A plugin's directory as if it were installed, in this process and in those that it starts."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from npu_zoo.core.errors import PluginError, UsageError
from npu_zoo.core.hookspecs import PROJECT
from npu_zoo.registry import PLUGINS_VARIABLE, get_registry

PYTHONPATH = "PYTHONPATH"

_TABLE = f"[project.entry-points.{PROJECT}]"
_DYNAMIC_VERSION = "0+dynamic"
_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9.!+_-]+")
_POINT = re.compile(r"[\w.-]+")
_TARGET = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*)(\s*:\s*[^\W\d]\w*(\.[^\W\d]\w*)*)?")


@dataclass(frozen=True)
class Project:
    """What a directory's pyproject.toml says of its plugins.

    Attributes:
        name, version: of the distribution; a version that only a build finds out is ``0+dynamic``.
        plugins: the entry points of the group ``npu_zoo``, each with what it points at.
        roots: the folders that the entry points' modules are imported from.
    """

    directory: Path
    name: str
    version: str
    plugins: Mapping[str, str]
    roots: tuple[Path, ...]

    @property
    def packages(self) -> set[str]:
        """The top-level names of the entry points' modules."""
        return {_module(target).partition(".")[0] for target in self.plugins.values()}

    @property
    def installed_version(self) -> str | None:
        """The version under which a distribution of this name is installed; None where none is."""
        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return None


def read_project(directory: Path) -> Project:
    """Read a plugin's directory: its pyproject.toml, and where its modules lie, ``src`` or the directory itself.

    Raises:
        UsageError: there is no such directory.
        PluginError: pyproject.toml is missing or broken, names no plugin, or names a module that is not there.
    """
    directory = directory.absolute()
    if not directory.is_dir():
        raise UsageError(f"{directory} is no directory; name the one that holds the plugin's pyproject.toml")
    table = _project_table(directory / "pyproject.toml")
    name, version = table.get("name"), table.get("version", _DYNAMIC_VERSION)
    for key, value, form in (("name", name, _DISTRIBUTION), ("version", version, _VERSION)):
        if not isinstance(value, str) or not form.fullmatch(value):
            raise PluginError(f"{directory / 'pyproject.toml'} has {_shown(value)} as [project] {key}")
    plugins = _plugins(directory / "pyproject.toml", table)
    roots = dict.fromkeys(_root(directory, point, _module(target)) for point, target in plugins.items())
    return Project(directory, str(name), str(version), plugins, tuple(roots))


@contextlib.contextmanager
def installed_from(directory: Path) -> Iterator[tuple[str, ...]]:
    """Inside it, the plugins of a directory are found as if it were installed; yields their names.

    The registry is built anew on entry and on exit. Where a distribution of the same name is installed, the directory
    goes before it. Child processes see the same through ``PYTHONPATH``, unless they are told to ignore it.

    Args:
        directory: holds a pyproject.toml with entry points of the group ``npu_zoo``.

    Raises:
        UsageError: there is no such directory, or its path cannot stand in ``PYTHONPATH``.
        PluginError: it holds no plugin, or another distribution has a plugin of the same name.
    """
    project = read_project(directory)
    with tempfile.TemporaryDirectory(prefix="npu-zoo-plugin-") as folder, contextlib.ExitStack() as stack:
        _write_distribution(Path(folder), project)
        stack.callback(get_registry.cache_clear)
        stack.enter_context(_found_first([folder, *map(str, project.roots)]))
        stack.enter_context(_selected(project.plugins))
        stack.enter_context(_imported_anew(project.packages))
        _refuse_namesakes(project)
        get_registry.cache_clear()
        yield tuple(project.plugins)


def _project_table(file: Path) -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        table = toml.loads(file.read_text(encoding="utf-8")).get("project")
    except FileNotFoundError:
        raise PluginError(f"{file.parent} has no pyproject.toml; `npu-zoo plugin new NAME` writes a plugin") from None
    except OSError as error:
        raise PluginError(f"cannot read {file}: {error.strerror or error}") from None
    except ValueError as error:  # broken TOML, or no UTF-8
        raise PluginError(f"{file} cannot be parsed: {error}") from None
    if not isinstance(table, dict):
        raise PluginError(f"{file} has no table [project], with the plugin's name and entry points")
    return table


def _plugins(file: Path, table: Mapping[str, Any]) -> dict[str, str]:
    groups = table.get("entry-points", {})
    found = groups.get(PROJECT) if isinstance(groups, dict) else None
    if not isinstance(found, dict) or not found:
        raise PluginError(
            f'{file} names no plugin; write NAME = "package" under {_TABLE}. Where something else makes the entry '
            "points, install the plugin and run `npu-zoo validate --plugin NAME`"
        )
    for point, target in found.items():
        if not _POINT.fullmatch(point) or not isinstance(target, str) or not _TARGET.fullmatch(target):
            raise PluginError(f'{file}: {_TABLE} has {point!r} = {_shown(target)}; NAME = "package.module" is due')
        if _module(target).partition(".")[0] == __package__:
            raise PluginError(f"{file} is npu-zoo's own; `npu-zoo validate` checks the families that come with it")
    return dict(found)


def _root(directory: Path, point: str, module: str) -> Path:
    path = Path(*module.split("."))
    for root in (directory / "src", directory):
        if (root / path).is_dir() or (root / path.with_suffix(".py")).is_file():
            return root
    raise PluginError(
        f"{directory / 'pyproject.toml'}: the plugin {point} is the module {module}, and neither {directory / 'src'} "
        f"nor {directory} holds {path.as_posix()}/ or {path.as_posix()}.py"
    )


def _module(target: str) -> str:
    return target.partition(":")[0].strip()


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)


def _write_distribution(folder: Path, project: Project) -> None:
    """What an installer leaves behind of a distribution, without its modules."""
    info = folder / f"{_normalized(project.name)}-{project.version}.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project.name}\nVersion: {project.version}\n"
    (info / "METADATA").write_text(head, encoding="utf-8")
    points = [f"{name} = {target}\n" for name, target in project.plugins.items()]
    (info / "entry_points.txt").write_text("".join([f"[{PROJECT}]\n", *points]), encoding="utf-8")


def _normalized(distribution: str) -> str:
    """By this, importlib.metadata tells whether two distributions are the same; the first of them is taken."""
    return re.sub(r"[-_.]+", "_", distribution).lower()


@contextlib.contextmanager
def _found_first(folders: Sequence[str]) -> Iterator[None]:
    split = [folder for folder in folders if os.pathsep in folder]
    if split:
        raise UsageError(f"{split[0]} cannot stand in {PYTHONPATH} for its '{os.pathsep}'; name a copy elsewhere")
    before = os.environ.get(PYTHONPATH)
    sys.path[:0] = folders
    with _environment(PYTHONPATH, os.pathsep.join([*folders, *([before] if before else [])])):
        try:
            yield
        finally:
            for folder in folders:
                sys.path.remove(folder)


@contextlib.contextmanager
def _selected(plugins: Mapping[str, str]) -> Iterator[None]:
    """Where ``NPU_ZOO_PLUGINS`` selects, it selects these too."""
    before = os.environ.get(PLUGINS_VARIABLE)
    with contextlib.nullcontext() if before is None else _environment(PLUGINS_VARIABLE, ",".join([before, *plugins])):
        yield


@contextlib.contextmanager
def _environment(variable: str, value: str) -> Iterator[None]:
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = before


@contextlib.contextmanager
def _imported_anew(packages: set[str]) -> Iterator[None]:
    """The packages are imported from what is first on the path now; afterwards they are what they were."""
    before = _take_modules(packages)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        _take_modules(packages)
        sys.modules.update(before)
        importlib.invalidate_caches()


def _take_modules(packages: set[str]) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] in packages]
    return {name: sys.modules.pop(name) for name in names}


def _refuse_namesakes(project: Project) -> None:
    for point in metadata.entry_points(group=PROJECT):
        other = point.dist
        if other is not None and point.name in project.plugins and _normalized(other.name) != _normalized(project.name):
            raise PluginError(
                f"{other.name} {other.version} is installed and has a plugin named {point.name} too; "
                f"uninstall it, or give the one of {project.directory} another name"
            )
