"""docs/hooks.md speaks of every hook and of every field, and its examples work."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from npu_zoo.core import hookspecs
from npu_zoo.core.hookspecs import PROJECT
from npu_zoo.registry import _HOOKS, _SPEC_HOOKS, get_registry, load_code
from npu_zoo.testing import isolated_registry
from npu_zoo.testing.validation.spec import code_references

ROOT = Path(__file__).resolve().parents[2]


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "scripts" / "generate_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "scripts"))  # as where it runs, for what lies beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return module


GENERATOR = load_generator()
SPECS = (*GENERATOR.HOOKS_OF_SPECS.values(), *GENERATOR.PARTS_OF_FAMILIES)


def example(hook: str) -> ModuleType:
    """A module that holds the hook's example and nothing else."""
    module = ModuleType(f"example_of_{hook}")
    exec(GENERATOR.docstring_sections(getattr(hookspecs, hook))[1]["Example"], vars(module))
    return module


def test_every_hook_is_on_the_page() -> None:
    page = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    assert tuple(GENERATOR.hooks()) == _HOOKS
    assert GENERATOR.HOOKS_OF_SPECS == _SPEC_HOOKS
    assert [line[4:-1] for line in page.splitlines() if line.startswith("## `")] == list(_HOOKS)


@pytest.mark.parametrize("hook", _HOOKS)
def test_a_hook_has_all_parts(hook: str) -> None:
    about, sections = GENERATOR.docstring_sections(getattr(hookspecs, hook))
    assert about
    assert set(sections) - {"Args"} == {"When", "Process", "Example"}
    assert all(sections.values())
    assert set(GENERATOR._entries(sections.get("Args", ""))) == set(signature(getattr(hookspecs, hook)).parameters)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.__name__)
def test_every_field_has_a_meaning(spec: Any) -> None:
    rows = {name: (kind, default, meaning) for name, kind, default, meaning in GENERATOR.field_rows(spec)}
    assert set(rows) == set(spec.model_fields)
    assert [name for name, parts in rows.items() if not all(parts)] == []
    told = GENERATOR._entries(GENERATOR.docstring_sections(spec)[1].get("Attributes", ""))
    assert set(told) <= set(spec.model_fields)


def test_every_shared_meaning_is_of_use() -> None:
    fields = {
        name for spec in SPECS for name in (*spec.model_fields, *(f"{spec.__name__}.{n}" for n in spec.model_fields))
    }
    assert set(GENERATOR.SHARED_FIELDS) <= fields


@pytest.mark.parametrize("hook", _SPEC_HOOKS)
def test_an_example_registers_specs_whose_code_is_there(hook: str) -> None:
    found = getattr(example(hook), hook)()
    assert found
    assert all(isinstance(spec, _SPEC_HOOKS[hook]) for spec in found)
    for spec in found:
        assert all(load_code(reference) for _, reference in code_references(spec))


@pytest.mark.parametrize("hook", [hook for hook in _SPEC_HOOKS if hook != "register_families"])
def test_an_example_is_what_the_zoo_registers(hook: str) -> None:
    registered = getattr(get_registry(), hook.removeprefix("register_"))
    for spec in getattr(example(hook), hook)():
        assert registered[spec.name] == spec


def test_the_example_of_a_family_can_be_asked_for() -> None:
    with isolated_registry(example("register_families")) as registry:
        family, variant = registry.find("my_family:custom")
    assert variant is not None
    assert family.matrix.of_size("custom")


def test_the_example_of_a_command_runs() -> None:
    module, app = example("register_commands"), typer.Typer()
    hook: Callable[..., None] = module.register_commands
    assert hasattr(hook, f"{PROJECT}_impl")
    hook(app=app)
    ran = CliRunner().invoke(app, [])
    assert (ran.exit_code, ran.output) == (0, "a family of mine\n")
