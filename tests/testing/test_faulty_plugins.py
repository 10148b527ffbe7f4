"""Plugins with one fault each: it is found, named with plugin, row and axis, and nothing else is blamed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.slow


class Blame(NamedTuple):
    """What of a claim that fails has to be told, and a part of its text and message."""

    level: str
    row: int
    axis: str
    text: str


RECORD = """
record = EvidenceRecord(
    family="{name}", row="0" * 16, level="simulated", date="2026-01-01", shape={}, versions={}, code="0" * 16
)
"""
TRUTH = """{
    "about": "Half precision alone.",
    "tables": [{"source": "zoo", "lines": [
        {"sizes": ["1b"], "hardware": {"cpu": "tp 1"}, "dtype": {"float16": "yes"}, "attention": {"paged": "yes"}}
    ]}]
}"""
LARGE = "hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, head_dim=128"

FAULTY: dict[str, tuple[str, list[Blame]]] = {
    "sound": ("FAMILY = family({}, {'world_size': (2,), 'dtype': ('float16',)})", []),
    "heavy": ("import torch", [Blame("spec", 0, "import", "imports torch, which makes every command slow")]),
    "indivisible": (
        "FAMILY = family({}, {'world_size': (3,)})",
        [
            Blame(
                "build",
                2,
                "world_size",
                "tensor_parallel_size=3 does not divide indivisible:1b-chat's 4 attention heads",
            )
        ],
    ),
    "moduleless": (
        "KERNELS = [kernel('{name}_kernel', '{name}.nowhere:scale')]",
        [
            Blame("spec", 0, "implementation", "there is no module moduleless.nowhere"),
            Blame("build", 0, "implementation", "No module named 'moduleless.nowhere'"),
        ],
    ),
    "nameless": (
        "KERNELS = [kernel('{name}_kernel', '{name}.model:scale')]",
        [
            Blame("spec", 0, "implementation", "nameless.model has no 'scale'"),
            Blame("build", 0, "implementation", "scale"),
        ],
    ),
    "kernel_thief": (
        "KERNELS = [kernel('reference_rms_norm', '{name}.model:Model')]",
        [Blame("spec", 0, "name", "the name 'reference_rms_norm' is taken by plugin native")],
    ),
    "family_thief": (
        "FAMILY = family(name='wizardcoder')",
        [Blame("spec", 0, "name", "the name 'wizardcoder' is taken by plugin wizardcoder")],
    ),
    "repeating": (
        "FAMILY = family({}, {'note': 'once more'})",
        [Blame("spec", 2, "row", "is registered twice: it is row 1 once more")],
    ),
    "boasting": (
        "FAMILY = family({}, {'dtype': ('float16',), 'evidence': 'measured'})",
        [Blame("spec", 2, "evidence", "says measured and has no record of it")],
    ),
    "claiming": (
        "FAMILY = family({'evidence': 'simulated'}, {'dtype': ('float16',)})",
        [Blame("spec", 1, "evidence", "says simulated and has no record of it")],
    ),
    "rounding": (
        "FAMILY = family({}, {'hardware': ('atlas_300i_duo',), 'dtype': ('bfloat16',)})",
        [Blame("spec", 2, "dtype", "atlas_300i_duo has no bfloat16")],
    ),
    "quantizing": (
        "FAMILY = family({}, {'quantization': ('w3a16',)})",
        [Blame("spec", 2, "quantization", "no plugin registers the quantization method w3a16")],
    ),
    "unsplit": (
        "FAMILY = family({}, {'world_size': (2, 3), 'parallelism': ('tp2',)})",
        [
            Blame("spec", 2, "parallelism", "world_size=3 has none of the layouts tp2"),
            Blame("build", 2, "world_size", "builds on 3 ranks: no layout of the row makes this world size"),
        ],
    ),
    "idle_layout": (
        "FAMILY = family({}, {'world_size': (2,), 'parallelism': ('tp', 'tp8')})",
        [Blame("spec", 2, "parallelism", "parallelism=tp8 makes none of the world sizes 2")],
    ),
    "large": (
        f"LARGE = variant({LARGE})\n"
        "FAMILY = family({}, {'hardware': ('atlas_300i_duo',), 'dtype': ('float16',)}, variants=(LARGE,))",
        [Blame("build", 2, "world_size", "leaves no room for a token in 48 GiB")],
    ),
    "stale": (
        RECORD
        + "from npu_zoo.core.evidence import row_digest\n"
        + "FAMILY = family(records=(record.model_copy(update={'row': row_digest(FAMILY.rows[0])}),))",
        [Blame("spec", 1, "evidence", "stale: it was made with the code 0000000000000000")],
    ),
    "outlived": (
        RECORD + "FAMILY = family(records=(record,))",
        [Blame("spec", 0, "evidence", "no row of outlived has the digest 0000000000000000")],
    ),
    "contradicted": (
        "FAMILY = family(truth='{name}:truth.json')",
        [
            Blame("spec", 0, "row", "dtype: 1b: the matrix offers dtype float32 and the table does not"),
            Blame("spec", 1, "row", "cpu; float16; tp1; paged: is refused, and its truth table offers it"),
        ],
    ),
    "empty_demo": (
        "demo = VariantSpec(name='demo', size='demo', bundled='{name}:demo')\n"
        "FAMILY = family({}, {'sizes': ('demo',)}, variants=(variant(), demo))",
        [Blame("spec", 0, "bundled", "has no config.json")],
    ),
    "twofold": (
        "MORE_FAMILIES = [family({'note': 'first'}, {'note': 'once more'})]",
        [Blame("spec", 0, "name", "the name 'twofold' is registered twice")],
    ),
    "trapped": (  # at the level spec a package is not imported to see whether a module of it is there
        "KERNELS = [kernel('{name}_kernel', '{name}.trap.inside:scale')]",
        [Blame("build", 0, "implementation", "RuntimeError: it was imported")],
    ),
    "unclear": ("FAMILY = None", [Blame("spec", 0, "plugin", "where a list of FamilySpec is due")]),
    "many": (
        "KERNELS = [kernel('{name}_kernel', '{name}.nowhere:scale')]\n"
        "FAMILY = family(\n"
        "    {}, {'note': 'again'}, {'hardware': ('atlas_300i_duo',), 'dtype': ('bfloat16',)},\n"
        "    {'dtype': ('float16',), 'evidence': 'measured'}, {'world_size': (3,)}, {'quantization': ('w3a16',)},\n"
        "    {'attention': ('flash',)},\n"
        ")",
        [
            Blame("spec", 0, "implementation", "there is no module many.nowhere"),
            Blame("build", 0, "implementation", "No module named 'many.nowhere'"),
            Blame("spec", 2, "row", "it is row 1 once more"),
            Blame("spec", 3, "dtype", "atlas_300i_duo has no bfloat16"),
            Blame("spec", 4, "evidence", "says measured"),
            Blame("build", 5, "world_size", "tensor_parallel_size=3 does not divide"),
            Blame("spec", 6, "quantization", "w3a16"),
        ],
    ),
}


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory, install: Callable[..., None], validate: Callable) -> Any:
    """All of them at once, up to the level build."""
    site = tmp_path_factory.mktemp("site")
    for name, (specs, _) in FAULTY.items():
        install(site, name, specs, **{"truth.json": TRUTH})
    (site / "trapped" / "trap").mkdir()
    (site / "trapped" / "trap" / "__init__.py").write_text("raise RuntimeError('it was imported')")
    (site / "trapped" / "trap" / "inside.py").write_text("def scale(x):\n    return x\n")
    ran = validate(site, "--level", "build", *itertools.chain.from_iterable(("--plugin", name) for name in FAULTY))
    assert ran.code == 6, ran.err
    return ran


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_is_found_where_it_is(validation: Any, name: str) -> None:
    due = FAULTY[name][1]
    found = validation.failures_of(name)
    for blame in due:
        claims = [c for c in found if (c["level"], c["row"], c["axis"]) == blame[:3]]
        assert any(blame.text in f"{c['claim']}: {c['message']}" for c in claims), (blame, found)
    assert {(c["level"], c["row"], c["axis"]) for c in found} <= {blame[:3] for blame in due}


UNREGISTERED = ("family_thief", "unclear")
FIRST_ROW_AT_FAULT = ("stale", "contradicted", "claiming")


@pytest.mark.parametrize("name", [n for n in FAULTY if n not in (*UNREGISTERED, *FIRST_ROW_AT_FAULT)])
def test_the_rows_beside_a_fault_are_validated_all_the_same(validation: Any, name: str) -> None:
    first = [c for c in validation.report["claims"] if c["plugin"] == name and c["row"] == 1]
    assert {c["status"] for c in first} == {"holds"}
    assert {c["level"] for c in first} == {"spec", "build"}


def test_several_faults_leave_the_other_rows_their_numbers(validation: Any) -> None:
    held = {c["row"] for c in validation.report["claims"] if c["plugin"] == "many" and c["status"] == "holds"}
    assert {1, 3, 5, 6, 7} <= held
    assert not {2, 4} & held
    flash = next(c for c in validation.report["claims"] if c["plugin"] == "many" and c["row"] == 7)
    assert flash["name"] == "1b on cpu in float32"


def test_what_is_printed_names_each_fault(validation: Any) -> None:
    shown = " ".join(validation.out.split())
    for name, (_, due) in FAULTY.items():
        for blame in due:
            assert f"{name} row {blame.row}" in shown if blame.row else name in shown
            assert f"[{blame.axis}]" in shown
    assert f"{len(validation.failures)} fail" in shown
