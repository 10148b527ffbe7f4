"""Throw-away plugins: modules with a dist-info, as pip leaves them behind, and `npu-zoo validate` of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SPECS = """
from npu_zoo.api import EvidenceRecord, FamilySpec, FeatureRow, KernelSpec, ModelConfig, VariantSpec, hookimpl

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, vocab_size=320, max_position_embeddings=512, eos_token_id=(2,),
)
ROW = dict(
    sizes=("1b",), hardware=("cpu",), dtype=("float32",), world_size=(1,), attention=("paged",), source="zoo",
)


def variant(**changes):
    config = CONFIG.model_copy(update=changes)
    return VariantSpec(name="1b-chat", size="1b", aliases=("1b",), config=config)


def family(*rows, **changes):
    given = dict(
        name="{name}", title="A family of a third party", architectures=("LlamaForCausalLM",),
        model="{name}.model:Model", variants=(variant(),), default_variant="1b",
        rows=tuple(FeatureRow(**{**ROW, **row}) for row in rows or ({},)),
    )
    return FamilySpec(**{**given, **changes})


def kernel(name, implementation, **changes):
    given = dict(operation="{name}_scale", chip="any", dtypes=("float32", "float16"), priority=0)
    return KernelSpec(name=name, implementation=implementation, **{**given, **changes})


FAMILY, MORE_FAMILIES, KERNELS = family(), [], []
{specs}


@hookimpl
def register_families():
    return [FAMILY, *MORE_FAMILIES]


@hookimpl
def register_kernels():
    return KERNELS
"""

MODEL = '''
from npu_zoo.nn.decoder import LlamaForCausalLM


class Model(LlamaForCausalLM):
    """A Llama."""
'''


class Validation(NamedTuple):
    code: int
    out: str
    err: str
    report: dict[str, Any]

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [claim for claim in self.report["claims"] if claim["status"] == "fails"]

    def failures_of(self, plugin: str) -> list[dict[str, Any]]:
        return [claim for claim in self.failures if claim["plugin"] == plugin]


Install = Callable[..., None]
Validate = Callable[..., Validation]


@pytest.fixture(scope="session")
def install() -> Install:
    """Puts a plugin of a name and a sound family of this name into a folder; ``specs`` changes what it registers."""

    def write(site: Path, name: str, specs: str = "", model: str = MODEL, **files: str) -> None:
        (site / name).mkdir()
        sources = {"__init__.py": SPECS.replace("{specs}", specs), "model.py": model, **files}
        for file, source in sources.items():
            (site / name / file).write_text(source.replace("{name}", name))
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[npu_zoo]\n{name} = {name}\n")

    return write


def environment_of(site: Path, changes: Mapping[str, str] | None = None) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("NPU_ZOO_")}
    paths = os.pathsep.join([str(site), str(Path(__file__).resolve().parents[2])])
    return {**own, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(changes or {})}


@pytest.fixture(scope="session")
def site_environment() -> Callable[..., dict[str, str]]:
    """The environment of a process in which the plugins of a folder are installed."""
    return environment_of


@pytest.fixture(scope="session")
def validate() -> Validate:
    """Runs `npu-zoo validate` as a process in which the plugins of a folder are installed."""

    def run(site: Path, *arguments: str, **variables: str) -> Validation:
        report = site / "report.json"
        command = [sys.executable, "-m", "npu_zoo", "validate", *arguments, "--jobs", "2", "--json", str(report)]
        ran = subprocess.run(
            command, env=environment_of(site, variables), capture_output=True, text=True, timeout=250, cwd=site
        )
        found = json.loads(report.read_text("utf-8")) if report.exists() else {}
        return Validation(ran.returncode, ran.stdout, ran.stderr, found)

    return run
