"""What runs claim: kernels against references, models against independent ones, and the combinations of each row."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npu_zoo.core.features import FeatureRow
from npu_zoo.core.hardware import PRODUCTS
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.specs import FamilySpec
from npu_zoo.registry import get_registry
from npu_zoo.selection import unavailable
from npu_zoo.testing.shapes import kind_of, kinds_of, shared_kind_of, tiny_config
from npu_zoo.testing.validation.build import allowed_splits
from npu_zoo.testing.validation.cells import Combination, run_alone, run_ranks_of
from npu_zoo.testing.validation.claims import CannotTell, Claim, ClaimFails, Figures, Subject
from npu_zoo.testing.validation.scope import Part

LOGIT_TOLERANCE = 1e-4


def claims(part: Part) -> Iterator[Claim]:
    """The claims of one plugin."""
    for kind, spec in part.specs:
        if kind == "kernel":
            for dtype in spec.dtypes:
                subject = Subject(part.record.name, name=f"kernel {spec.name}", axis="dtype")
                check = functools.partial(_equals_its_reference, spec.name, dtype)
                yield Claim("run", subject, f"computes {spec.operation} in {dtype} as its reference does", check, True)
    for family in part.families:
        for config in _kinds(family):
            subject = Subject(part.record.name, family.name, axis="model", name=describe_kind(config))
            text = f"gives the logits and tokens of transformers' {config.architecture}"
            yield Claim("run", subject, text, functools.partial(_equals_transformers, family.name, config), True)
        for _, row in part.rows(family):
            yield from row_claims(part, family, row)


def row_claims(part: Part, family: FamilySpec, row: FeatureRow) -> Iterator[Claim]:
    """A row's combinations on a CPU: each of one rank, and each split of several.

    The first kind of model that the row speaks of is run in every combination of one rank, the others in as few as have
    each value. Splits are run for each kind that ranks share in a way of its own.
    """
    if "cpu" not in row.hardware:
        return
    subject = part.subject(family, row)
    shared = set()
    for position, config in enumerate(kinds_of(family, row)):
        tiny = tiny_config(config)
        named = Subject(subject.plugin, subject.family, subject.row, "", f"{describe_kind(config)}, {row.describe()}")
        cells = cells_in_turns(row) if position else cells_of_one(row)
        for cell in cells if 1 in row.world_size else ():
            check = functools.partial(run_alone, family.name, row, tiny, cell)
            yield Claim("run", named.on("dtype"), f"runs in {cell.name}", check, True)
        if shared_kind_of(config) in shared:
            continue
        shared.add(shared_kind_of(config))
        for cell in cells_of_ranks(family, row, tiny):
            check = functools.partial(run_ranks_of, family.name, row, tiny, cell)
            yield Claim("run", named.on("world_size"), f"runs in {cell.name}", check, True)
        for size in sizes_not_run(family, row, tiny):
            check = functools.partial(_not_run, size, tiny)
            yield Claim("run", named.on("world_size"), f"runs in a split of {size} ranks", check)


def cells_of_one(row: FeatureRow) -> list[Combination]:
    """Every combination of one rank that a row offers on a CPU."""
    axes = (row.dtype, row.attention, row.quantization, row.kv_cache_dtype, row.serving, row.long_sequence)
    return [Combination("cpu", *values) for values in itertools.product(*axes)]


def cells_in_turns(row: FeatureRow) -> list[Combination]:
    """As few combinations of one rank as have each value of a row: for models of further kinds."""
    axes: list[tuple[Any, ...]] = [row.dtype, row.attention, row.quantization, row.kv_cache_dtype, row.serving]
    axes.append(row.long_sequence)
    turns = [itertools.cycle(axis) for axis in axes]
    return [Combination("cpu", *(next(turn) for turn in turns)) for _ in range(max(map(len, axes)))]


def cells_of_ranks(family: FamilySpec, row: FeatureRow, tiny: ModelConfig) -> list[Combination]:
    """Every split of several ranks; the other axes take turns, so that each of their values meets several ranks."""
    variant = next(variant for variant in family.variants if variant.size in row.sizes)
    splits = [s for size in row.world_size for s in allowed_splits(family, variant, row, tiny, size)[0] if size > 1]
    turns = itertools.cycle(cells_of_one(row))
    return [
        Combination(**{**vars(cell), "split": split}) for split, cell in zip(dict.fromkeys(splits), turns, strict=False)
    ]


def sizes_not_run(family: FamilySpec, row: FeatureRow, tiny: ModelConfig) -> list[int]:
    """World sizes of a row that ranks cannot share a tiny model in."""
    variant = next(variant for variant in family.variants if variant.size in row.sizes)
    return [size for size in row.world_size if size > 1 and not allowed_splits(family, variant, row, tiny, size)[0]]


def _not_run(size: int, tiny: ModelConfig) -> Figures:
    raise CannotTell(
        f"{size} ranks cannot share a tiny model of {tiny.num_attention_heads} heads and {tiny.num_hidden_layers} "
        "layers; level build holds the real shapes against it"
    )


def describe_kind(config: ModelConfig) -> str:
    """What tells a kind of model from the family's others."""
    parts = [config.architecture]
    if config.num_key_value_heads < config.num_attention_heads and not config.mla:
        parts.append("grouped heads" if config.num_key_value_heads > 1 else "one key-value head")
    parts += [] if config.rope_scaling.kind == "none" else [f"rope {config.rope_scaling.kind}"]
    parts += ["tied embeddings"] if config.tie_word_embeddings else []
    if config.moe:
        parts += [config.moe.topk_method, config.moe.scoring_func]
        parts += ["groups of experts"] if config.moe.n_group > 1 else []
        parts += ["normed weights"] if config.moe.norm_topk_prob else []
        parts += ["shared experts"] if config.moe.n_shared_experts else []
    parts += ["queries' latent"] if config.mla and config.mla.q_lora_rank else []
    return ", ".join(parts)


def _kinds(family: FamilySpec) -> list[ModelConfig]:
    found: dict[object, ModelConfig] = {}
    for row in family.rows:
        for config in kinds_of(family, row):
            found.setdefault(kind_of(config), config)
    return list(found.values())


def _equals_its_reference(name: str, dtype: str) -> Figures:
    from npu_zoo.testing.kernels import device_of, largest_error, tolerance

    registry = get_registry()
    spec = registry.kernels[name]
    missing = unavailable(spec)
    if missing or device_of(spec.chip) is None:
        products = [p.name for p in PRODUCTS.values() if p.chip == spec.chip]
        raise CannotTell(missing or f"this machine has no {' or '.join(products) or spec.chip}")
    error = largest_error(spec, dtype, registry)
    if not error <= tolerance(spec, dtype):
        raise ClaimFails(f"results differ by {error:.3g} of their size, and {tolerance(spec, dtype):g} is allowed")
    return {"largest_error": float(f"{error:.3g}")}


def _equals_transformers(family_name: str, config: ModelConfig) -> Figures:
    from npu_zoo.testing.reference import compare_with_reference, transformers_class, transformers_logits
    from npu_zoo.testing.shapes import write_random_model

    try:
        model_class = transformers_class(config.architecture)
    except (ImportError, OSError) as error:  # such as torch_npu's own libraries where CANN is missing
        raise CannotTell(f"transformers cannot be imported here: {error}") from error
    if model_class is None:
        raise CannotTell(
            f"transformers has no class {config.architecture}; hold it against another model in a test: "
            "npu_zoo.testing.assert_matches_reference"
        )
    family = get_registry().families[family_name]
    with tempfile.TemporaryDirectory() as folder:
        weights = write_random_model(Path(folder), family, tiny_config(config))
        worst = compare_with_reference(family, weights, transformers_logits(model_class, weights))
    if isinstance(worst, str):
        raise ClaimFails(worst)
    if not worst <= LOGIT_TOLERANCE:
        raise ClaimFails(f"logits differ by up to {worst:.3g}, and {LOGIT_TOLERANCE:g} is allowed")
    return {"largest_logit_difference": float(f"{worst:.3g}")}
