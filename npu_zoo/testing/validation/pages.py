"""A family's matrix in the Markdown files of its plugin's project: whether it is what the plugin registers.

A file holds a matrix between two lines, ``<!-- npu-zoo matrix FAMILY -->`` and ``<!-- /npu-zoo matrix -->``; between
them stands what ``npu-zoo matrix FAMILY --format markdown`` writes.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from npu_zoo.core.specs import FamilySpec
from npu_zoo.matrix_text import markdown, part_of
from npu_zoo.testing.validation.claims import Claim, ClaimFails, Figures, Subject
from npu_zoo.testing.validation.scope import Part

_BLOCK = re.compile(r"<!-- npu-zoo matrix (\S+) -->\n(.*?)<!-- /npu-zoo matrix -->", re.DOTALL)
_LEVELS_UP = 4
"""How far above a plugin's package its project's pyproject.toml is looked for."""


def marked(family: FamilySpec) -> str:
    """A family's matrix between its marks."""
    return f"<!-- npu-zoo matrix {family.name} -->\n{markdown([part_of(family, None)])}<!-- /npu-zoo matrix -->\n"


def claims(part: Part) -> Iterator[Claim]:
    """One claim for each matrix that stands in a file of the plugin's project; none where it has no such files here."""
    root = project_of(part.record.target)
    for file in _pages(root) if root else ():
        text = file.read_text("utf-8", errors="replace")
        for name, block in _BLOCK.findall(text):
            family = next((family for family in part.families if family.name == name), None)
            if family is None and name in part.registry.families:  # another plugin's, or one that is not looked at
                continue
            subject = Subject(part.record.name, name if family else "", axis="docs")
            check = functools.partial(_is_current, family, block) if family else functools.partial(_unknown, name)
            yield Claim("spec", subject, f"{file.relative_to(root or file)} shows the matrix as it is", check)


def project_of(target: str) -> Path | None:
    """The folder with the pyproject.toml of an entry point's code; None where it was installed without one."""
    module = target.partition(":")[0]
    spec = importlib.util.find_spec(module) if module else None
    if spec is None or not spec.origin:
        return None
    above = list(Path(spec.origin).parents)[: _LEVELS_UP + module.count(".")]
    return next((folder for folder in above if (folder / "pyproject.toml").is_file()), None)


def _pages(root: Path) -> list[Path]:
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]


def _unknown(name: str) -> Figures:
    raise ClaimFails(f"the marks name the family '{name}', which no plugin registers")


def _is_current(family: FamilySpec, text: str) -> Figures:
    if text != markdown([part_of(family, None)]):
        raise ClaimFails(
            f"the page differs from the rows; put what `npu-zoo matrix {family.name} --format markdown` writes between "
            "its marks"
        )
    return {}
