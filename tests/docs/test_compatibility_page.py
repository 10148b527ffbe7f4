"""docs/compatibility.md names the public surface, all of it and nothing else."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import npu_zoo
import npu_zoo.api
import npu_zoo.testing
from npu_zoo.nn.decoder import LlamaAttention, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"### {title}\n")[1].split("\n#")[0]


def names(title: str) -> list[str]:
    """What a section writes as code, in tables the second column alone."""
    lines = section(title).splitlines()
    return [name for line in lines for name in re.findall(r"`([\w.]+)`", line)]


def test_the_package_s_names() -> None:
    assert sorted(names("`npu_zoo`")) == sorted(npu_zoo.__all__)


def test_the_names_of_the_api() -> None:
    assert sorted({*names("`npu_zoo.api`")}) == sorted(npu_zoo.api.__all__)


def test_no_name_of_the_api_stands_twice() -> None:
    found = names("`npu_zoo.api`")
    assert [name for name in found if found.count(name) > 1] == []


def test_the_classes_of_nn_exist() -> None:
    found = names("`npu_zoo.nn`")
    assert len(found) > 10
    for name in found:
        module, _, attribute = name.rpartition(".")
        if not module:
            assert hasattr(LlamaForCausalLM, name) or hasattr(LlamaAttention, name), name
        elif name != "npu_zoo.nn.kernels.reference":
            assert hasattr(importlib.import_module(module), attribute), name


def test_the_exceptions_of_the_testing_surface_are_part_of_it() -> None:
    excepted = section("The rest").split("named there but")[1].split(";")[0]
    assert set(re.findall(r"`(\w+)`", excepted)) < set(npu_zoo.testing.__all__)


def test_this_version_is_listed() -> None:
    assert f"### {npu_zoo.__version__}\n" in PAGE.split("## Changes")[1]


def test_a_plugin_of_a_third_party_needs_no_more() -> None:
    sources = [*(ROOT / "examples").rglob("src/**/*.py"), *(ROOT / "npu_zoo/cli/plugin_template").rglob("*.py.tmpl")]
    taken = {name for source in sources for name in imported(source.read_text(encoding="utf-8"))}
    assert len(taken) > 15
    api = {f"npu_zoo.api.{name}" for name in names("`npu_zoo.api`")}
    testing = {f"npu_zoo.testing.{name}" for name in npu_zoo.testing.__all__}
    assert taken - api - testing - {*names("`npu_zoo.nn`")} == set()


def imported(source: str) -> set[str]:
    """The names of npu_zoo that a module imports; of a module that it imports as a whole those that it calls."""
    found = set()
    for module, listed in re.findall(
        r"^from (npu_zoo[\w.]*) import (\([^)]*\)|.*)$", re.sub(r"\$\w+", "x", source), re.M
    ):
        if module.split(".")[0] == "npu_zoo":
            found |= {f"{module}.{name}" for name in re.findall(r"\w+", listed)}
    for whole in [name for name in found if name in ("npu_zoo.nn.decoder", "npu_zoo.nn.mtp")]:
        module = whole.rpartition(".")[2]
        found = found - {whole} | {f"{whole}.{name}" for name in re.findall(rf"\b{module}\.(\w+)", source)}
    return found
