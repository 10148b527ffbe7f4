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

from npu_zoo import LLM, SamplingParams
from npu_zoo.simulator import measure

PAGE = Path(__file__).parent.parent / "docs" / "npu.md"
FAMILIES = {
    "atlas_800i_a2": ("deepseek_coder", "wizardcoder", "deepseek_moe", "deepseek_v3"),
    "atlas_300i_duo": ("deepseek_coder", "wizardcoder"),
}
STEPS = 8
PROMPTS = ["x", "y", "z", "w"]

REASONS = {
    "aclnnAdd": "routed and shared experts added up",
    "aclnnAddRmsNorm": "a norm with the addition to the residual stream",
    "aclnnApplyRotaryPosEmbV2": "queries and keys turned by position",
    "aclnnArgMax": "the choice of the token",
    "aclnnEmbedding": "the tokens' rows of the embedding",
    "aclnnFusedInferAttentionScoreV3": "attention over the paged cache",
    "aclnnFusedInferAttentionScoreV4": "attention over the latents in the cache",
    "aclnnGroupedMatmulV5": "query, key and value projections, each contiguous; or a product with all experts",
    "aclnnIndex": "the last token's hidden state of each row",
    "aclnnIndexSelect": "cosines and sines of the positions",
    "aclnnInplaceCopy": "slices made contiguous, or router inputs in float32",
    "aclnnInterleaveRope": "rotary parts of queries turned by position",
    "aclnnKvRmsNormRopeCache": "latents normed, their keys turned, both written into the cache",
    "aclnnMatmul": "a product with a weight",
    "aclnnMatmulWeightNz": "a product with a weight in FRACTAL_NZ",
    "aclnnMoeGatingTopK": "the choice of experts",
    "aclnnMoeInitRoutingV3": "rows sorted by expert",
    "aclnnMoeTokenUnpermute": "each token's rows added up by weight",
    "aclnnRmsNorm": "a norm without residual: the first of all, and of latents",
    "aclnnScatterPaKvCache": "keys and values written into the cache",
    "aclnnSwiGlu": "the activation of a feed-forward",
    "aclnnTransposeBatchMatMul": "queries absorbed, attended latents projected, by head",
    "atb:PagedAttention": "attention over the paged cache",
    "atb:ReshapeAndCache": "keys and values written into the cache",
}
"""Why a kernel is launched; one without a reason here fails the script."""


def decode_launches(family: str, product: str) -> dict[str, int]:
    """Launches of one eager decode step of a family's demo with four sequences, by kernel."""
    shared = {"max_model_len": 256, "kv_cache_memory": "16MiB", "enforce_eager": True}
    llm = LLM(model=f"{family}:demo", hardware=product, dtype="float16", **shared)
    found = []
    for tokens in (2, 2 + STEPS):
        with measure() as report:
            llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
        found.append(report.launches)
    llm.shutdown()
    few, many = found
    return {name: (count - few.get(name, 0)) // STEPS for name, count in many.items() if count > few.get(name, 0)}


def section(product: str) -> str:
    """A product's part of the page."""
    lines = [f"## {product}", ""]
    for family in FAMILIES[product]:
        launches = decode_launches(family, product)
        lines += [
            f"### {family}: {sum(launches.values())} launches",
            "",
            "| launches | kernel | for |",
            "|---|---|---|",
        ]
        ordered = sorted(launches.items(), key=lambda entry: (-entry[1], entry[0]))
        lines += [f"| {count} | `{name}` | {REASONS[name]} |" for name, count in ordered]
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
    text, old, new = PAGE.read_text(encoding="utf-8"), committed(product).rstrip(), section(product).rstrip()
    PAGE.write_text(text.replace(old, new) if old else f"{text.rstrip()}\n\n{new}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
