"""What code and shapes claim: a plugin's code is imported, and its models are built without storage."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from npu_zoo.core.attention import AttentionBackend, LatentAttentionBackend
from npu_zoo.core.engine import Engine
from npu_zoo.core.features import FeatureRow, splits_of
from npu_zoo.core.hardware import DType, chip_of
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Apart, Ranks, Split
from npu_zoo.core.quantization import QuantizationConfig
from npu_zoo.core.specs import FamilySpec, VariantSpec
from npu_zoo.core.weights import WeightLoader
from npu_zoo.fitting import GIB, cache_share, device_memory, plan_request
from npu_zoo.planning import RankPlan
from npu_zoo.registry import get_registry, load_code
from npu_zoo.request import Request
from npu_zoo.selection import is_importable, select_kernels
from npu_zoo.settings import engine_args
from npu_zoo.splitting import split_faults
from npu_zoo.testing.shapes import config_of
from npu_zoo.testing.validation.claims import CannotTell, Claim, ClaimFails, Figures, Subject
from npu_zoo.testing.validation.scope import Part
from npu_zoo.testing.validation.spec import code_references

_INTERFACES: dict[tuple[str, str], tuple[type, ...]] = {
    ("attention backend", "implementation"): (AttentionBackend, LatentAttentionBackend),
    ("engine", "implementation"): (Engine,),
    ("weight format", "loader"): (WeightLoader,),
}


def claims(part: Part) -> Iterator[Claim]:
    """The claims of one plugin."""
    for kind, spec in part.specs:
        for field, reference in code_references(spec):
            subject = Subject(part.record.name, name=f"{kind} {spec.name}", axis=field)
            requires = getattr(spec, "requires", ())
            check = functools.partial(_imports, kind, field, reference, requires)
            yield Claim("build", subject, f"{reference} imports", check, apart=True)
    for family in part.families:
        for variant in _shapes(family, [variant.size for variant in family.variants]):
            subject = Subject(part.record.name, family.name, axis="model", name=variant.name)
            check = functools.partial(builds_whole, family.name, variant.name)
            yield Claim("build", subject, "builds with all of its layers", check, apart=True)
        for _, row in part.rows(family):
            yield from _row_claims(part, family, row)


def _row_claims(part: Part, family: FamilySpec, row: FeatureRow) -> Iterator[Claim]:
    subject = part.subject(family, row)
    for variant in _shapes(family, row.sizes):
        config = config_of(variant, family)
        assert config is not None
        named = Subject(
            subject.plugin, subject.family, subject.row, "world_size", f"{variant.name} of {row.describe()}"
        )
        for size in row.world_size:
            text = f"builds on {size} rank{'s'[: size > 1]}"
            check = functools.partial(builds, family.name, variant.name, row, size)
            yield Claim("build", named, text, check, apart=True)
            for hardware in row.hardware:
                text = f"fits {size} device{'s'[: size > 1]} of {hardware}"
                check = functools.partial(fits, family.name, variant.name, row, size, hardware)
                if chip_of(hardware).device == "npu":
                    yield Claim("build", named, text, check)


def _shapes(family: FamilySpec, sizes: Sequence[str]) -> list[VariantSpec]:
    """The variants of some sizes with hyperparameters, one of those that have the same."""
    found: dict[str, VariantSpec] = {}
    bare = {"eos_token_id": (), "bos_token_id": None, "pad_token_id": None}
    for variant in family.variants:
        config = config_of(variant, family) if variant.size in sizes else None
        if config is not None:
            found.setdefault(config.model_copy(update=bare).model_dump_json(), variant)
    return list(found.values())


def _imports(kind: str, field: str, reference: str, requires: tuple[str, ...]) -> Figures:
    from npu_zoo.nn.model import CausalLM
    from npu_zoo.nn.quantization import WeightMethod

    missing = [module for module in requires if not is_importable(module)]
    if missing:
        raise CannotTell(f"it requires {', '.join(missing)}, which is not installed here")
    code = load_code(reference)
    interfaces = _INTERFACES | {("family", "model"): (CausalLM,), ("quantization method", "method"): (WeightMethod,)}
    due = interfaces.get((kind, field), ())
    if due and not (isinstance(code, type) and issubclass(code, due)):
        names = " or ".join(interface.__name__ for interface in due)
        raise ClaimFails(f"{reference} is no subclass of {names}")
    if not due and not callable(code) and not hasattr(code, "apply"):
        raise ClaimFails(f"{reference} cannot be called")
    return {}


def builds(family_name: str, variant_name: str, row: FeatureRow, world_size: int) -> Figures:
    """Build every stage's first rank under each layout of the row that makes a world size.

    Raises:
        ClaimFails: the shape allows none of the splits, or a model does not build.
    """
    family, variant, config = _find(family_name, variant_name)
    allowed, refused = allowed_splits(family, variant, row, config, world_size)
    if not allowed:
        raise ClaimFails("\n".join(refused) or "no layout of the row makes this world size")
    for split in allowed:
        for scheme in row.quantization:
            for rank in _firsts(split):
                _build(family, _with_few_layers(config, split), row.dtype[0], split, scheme, rank)
    return {"splits": ", ".join(split.describe() for split in allowed)}


def builds_whole(family_name: str, variant_name: str) -> Figures:
    """Build a variant for one rank, with every layer."""
    family, _, config = _find(family_name, variant_name)
    parameters = _build(family, config, "float32", Split(), "none", 0)
    return {"parameters": parameters}


def _with_few_layers(config: ModelConfig, split: Split) -> ModelConfig:
    """Two layers a stage where there are experts, whose thousands of matrices are alike from layer to layer."""
    if config.moe is None:
        return config
    moe = config.moe.model_copy(update={"first_k_dense_replace": min(1, config.moe.first_k_dense_replace)})
    return config.model_copy(update={"num_hidden_layers": 2 * split.pp, "moe": moe})


def allowed_splits(
    family: FamilySpec, variant: VariantSpec, row: FeatureRow, config: ModelConfig, world_size: int
) -> tuple[list[Split], list[str]]:
    """The splits of a world that a row offers and a shape allows, and why it does not allow the others."""
    allowed, refused = [], []
    for split in (split for layout in row.parallelism for split in splits_of(layout, world_size)):
        request = request_of(family, variant, row, config, split)
        faults = split_faults(engine_args({}), request, row, config, split)
        refused += [fault.message for fault in faults]
        allowed += [] if faults else [split]
    return allowed, list(dict.fromkeys(refused))


def _find(family_name: str, variant_name: str) -> tuple[FamilySpec, VariantSpec, ModelConfig]:
    family = get_registry().families[family_name]
    variant = family.variant(variant_name)
    assert variant is not None
    config = config_of(variant, family)
    assert config is not None
    return family, variant, config


def request_of(family: FamilySpec, variant: VariantSpec, row: FeatureRow, config: ModelConfig, split: Split) -> Request:
    """A row's first combination, as a request."""
    stored = stored_as(row.quantization[0])
    return Request(
        asked=f"{family.name}:{variant.name}",
        family=family,
        variant=variant,
        hardware=row.hardware[0],
        dtype=row.dtype[0],
        split=split,
        attention=row.attention[0],
        quantization=row.quantization[0],
        kv_cache_dtype=row.kv_cache_dtype[0],
        serving=row.serving[0],
        long_sequence=row.long_sequence[0],
        config=config,
        quantization_config=stored,
        weight_bits=stored.weight_bits if stored else None,
    )


def stored_as(scheme: str) -> QuantizationConfig | None:
    """How a registered scheme stores weights, with a scale per output channel; None for ``none``."""
    method = get_registry().quantization_methods.get(scheme)
    if method is None:
        return None
    return QuantizationConfig(weight_bits=method.weight_bits, activation_bits=method.activation_bits, scheme=scheme)


def _firsts(split: Split) -> list[int]:
    """The first rank of each stage; the others of a stage have the same shapes."""
    return [stage * split.stage_size for stage in range(split.pp)]


def _build(family: FamilySpec, config: ModelConfig, dtype: DType, split: Split, scheme: str, rank: int) -> int:
    """Parameters of a rank's share, built on the meta device."""
    import torch

    from npu_zoo.nn.context import BuildContext
    from npu_zoo.nn.kernels.table import bind_kernels
    from npu_zoo.nn.model import build_on_meta
    from npu_zoo.nn.quantization import bind_quantization

    registry = get_registry()
    kernels = bind_kernels(select_kernels(registry.kernels, "cpu", dtype, config, scheme, family.operations))
    stored = stored_as(scheme)
    method = registry.quantization_methods[scheme].method if stored else ""
    experts = config.moe is not None
    quantization = bind_quantization(stored, method, kernels, has_experts=experts) if stored else None
    place = split.place(rank)
    ranks = Ranks(place, tp=Apart(place.tp_rank, split.tp))
    context = BuildContext(kernels, getattr(torch, dtype), config.max_position_embeddings, quantization, ranks)
    model = build_on_meta(load_code(family.model), config, context)
    return sum(tensor.numel() for tensor in model.checkpoint_tensors().values())


def fits(family_name: str, variant_name: str, row: FeatureRow, world_size: int, hardware: str) -> Figures:
    """Plan the memory of each rank under the row's first split that the shape allows.

    Raises:
        ClaimFails: weights and activations leave no room for a token on the hardware's largest device.
    """
    family, variant, config = _find(family_name, variant_name)
    allowed, _ = allowed_splits(family, variant, row, config, world_size)
    memory = max(device_memory(hardware), default=0)
    if not allowed or not memory:
        raise CannotTell(f"nothing is known of {hardware}'s memory" if allowed else "no split of the row is allowed")
    figures: dict[str, float | str] = {}
    for scheme in row.quantization:
        one = row.model_copy(update={"hardware": (hardware,), "quantization": (scheme,)})
        plans = [_plan(request_of(family, variant, one, config, split), config, split) for split in allowed]
        tokens = max(plan.cache_tokens(memory, cache_share(_SMALL, hardware)) for plan in plans)
        weights = min(plan.weights for plan in plans) / GIB
        if not tokens:
            stored = row.dtype[0] if scheme == "none" else f"{row.dtype[0]} and {scheme}"
            raise ClaimFails(
                f"{variant.name} in {stored} has {weights:.1f} GiB of weights a device, which leaves no room for a "
                f"token in {memory / GIB:.0f} GiB"
            )
        named = "" if scheme == "none" else f"{scheme}_"
        figures |= {f"{named}weights_gib": round(weights, 2), f"{named}cache_tokens": tokens}
    return figures


_SMALL = engine_args({"max_model_len": 1, "max_num_batched_tokens": 256, "max_num_seqs": 1})
"""A step that takes as little memory as a useful one can."""


def _plan(request: Request, config: ModelConfig, split: Split) -> RankPlan:
    return plan_request(_SMALL, request, config, split)
