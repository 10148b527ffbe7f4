"""Digests and staleness of evidence."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from npu_zoo.core.evidence import EvidenceRecord, code_digest, evidence_level, row_digest
from npu_zoo.core.features import FeatureRow

KERNEL = """
import math


class Norm:
    def forward(self, x, eps=1e-6):
        return x / math.sqrt(x * x + eps)
"""

SAME = {
    "comments": KERNEL.replace("import math", "import math  # for the root\n# nothing else"),
    "formatting": KERNEL.replace("x, eps=1e-6", "\n        x,\n        eps=1e-6,\n    ").replace("x * x", "(x*x)"),
    "docstrings": '"""Norms."""'
    + KERNEL.replace("class Norm:", 'class Norm:\n    """A norm."""').replace(
        "eps=1e-6):", 'eps=1e-6):\n        """Divide by the root."""'
    ),
}
OTHER = {
    "a constant": KERNEL.replace("1e-6", "1e-5"),
    "an operator": KERNEL.replace("x * x + eps", "x * x - eps"),
    "an order": KERNEL.replace("x / math.sqrt(x * x + eps)", "math.sqrt(x * x + eps) / x"),
    "a statement": KERNEL.replace("        return", "        x = x + 1\n        return"),
    "a string that is no docstring": KERNEL.replace("eps=1e-6", 'eps=1e-6, kind="rms"'),
    "an argument made keyword-only": KERNEL.replace("x, eps", "x, *, eps"),
    "a name": KERNEL.replace("Norm", "LayerNorm"),
}


def digest(folder: Path, **sources: str) -> str:
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    return code_digest(folder / f"{name}.py" for name in sources)


@pytest.mark.parametrize("source", SAME.values(), ids=SAME)
def test_what_does_not_run_does_not_age_a_record(tmp_path: Path, source: str) -> None:
    assert source != KERNEL
    assert digest(tmp_path, norm=KERNEL) == digest(tmp_path, norm=source)


@pytest.mark.parametrize("source", OTHER.values(), ids=OTHER)
def test_a_changed_statement_ages_a_record(tmp_path: Path, source: str) -> None:
    assert ast.dump(ast.parse(source)) != ast.dump(ast.parse(KERNEL))
    assert digest(tmp_path, norm=KERNEL) != digest(tmp_path, norm=source)


def test_none_empty_and_absent_are_told_apart(tmp_path: Path) -> None:
    values = ["None", "[]", "[None]", "{}", "()", "f()", "f(None)", "'None'", "f[:]", "0", "False", "''", "b''"]
    sources = [f"x = {value}" for value in values]
    assert len({digest(tmp_path, a=source) for source in sources}) == len(sources)


def test_code_digest_is_the_same_under_every_python(tmp_path: Path) -> None:
    assert digest(tmp_path, norm=KERNEL) == "e025f35bfca59850"


def test_code_digest_depends_on_names_and_not_on_the_order_of_files(tmp_path: Path) -> None:
    one = digest(tmp_path, norm=KERNEL, rope="base = 10000")
    assert digest(tmp_path, rope="base = 10000", norm=KERNEL) == one
    assert digest(tmp_path, norm="base = 10000", rope=KERNEL) != one
    assert digest(tmp_path, norm=KERNEL) != one


def test_code_digest_refuses_what_is_no_python(tmp_path: Path) -> None:
    with pytest.raises(SyntaxError):
        digest(tmp_path, norm="def (")


def row(**changes: Any) -> FeatureRow:
    cell = {"sizes": ("7b",), "hardware": ("atlas_800i_a2",), "dtype": ("float16",), "world_size": (1, 2)}
    return FeatureRow(**{**cell, "attention": ("paged",), "source": "a README", **changes})


def record(**changes: Any) -> EvidenceRecord:
    values = {"family": "f", "row": row_digest(row()), "level": "simulated", "date": "2026-01-31", "code": "now"}
    return EvidenceRecord(**{**values, "shape": {"head_dim": 128}, "versions": {"torch": "2.13.0"}, **changes})


@pytest.mark.parametrize("changes", [{"status": "experimental"}, {"evidence": "measured"}, {"note": "see FAQ"}])
def test_row_digest_ignores_what_is_not_claimed(changes: dict[str, Any]) -> None:
    assert row_digest(row(**changes)) == row_digest(row())


@pytest.mark.parametrize(
    "changes",
    [{"world_size": (1,)}, {"dtype": ("bfloat16",)}, {"serving": ("tgi",)}, {"source": "zoo"}, {"sizes": ("33b",)}],
)
def test_row_digest_covers_the_claim(changes: dict[str, Any]) -> None:
    assert row_digest(row(**changes)) != row_digest(row())


def test_level_is_the_highest_that_today_s_code_has_reached() -> None:
    assert evidence_level(row(), [], "now") == ("claimed", False)
    assert evidence_level(row(), [record()], "now") == ("simulated", False)
    assert evidence_level(row(), [record(), record(level="measured")], "now") == ("measured", False)


def test_a_record_of_older_code_is_stale_and_proves_nothing() -> None:
    old = record(level="measured", code="before")
    assert evidence_level(row(), [old], "now") == ("claimed", True)
    assert evidence_level(row(), [old, record()], "now") == ("simulated", True)


def test_a_record_of_another_row_says_nothing() -> None:
    assert evidence_level(row(world_size=(8,)), [record(level="measured")], "now") == ("claimed", False)


@pytest.mark.parametrize("changes", [{"level": "claimed"}, {"date": "31.1.2026"}, {"shape": {"dims": [1, 2]}}])
def test_a_malformed_record_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        record(**changes)
