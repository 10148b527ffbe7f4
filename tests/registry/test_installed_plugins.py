"""Plugins of really installed distributions, listed by a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.registry import PLUGINS_VARIABLE, find_candidates

LIST_PLUGINS = """
import json, sys
from dataclasses import asdict
from npu_zoo.registry import get_registry
registry = get_registry()
heavy = sorted({"torch", "transformers", "torch_npu"} & set(sys.modules))
json.dump({"plugins": [asdict(r) for r in registry.plugins.values()], "families": list(registry.families),
           "heavy": heavy}, sys.stdout)
"""

PLUGIN = """
from npu_zoo.api import FamilySpec, FeatureRow, VariantSpec, hookimpl


@hookimpl
def register_families() -> list[FamilySpec]:
    row = FeatureRow(
        sizes=("1b",), hardware=("cpu",), dtype=("float32",), world_size=(1,), attention=("paged",), source="zoo"
    )
    return [
        FamilySpec(
            name="{family}",
            title="A family of a third party",
            architectures=("LlamaForCausalLM",),
            model="{family}_plugin.model:Model",
            variants=(VariantSpec(name="1b-chat", size="1b", aliases=("1b",)),),
            default_variant="1b",
            rows=(row,),
        )
    ]
"""


def install(site: Path, family: str, source: str = PLUGIN, entry: str = "") -> None:
    """What pip leaves behind for a distribution with one module and one entry point."""
    (site / f"{family}_plugin.py").write_text(source.replace("{family}", family))
    info = site / f"{family}_dist-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {family}-dist\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[npu_zoo]\n{entry or family} = {family}_plugin\n")


def list_plugins(site: Path, selection: str | None = None) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    if selection is not None:
        environment[PLUGINS_VARIABLE] = selection
    command = [sys.executable, "-W", "error", "-c", LIST_PLUGINS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    answer["plugins"] = {record["name"]: record for record in answer["plugins"]}
    return answer


@pytest.fixture
def site(tmp_path: Path) -> Path:
    install(tmp_path, "alpha")
    install(tmp_path, "beta")
    install(tmp_path, "gamma", source="raise SystemExit('gamma is not licensed here')")
    return tmp_path


def test_installed_plugins_are_found_loaded_and_listed_without_torch(site: Path) -> None:
    listed = list_plugins(site)
    assert listed["plugins"]["alpha"] == {
        "name": "alpha",
        "target": "alpha_plugin",
        "distribution": "alpha-dist 1.2",
        "builtin": False,
        "error": None,
        "faults": [],
        "registered": {"register_families": ["alpha"]},
        "imports_torch": False,
    }
    assert {"deepseek_coder", "alpha", "beta"} <= set(listed["families"])
    assert listed["plugins"]["gamma"]["error"] == "SystemExit: gamma is not licensed here"
    assert listed["heavy"] == []


def test_a_third_party_cannot_take_a_built_in_plugin_s_name(tmp_path: Path) -> None:
    install(tmp_path, "alpha", entry="native")
    listed = list_plugins(tmp_path)
    assert listed["plugins"]["native"]["error"] is None
    assert "is taken by npu-zoo" in listed["plugins"]["native (alpha-dist 1.2)"]["error"]
    assert "alpha" not in listed["families"]


def test_the_environment_selects(site: Path) -> None:
    listed = list_plugins(site, "beta, delta")
    third_parties = {name for name, record in listed["plugins"].items() if not record["builtin"]}
    assert third_parties == {"beta", "delta"}
    assert listed["plugins"]["beta"]["error"] is None
    known = "NPU_ZOO_PLUGINS names 'delta', which is not installed; installed: alpha, beta, deepseek_coder"
    assert known in listed["plugins"]["delta"]["error"]
    assert {"beta", "deepseek_coder"} <= set(listed["families"])


def names(selection: str | None) -> list[str]:
    return [candidate.name for candidate in find_candidates(selection)]


@pytest.mark.parametrize(
    ("selection", "third_parties"),
    [
        (None, ["alpha", "beta", "gamma"]),
        ("", []),
        (" , ", []),
        ("beta", ["beta"]),
        ("gamma,alpha", ["alpha", "gamma"]),
        ("native", []),
        ("unknown", ["unknown"]),
    ],
)
def test_built_in_plugins_come_first_and_always(
    site: Path, monkeypatch: pytest.MonkeyPatch, selection: str | None, third_parties: list[str]
) -> None:
    monkeypatch.setenv(PLUGINS_VARIABLE, "what the process has, which find_candidates does not read")
    builtin = [candidate.name for candidate in find_candidates("") if candidate.builtin]
    monkeypatch.syspath_prepend(site)
    assert {"native", "deepseek_coder"} <= set(builtin)
    assert [name for name in names(selection) if name in {"alpha", "beta", "gamma", "unknown"}] == third_parties
    assert names(selection)[: len(builtin)] == builtin


def test_finding_plugins_imports_none_of_them(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(site)
    assert "alpha" in names(None)
    assert "alpha_plugin" not in sys.modules


CHATTY = """
import typer
from npu_zoo.api import hookimpl

print("hello from the import")

@hookimpl
def register_kernels():
    print("hello from a hook")
    return []

@hookimpl
def register_commands(app: typer.Typer) -> None:
    print("hello from register_commands")
    app.command("extra")(lambda: None)
"""


def test_what_a_plugin_prints_and_imports_is_remarked_upon_and_does_not_mix_with_json(tmp_path: Path) -> None:
    install(tmp_path, "chatty", CHATTY)
    install(tmp_path, "heavy", "import torch")
    (tmp_path / "torch.py").write_text("")
    ran = subprocess.run(
        [sys.executable, "-m", "npu_zoo", "plugins", "--json"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    records = {record["name"]: record for record in json.loads(ran.stdout)}
    assert records["chatty"]["registered"] == {"commands": ["extra"]}
    assert records["chatty"]["remarks"] == []
    assert records["heavy"]["state"] == "loaded"
    assert records["heavy"]["remarks"] == [
        "registers nothing",
        "imports torch at load time: every command gets slower",
    ]
    assert ran.stderr.splitlines() == [f"hello from {place}" for place in ("the import", "a hook", "register_commands")]
