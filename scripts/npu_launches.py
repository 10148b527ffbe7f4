"""Write docs/npu.md's section of one simulated product: the operator launches of a decode step, each with its reason.

Run it once per product, with the Python that has torch_npu:

    NPU_ZOO_SIMULATE=atlas_800i_a2 .venv-npu/bin/python scripts/npu_launches.py
    NPU_ZOO_SIMULATE=atlas_300i_duo .venv-npu/bin/python scripts/npu_launches.py

A test measures anew and compares, so a launch more or less shows.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import npu_zoo
from npu_zoo.core.config import EngineArgs
from npu_zoo.dispatch import resolve
from npu_zoo.simulator import measure
from npu_zoo.testing.launches import REASONS, decode_launches

PAGE = Path(__file__).parent.parent / "docs" / "npu.md"
FAMILIES = {
    "atlas_800i_a2": ("deepseek_coder", "wizardcoder", "deepseek_moe", "deepseek_v3"),
    "atlas_300i_duo": ("deepseek_coder", "wizardcoder"),
}
PROMPTS = [[5], [6], [7], [8]]


def eager_launches(family: str, product: str) -> dict[str, int]:
    """Launches of one eager decode step of a family's demo with four sequences, by kernel."""
    asked = EngineArgs(
        model=f"{family}:demo", hardware=product, dtype="float16", max_model_len=256, kv_cache_memory="16MiB"
    )
    return decode_launches(resolve(asked), PROMPTS, measure, enforce_eager=True).launches


def section(product: str) -> str:
    """A product's part of the page."""
    lines = [f"## {product}", ""]
    for family in FAMILIES[product]:
        launches = eager_launches(family, product)
        lines += [
            f"### {family}: {sum(launches.values())} launches",
            "",
            "| launches | kernel | for |",
            "|---|---|---|",
        ]
        lines += [f"| {count} | `{name}` | {REASONS[name]} |" for name, count in launches.items()]
        lines.append("")
    return "\n".join(lines)


def committed(product: str) -> str:
    """The same part as it stands in the page; empty where it does not."""
    found = re.search(rf"^## {product}\n.*?(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return found.group().rstrip() + "\n" if found else ""


def main() -> int:
    """Write the part of the product that is simulated."""
    product = os.environ.get("NPU_ZOO_SIMULATE", "")
    if product not in FAMILIES:
        print(f"set NPU_ZOO_SIMULATE to one of {', '.join(FAMILIES)}", file=sys.stderr)
        return 2
    npu_zoo.simulate()
    text, old, new = PAGE.read_text(encoding="utf-8"), committed(product).rstrip(), section(product).rstrip()
    PAGE.write_text(text.replace(old, new) if old else f"{text.rstrip()}\n\n{new}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
