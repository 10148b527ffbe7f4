"""The direction of imports, what plugins may import, and what never brings torch along."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import npu_zoo

PACKAGE = Path(npu_zoo.__file__).parent

# A room is a folder or module of the package. A room imports rooms of its own line or of lines above it.
LINES: tuple[tuple[str, ...], ...] = (
    ("", "core"),
    ("api", "registry", "uninstalled"),
    (
        "checkpoint",
        "communication",
        "compiled",
        "config_fields",
        "dispatch",
        "fitting",
        "matching",
        "matrix_text",
        "parallel",
        "planning",
        "platforms",
        "request",
        "selection",
        "settings",
        "speculation",
        "splitting",
    ),
    ("nn", "weights"),
    ("engine",),
    ("protocol",),
    ("evaluation", "server", "testing"),
    ("cli",),
    ("__main__",),
)
LINE = {room: number for number, rooms in enumerate(LINES) for room in rooms}
OUTSIDE = {"plugins", "simulator"}
"""Rooms with rules of their own: nobody imports them by name."""

PLUGIN_SURFACE = {"api", "nn"}
HEAVY = {"torch", "torch_npu", "transformers", "accelerate"}
TORCH_FREE = {"", "__main__", "api", "checkpoint", "cli", "communication", "core", "dispatch", "platforms", "plugins"}
TORCH_FREE |= {"fitting", "parallel", "planning", "registry", "request", "selection", "settings", "splitting"}
TORCH_FREE |= {
    "compiled",
    "config_fields",
    "matching",
    "matrix_text",
    "protocol",
    "server",
    "speculation",
    "uninstalled",
}


@dataclass(frozen=True)
class Import:
    """One import statement: who, what, and whether it runs when the module is imported."""

    module: str
    target: str
    top_level: bool

    @property
    def rooms(self) -> tuple[str, str]:
        return room_of(self.module), room_of(self.target)


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def targets(node: ast.stmt, module: str, is_package: bool) -> list[str]:
    """The modules that a statement imports; ``from package import module`` names the module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = module.split(".")[: None if is_package and node.level == 1 else -node.level + is_package]
        base = ".".join([*package, *([base] if base else [])])
    return [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def walk(node: ast.AST, top_level: bool = True) -> Iterator[tuple[ast.stmt, bool]]:
    """Every statement that can run, with whether importing the module runs it."""
    if is_type_checking(node):
        assert isinstance(node, ast.If)
        children: list[ast.AST] = list(node.orelse)
    else:
        children = list(ast.iter_child_nodes(node))
    for child in children:
        if isinstance(child, ast.stmt):
            yield child, top_level
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from walk(child, top_level and not inside)


def imports_of(source: str, module: str, is_package: bool = False) -> list[Import]:
    statements = walk(ast.parse(source))
    return [Import(module, target, top) for node, top in statements for target in targets(node, module, is_package)]


@cache
def all_imports() -> list[Import]:
    return [
        found
        for module, path in MODULES.items()
        for found in imports_of(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    ]


def internal() -> list[Import]:
    return [i for i in all_imports() if i.target.split(".")[0] == "npu_zoo"]


def test_the_scan_sees_every_kind_of_import() -> None:
    source = """
from typing import TYPE_CHECKING
import json as j, npu_zoo.core.errors
from npu_zoo import registry, __version__
from ..core import features
from . import near
if TYPE_CHECKING:
    import torch
else:
    import pydantic
class A:
    from re import sub
    def f(self):
        import torch_npu
"""
    found = imports_of(source, "npu_zoo.nn.linear")
    expected = ["typing", "json", "npu_zoo.core.errors", "npu_zoo.registry", "npu_zoo", "npu_zoo.core.features"]
    assert [i.target for i in found] == [*expected, "npu_zoo.nn", "pydantic", "re", "torch_npu"]
    assert [i.target for i in found if not i.top_level] == ["torch_npu"]
    assert [i.target for i in imports_of("from . import x", "npu_zoo.nn", True)] == ["npu_zoo.nn"]


def test_every_room_has_its_line() -> None:
    assert {room_of(module) for module in MODULES} <= set(LINE) | OUTSIDE


def test_imports_go_one_way() -> None:
    wrong = [i for i in internal() if i.rooms[0] not in OUTSIDE and i.rooms[1] not in OUTSIDE and _upwards(*i.rooms)]
    assert wrong == []


def _upwards(importer: str, imported: str) -> bool:
    return LINE[imported] > LINE[importer]


def test_rooms_of_one_line_form_no_cycle() -> None:
    edges = {i.rooms for i in internal() if i.rooms[0] != i.rooms[1]}
    rooms = {room for edge in edges for room in edge}
    while leaves := {room for room in rooms if not any(a == room and b in rooms for a, b in edges)}:
        rooms -= leaves
    assert rooms == set()


def test_core_imports_nothing_else_of_the_package() -> None:
    assert [i for i in internal() if i.rooms[0] == "core" and i.rooms[1] != "core"] == []


def test_nobody_imports_a_plugin_or_the_simulator_by_name() -> None:
    assert [i for i in internal() if i.rooms[1] in OUTSIDE and i.rooms[0] != i.rooms[1]] == []


def test_plugins_import_the_two_surfaces_and_themselves() -> None:
    def allowed(found: Import) -> bool:
        own = ".".join(found.module.split(".")[:3])
        return found.rooms[1] in PLUGIN_SURFACE or found.target == own or found.target.startswith(f"{own}.")

    plugins = [i for i in internal() if i.rooms[0] == "plugins"]
    assert plugins
    assert [i for i in plugins if not allowed(i)] == []


def test_the_simulator_stands_alone() -> None:
    assert [i for i in internal() if i.rooms[0] == "simulator" and i.rooms[1] != "simulator"] == []


def test_torch_free_rooms_import_nothing_heavy_when_imported() -> None:
    heavy = [i for i in all_imports() if i.top_level and i.target.split(".")[0] in HEAVY]
    assert [i for i in heavy if i.rooms[0] in TORCH_FREE - {"plugins"}] == []
    assert [i for i in heavy if i.rooms[0] == "plugins" and MODULES[i.module].name == "__init__.py"] == []


def test_core_and_registry_name_no_heavy_module_at_all() -> None:
    heavy = [i for i in all_imports() if i.target.split(".")[0] in HEAVY]
    assert [i for i in heavy if i.rooms[0] in ("core", "registry", "api", "")] == []


def test_no_family_s_name_stands_outside_its_plugin() -> None:
    families = {path.name for path in (PACKAGE / "plugins").iterdir() if path.is_dir()} - {"native", "__pycache__"}
    found = []
    for module, path in MODULES.items():
        own = module.split(".")[2] if room_of(module) == "plugins" and module.count(".") > 1 else ""
        foreign = "|".join(families - {own}) if own in families else "deepseek|wizardcoder|" + "|".join(families)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if foreign and re.search(foreign, line, re.IGNORECASE):
                found.append(f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}")
    assert families
    assert found == []


@pytest.mark.parametrize("statement", ["import npu_zoo", "import npu_zoo; npu_zoo.hookimpl; npu_zoo.SamplingParams"])
def test_the_package_is_light(statement: str) -> None:
    assert loaded(statement) & HEAVY == set()


def test_importing_the_package_alone_brings_no_dependency() -> None:
    assert loaded("import npu_zoo; npu_zoo.__version__") & {"pydantic", "pluggy", "typer", "rich", "yaml"} == set()


def test_building_the_registry_and_checking_a_request_brings_no_torch() -> None:
    statement = """
import npu_zoo.api, npu_zoo.dispatch
from npu_zoo.core.config import EngineArgs
from npu_zoo.registry import get_registry
assert "deepseek_coder" in get_registry().families
args = EngineArgs(model="deepseek_coder:33b", hardware="atlas_800i_a2", dtype="bfloat16", tensor_parallel_size=2)
assert not npu_zoo.dispatch.check(args).supported
"""
    assert loaded(statement) & HEAVY == set()


def loaded(statement: str) -> set[str]:
    """The modules in a new process after a statement."""
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())
