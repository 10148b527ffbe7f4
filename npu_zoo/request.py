"""What a request asks for on every axis of the matrix, with what it leaves open filled in. Nothing here imports torch.

The family's owner, the checkpoint's config.json and the rows that are left decide what is unset.
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_zoo.checkpoint import read_config, read_generation_config, read_quantization
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import HardwareError, UsageError, WeightsError
from npu_zoo.core.features import Attention, AxisValue, FeatureRow, layout_names, splits_of
from npu_zoo.core.hardware import DTYPE_ALIASES, DTYPES, PRODUCTS, DType
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.core.quantization import CONFIG_KEY, QuantizationConfig
from npu_zoo.core.specs import FamilySpec, QuantizationSpec, VariantSpec
from npu_zoo.platforms.detection import detect_products
from npu_zoo.registry import Registry

_SERVED_AS = {"openai": "offline"}
"""The zoo's own server runs what runs offline, so the matrix has no cells for it."""


@dataclass(frozen=True)
class Request:
    """A request with every axis filled in.

    Attributes:
        asked: the model as it was named, for messages.
        split: how ranks share the model.
        config: the checkpoint's hyperparameters, or else the variant's where it states them.
        quantization_config: how the checkpoint is quantized; None where it is plain, or quantized in a way that is not
            read, and where there is no checkpoint.
        weight_bits: of a code of a quantized weight; None where weights are plain, and where nobody says it.
    """

    asked: str
    family: FamilySpec
    variant: VariantSpec
    hardware: str
    dtype: DType
    split: Split
    attention: Attention
    quantization: str
    kv_cache_dtype: str
    serving: str
    long_sequence: bool
    config: ModelConfig | None
    quantization_config: QuantizationConfig | None = None
    weight_bits: int | None = None

    @property
    def model(self) -> str:
        """``family:variant``."""
        return f"{self.family.name}:{self.variant.name}"

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.split.world_size

    @property
    def axes(self) -> dict[str, AxisValue | tuple[AxisValue, ...]]:
        """A value for every axis of the matrix."""
        return {
            "hardware": self.hardware,
            "dtype": self.dtype,
            "parallelism": layout_names(self.split),
            "world_size": self.world_size,
            "attention": self.attention,
            "quantization": self.quantization,
            "kv_cache_dtype": self.kv_cache_dtype,
            "long_sequence": self.long_sequence,
            "serving": _SERVED_AS.get(self.serving, self.serving),
        }


def read_request(args: EngineArgs, registry: Registry) -> Request:
    """Fill in what is unset.

    Raises:
        UsageError: the request is malformed or names an unknown model.
        WeightsError: ``weights`` were given and their config.json cannot be read.
        HardwareError: no hardware is named, and the machine's cannot be told.
        PluginError: the plugin that reads the checkpoint's quantization is broken.
    """
    family, variant, config = _identify(args, registry)
    return _fill_in(args, family, variant, config, registry.quantization_methods)


def _identify(args: EngineArgs, registry: Registry) -> tuple[FamilySpec, VariantSpec, ModelConfig | None]:
    """The family and variant, and the checkpoint's hyperparameters where weights are given or bundled."""
    if not args.model:
        names = ", ".join(sorted(registry.families)) or "none is registered"
        raise UsageError(f"no model was named; use --model FAMILY or FAMILY:VARIANT. Families: {names}")
    family, variant = registry.find(args.model)
    if args.weights is None:
        variant = variant or family.variant(family.default_variant)
        assert variant is not None  # FamilySpec checks default_variant
        bundled = bundled_directory(variant)
        return family, variant, read_model_config(bundled, family) if bundled else variant.config
    config = read_model_config(Path(args.weights), family)
    return family, variant or _variant_of(family, config), config


def _variant_of(family: FamilySpec, config: ModelConfig) -> VariantSpec:
    """The variant that has exactly a checkpoint's hyperparameters and end-of-text ids, or else ``custom``.

    Of several the one that the bare size means is taken.
    """
    matching = [
        variant
        for variant in family.variants
        if variant.config
        and variant.config.architecture == config.architecture
        and not variant.config.differences(config)
        and variant.config.eos_token_id == config.eos_token_id
    ]
    if matching:
        return next((variant for variant in matching if variant.size in variant.aliases), matching[0])
    custom = family.variant("custom")
    if custom is None:
        names = ", ".join(v.name for v in family.variants)
        raise UsageError(f"the checkpoint matches no variant of {family.name}; name one: {names}")
    return custom


def read_model_config(directory: Path, family: FamilySpec) -> ModelConfig:
    """A checkpoint's hyperparameters, with the family's defaults and every id that ends a text.

    Raises:
        WeightsError: config.json or generation_config.json cannot be read.
    """
    raw = read_config(directory)
    names = raw.get("architectures") or [""]
    defaults = family.config_defaults.get(names[0] if isinstance(names, list) else "", {})
    config = ModelConfig.from_hf(raw, defaults)
    found: Any = read_generation_config(directory).get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(i, int) for i in ids):
        raise WeightsError(f"{directory}/generation_config.json holds eos_token_id {found!r}; ids are whole numbers")
    return config.model_copy(update={"eos_token_id": tuple(dict.fromkeys((*config.eos_token_id, *ids)))})


def bundled_directory(variant: VariantSpec) -> Path | None:
    """Where the checkpoint lies that ships with a variant; None where none does."""
    if not variant.bundled:
        return None
    package, _, folder = variant.bundled.partition(":")
    return Path(str(importlib.resources.files(package) / folder))


def _fill_in(
    args: EngineArgs,
    family: FamilySpec,
    variant: VariantSpec,
    config: ModelConfig | None,
    methods: Mapping[str, QuantizationSpec],
) -> Request:
    hardware = args.hardware or _detected(family, variant)
    if hardware not in PRODUCTS:
        raise UsageError(f"unknown hardware '{hardware}'; known: {', '.join(PRODUCTS)}")
    rows = _rows_on(family, variant.size, hardware, experimental=bool(args.allow_experimental))
    dtype = _dtype(args.dtype, rows, config)
    rows = [row for row in rows if dtype in row.dtype] or rows
    stored = _stored_quantization(config, methods)
    quantization = args.quantization or (stored.scheme if stored else "none")
    offered = [kind for row in rows for kind in row.attention]
    too_long = bool(config and args.max_model_len and args.max_model_len > config.context_length)
    model = args.model or family.name
    return Request(
        asked=model if ":" in model else f"{family.name}:{variant.name}",
        family=family,
        variant=variant,
        hardware=hardware,
        dtype=dtype,
        split=_asked_split(args) or _usual_split(args.world_size, rows, quantization),
        attention=args.attention or ("paged" if "paged" in offered or not offered else offered[0]),
        quantization=quantization,
        kv_cache_dtype=args.kv_cache_dtype or "auto",
        serving=args.serving or "offline",
        long_sequence=too_long,
        config=config,
        quantization_config=stored,
        weight_bits=_weight_bits(quantization, stored, methods),
    )


def _stored_quantization(
    config: ModelConfig | None, methods: Mapping[str, QuantizationSpec]
) -> QuantizationConfig | None:
    raw = config.extra.get(CONFIG_KEY) if config else None
    try:
        return read_quantization(raw, methods) if raw else None
    except ValueError:  # dispatch refuses it with the reason, once the matrix has been asked
        return None


def _weight_bits(
    quantization: str, stored: QuantizationConfig | None, methods: Mapping[str, QuantizationSpec]
) -> int | None:
    if stored and stored.scheme == quantization:
        return stored.weight_bits
    return methods[quantization].weight_bits if quantization in methods else None


def _detected(family: FamilySpec, variant: VariantSpec) -> str:
    """The machine's product. Of several that it can be the first is taken where the matrix says the same of all.

    Raises:
        HardwareError: the matrix says different things of them, or the machine's devices are unknown.
    """
    products = detect_products()
    answers = {product: _answer(family, variant.size, product) for product in products}
    if any(answer != answers[products[0]] for answer in answers.values()):
        raise HardwareError(
            f"this machine's devices are those of {' and '.join(products)}, for which the matrix has different rows "
            f"of {family.name}:{variant.name}; name it: --hardware {'|'.join(products)} (or --hardware cpu)"
        )
    return products[0]


def _answer(family: FamilySpec, size: str, product: str) -> list[str]:
    """What the matrix says of a product, without what differs between rows that say the same."""
    silent = {"hardware", "source", "evidence"}
    rows = (row for row in family.matrix.of_size(size) if product in row.hardware)
    return sorted(row.model_dump_json(exclude=silent) for row in rows)


def _rows_on(family: FamilySpec, size: str, hardware: str, *, experimental: bool) -> list[FeatureRow]:
    """What defaults are taken from: the rows that the request may use, or else the experimental ones."""
    allowed = [r for r in family.matrix.of_size(size, experimental=experimental) if hardware in r.hardware]
    return allowed or [row for row in family.matrix.of_size(size) if hardware in row.hardware]


def parse_dtype(text: str) -> DType:
    """A dtype from its name or a short spelling (``bf16``, ``fp16``, ``fp32``).

    Raises:
        UsageError: it is neither.
    """
    name = DTYPE_ALIASES.get(text.lower(), text.lower())
    if name not in DTYPES:
        raise UsageError(f"unknown dtype '{text}'; known: {', '.join(DTYPES)} ({', '.join(DTYPE_ALIASES)})")
    return name


def _dtype(asked: str | None, rows: list[FeatureRow], config: ModelConfig | None) -> DType:
    """The asked dtype, or the first that is offered of: the checkpoint's own, bfloat16, float16, float32."""
    if asked is not None:
        return parse_dtype(asked)
    offered = {dtype for row in rows for dtype in row.dtype}
    preferred: list[DType] = [config.torch_dtype] if config and config.torch_dtype else []
    preferred += ["bfloat16", "float16", "float32"]
    return next((dtype for dtype in preferred if dtype in offered), preferred[0])


def _asked_split(args: EngineArgs) -> Split | None:
    """The split of a request that names a parallel size; the smallest that has it where it names no world."""
    tp, pp, ep = args.tensor_parallel_size, args.pipeline_parallel_size, args.expert_parallel_size
    dp, world = args.data_parallel_size, args.world_size
    if (tp, pp, ep, dp) == (None, None, None, None):
        return None
    pp, ep, dp = pp or 1, ep or 1, dp or 1
    if tp is None:
        tp = math.lcm(dp, ep) // dp if world is None else world // (pp * dp)
    split = Split(tp, pp, ep, dp)
    world = split.world_size if world is None else world
    if split.world_size != world:
        _refuse_product(args, world, pp, dp)
    if split.stage_size % ep:
        fit = ", ".join(str(n) for n in range(1, split.stage_size + 1) if split.stage_size % n == 0)
        raise UsageError(
            f"the {split.stage_size} ranks of a stage (tp {tp} x dp {dp}) do not divide into expert parallel groups "
            f"of {ep}; sizes that do: {fit}"
        )
    return split


def _refuse_product(args: EngineArgs, world: int, pp: int, dp: int) -> None:
    replicas, sizes = (f" x dp {dp}", "--tp, --pp and --dp") if dp > 1 else ("", "--tp and --pp")
    raise UsageError(
        f"world size {world} is not tp {args.tensor_parallel_size or '?'} x pp {pp}{replicas}; "
        f"give --world-size alone, or {sizes} that multiply to it"
    )


def _usual_split(world: int | None, rows: list[FeatureRow], quantization: str) -> Split:
    """Of a request that names no parallel size: of the smallest world that the rows offer, unless one is named."""
    wanted = [row for row in rows if quantization in row.quantization] or rows
    world = world or min((size for row in wanted for size in row.world_size), default=1)
    return _offered_split(world, wanted) or _offered_split(world, rows) or Split(world)


def _offered_split(world: int, rows: list[FeatureRow]) -> Split | None:
    """The split of a world of which nothing more is said: tensor parallel, or else what its rows offer first."""
    layouts = [layout for row in rows if world in row.world_size for layout in row.parallelism]
    splits = [split for layout in layouts for split in splits_of(layout, world)]
    return Split(world) if Split(world) in splits else next(iter(splits), None)
