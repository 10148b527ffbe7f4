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
from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.dispatch import resolve
from npu_zoo.simulator import measure
from npu_zoo.testing.launches import REASONS, decode_launches, drafted_launches, text_launches

PAGE = Path(__file__).parent.parent / "docs" / "npu.md"
FAMILIES = {
    "atlas_800i_a2": ("deepseek_coder", "wizardcoder", "deepseek_moe", "deepseek_v3"),
    "atlas_300i_duo": ("deepseek_coder", "wizardcoder"),
}
PROMPTS = [[5], [6], [7], [8]]
DRAFTS = 3
MTP_DRAFTS = 3
REPEATED = "def add(a, b):\n    return a + b\n\n\n" * 4
WRITTEN = 64


def demo(family: str, product: str) -> EngineConfig:
    """A family's demo on the product."""
    return resolve(
        EngineArgs(
            model=f"{family}:demo", hardware=product, dtype="float16", max_model_len=256, kv_cache_memory="16MiB"
        )
    )


def eager_launches(family: str, product: str) -> dict[str, int]:
    """Launches of one eager decode step of a family's demo with four sequences, by kernel."""
    return decode_launches(demo(family, product), PROMPTS, measure, enforce_eager=True).launches


def drafts_table(product: str) -> list[str]:
    """What drafts save, by family: counted in a step, and over a text with prompt lookup."""
    lines = [
        "### Launches a token, with drafts and without",
        "",
        f"A step in which {len(PROMPTS)} sequences have {DRAFTS} drafts each, and a text of {WRITTEN} tokens after a "
        "prompt that repeats a function four times, with prompt lookup; from graphs, and operator by operator in "
        "brackets.",
        "",
        "| family | a step | with drafts | a token, none right | all right | text: accepted | a token | without |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES[product]:
        columns: list[list[str]] = [[], [], [], [], [], []]
        config = demo(family, product)
        for eager in (False, True):
            plain = decode_launches(config, PROMPTS, measure, enforce_eager=eager).total
            step = drafted_launches(config, PROMPTS, measure, enforce_eager=eager, drafts=DRAFTS).total
            lookup, without = (
                text_launches(config, REPEATED, WRITTEN, measure, enforce_eager=eager, drafts=drafts)
                for drafts in (DRAFTS, 0)
            )
            found = [plain, step, step / len(PROMPTS), step / len(PROMPTS) / (1 + DRAFTS)]
            for column, value in zip(columns, [*found, lookup.per_token, without.per_token], strict=True):
                column.append(f"{value:.3g}")
        accepted = f"{lookup.accepted_tokens} of {lookup.draft_tokens}"
        cells = [f"{graph} ({eager})" for graph, eager in columns]
        lines.append("| " + " | ".join([family, *cells[:4], accepted, *cells[4:]]) + " |")
    return [*lines, ""]


def mtp_table(product: str) -> list[str]:
    """What drafting with the checkpoint's own layer launches, of families whose demo has one."""
    configs = {family: demo(family, product) for family in FAMILIES[product]}
    drafting = {family: config for family, config in configs.items() if config.model_config.num_mtp_layers}
    if not drafting:
        return []
    lines = [
        "### Launches a token, drafting with the layer that predicts further tokens",
        "",
        f"The same text of {WRITTEN} tokens. A step then launches the model, the layer once for each draft, and what "
        "picks tokens out between them; from graphs, and operator by operator in brackets.",
        "",
        "| family | most drafts | accepted | tokens a step | launches a step | a token | for each accepted draft |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, config in drafting.items():
        for drafts in range(MTP_DRAFTS + 1):
            graph, eager = (
                text_launches(config, REPEATED, WRITTEN, measure, enforce_eager=eager, drafts=drafts, method="mtp")
                for eager in (False, True)
            )
            steps, right = graph.tokens - graph.accepted_tokens, graph.accepted_tokens
            cells = [
                family,
                str(drafts),
                f"{right} of {graph.draft_tokens}" if drafts else "",
                f"{graph.tokens / steps:.2f}",
                f"{graph.launches / steps:.3g} ({eager.launches / steps:.3g})",
                f"{graph.per_token:.3g} ({eager.per_token:.3g})",
                f"{graph.launches / right:.3g} ({eager.launches / right:.3g})" if right else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


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
    return "\n".join([*lines, *drafts_table(product), *mtp_table(product)])


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
