"""Which sizes of a split a model's shape allows, and how its tokens reach experts. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from npu_zoo.core.config import DEFAULT_MAX_NUM_SEQS, EngineArgs, ExpertDispatch
from npu_zoo.core.errors import ConfigError, UnsupportedError
from npu_zoo.core.features import FeatureRow, Reason, Verdict
from npu_zoo.core.hardware import Chip
from npu_zoo.core.model_config import ModelConfig, MoEConfig, padded_vocab_size
from npu_zoo.core.parallel import Split
from npu_zoo.core.quantization import QuantizationConfig
from npu_zoo.request import Request


@dataclass(frozen=True)
class _Shared:
    """Something that ranks share.

    Attributes:
        what: such as ``16 attention heads``.
        fits: whether that many ranks can share it.
    """

    what: str
    fits: Callable[[int], bool]


def require_split(args: EngineArgs, request: Request, row: FeatureRow, config: ModelConfig) -> None:
    """Refuse sizes that the model's shape does not allow.

    Args:
        row: the matrix row that offers the request.
        config: the checkpoint's hyperparameters.

    Raises:
        UnsupportedError: every size that does not fit, with those that do.
    """
    faults = split_faults(args, request, row, config, request.split)
    if faults:
        shown = {axis: value[-1] if isinstance(value, tuple) else value for axis, value in request.axes.items()}
        raise UnsupportedError(Verdict(model=request.asked, request=shown, supported=False, reasons=tuple(faults)))


def split_faults(
    args: EngineArgs, request: Request, row: FeatureRow, config: ModelConfig, split: Split
) -> list[Reason]:
    """Why a model cannot be split in a way; nothing where it can."""
    quantization = request.quantization_config
    return [
        *_tp_faults(request.asked, row, config, quantization, split),
        *_ep_faults(request.asked, config, quantization, split),
        *_limits(args, request.asked, config, split),
    ]


def _tp_faults(
    asked: str, row: FeatureRow, config: ModelConfig, quantization: QuantizationConfig | None, split: Split
) -> Iterator[Reason]:
    shared = [*_shared_by_layers(config, copies=row.replicated_kv_heads), *_grouped_columns(config, quantization)]
    cut = [part.what for part in shared if not part.fits(split.tp)]
    if cut:
        fit = [n for n in range(1, config.num_attention_heads + 1) if all(part.fits(n) for part in shared)]
        yield _does_not_divide("tensor_parallel_size", split.tp, f"{asked}'s {_joined(cut)}", fit)


def _shared_by_layers(config: ModelConfig, *, copies: bool) -> Iterator[_Shared]:
    """What the ranks of one replica share, weights apart that are quantized in groups."""
    yield _divided("attention heads", config.num_attention_heads)
    if config.mla is None:
        yield _kv_heads(config.num_key_value_heads, copies=copies)
    moe, layers = config.moe, range(config.num_hidden_layers)
    if moe is None or not all(moe.has_experts(layer) for layer in layers):
        yield _divided("values of intermediate_size", config.intermediate_size)
    if moe is not None and moe.n_shared_experts:
        yield _divided("values of the shared experts' width", moe.n_shared_experts * moe.moe_intermediate_size)
    yield _divided("rows of the padded vocabulary", padded_vocab_size(config.vocab_size))


def _divided(what: str, size: int) -> _Shared:
    return _Shared(f"{size} {what}", lambda ranks: size % ranks == 0)


def _kv_heads(heads: int, *, copies: bool) -> _Shared:
    what = f"{heads} key-value heads" + ("" if copies else " (its row of the matrix offers no copies of them)")
    return _Shared(what, lambda ranks: heads % ranks == 0 or (copies and ranks % heads == 0))


def _grouped_columns(config: ModelConfig, quantization: QuantizationConfig | None) -> Iterator[_Shared]:
    """Quantized matrices that the ranks of one replica share by columns."""
    if quantization is None:
        return
    value_dim = config.mla.v_head_dim if config.mla else config.head_dim
    columns = {"self_attn.o_proj": config.num_attention_heads * value_dim}
    columns["mlp.down_proj"] = config.intermediate_size
    if config.moe is not None:
        shared = config.moe.n_shared_experts * config.moe.moe_intermediate_size
        columns["mlp.shared_experts.down_proj"] = shared
    for layer, size in columns.items():
        if size and _is_quantized(layer, config, quantization):
            yield _in_groups(layer, size, quantization)


def _in_groups(layer: str, columns: int, quantization: QuantizationConfig) -> _Shared:
    """Columns of which every rank has whole groups, and whole words of codes."""
    group, codes = quantization.group_size or 1, quantization.codes_per_word
    unit = math.lcm(group, codes)
    bound = f" in groups of {group}" if group > 1 else f" in words of {codes} codes" if codes > 1 else ""
    what = f"{columns} columns of {layer}{bound}"
    return _Shared(what, lambda ranks: ranks == 1 or (columns % ranks == 0 and columns // ranks % unit == 0))


def _is_quantized(layer: str, config: ModelConfig, quantization: QuantizationConfig) -> bool:
    """Whether some decoder layer has such a matrix quantized."""
    return any(
        _has(layer, n, config) and not quantization.ignores(f"model.layers.{n}.{layer}")
        for n in range(config.num_hidden_layers)
    )


def _has(layer: str, number: int, config: ModelConfig) -> bool:
    of_experts = config.moe is not None and config.moe.has_experts(number)
    return layer.startswith("self_attn.") or of_experts == ("experts." in layer)


def _ep_faults(
    asked: str, config: ModelConfig, quantization: QuantizationConfig | None, split: Split
) -> Iterator[Reason]:
    moe, axis = config.moe, "expert_parallel_size"
    if moe is None:
        if split.ep > 1:
            text = f"{axis}={split.ep} shares experts out, and {asked} has none; leave --ep out"
            yield Reason(axis=axis, value=split.ep, supported=(1,), message=text)
        return
    experts = _divided("routed experts", moe.n_routed_experts)
    if not experts.fits(split.ep):
        fit = [n for n in range(1, moe.n_routed_experts + 1) if experts.fits(n)]
        yield _does_not_divide(axis, split.ep, f"{asked}'s {experts.what}", fit)
    parts = [*_shared_by_experts(moe, config, quantization)]
    cut = [part.what for part in parts if not part.fits(split.moe_tp)]
    if cut:
        sizes = [n for n in range(1, split.stage_size + 1) if split.stage_size % n == 0 and experts.fits(n)]
        fit = [n for n in sizes if all(part.fits(split.stage_size // n) for part in parts)]
        text = f"{axis}={split.ep} leaves {split.moe_tp} ranks to share an expert (tp x dp / ep), which do not divide"
        message = f"{text} {asked}'s {_joined(cut)}; {_that_do(fit)}"
        yield Reason(axis=axis, value=split.ep, supported=tuple(fit), message=message)


def _shared_by_experts(
    moe: MoEConfig, config: ModelConfig, quantization: QuantizationConfig | None
) -> Iterator[_Shared]:
    yield _divided("values of moe_intermediate_size", moe.moe_intermediate_size)
    if quantization and _is_quantized("mlp.experts.0.down_proj", config, quantization):
        yield _in_groups("mlp.experts.N.down_proj", moe.moe_intermediate_size, quantization)


def _limits(args: EngineArgs, asked: str, config: ModelConfig, split: Split) -> Iterator[Reason]:
    """Sizes that may be any up to a limit."""
    sequences = args.max_num_seqs or DEFAULT_MAX_NUM_SEQS
    if split.pp > config.num_hidden_layers:
        what = f"a stage without a layer: {asked} has {config.num_hidden_layers}"
        yield _beyond("pipeline_parallel_size", split.pp, config.num_hidden_layers, what)
    if split.dp > sequences:
        what = f"a replica without a sequence: max_num_seqs is {sequences}"
        yield _beyond("data_parallel_size", split.dp, sequences, what)


def _beyond(axis: str, value: int, most: int, what: str) -> Reason:
    text = f"{axis}={value} leaves {what}; sizes that do not: 1 to {most}"
    return Reason(axis=axis, value=value, supported=tuple(range(1, most + 1)), message=text)


def _does_not_divide(axis: str, value: int, what: str, fit: list[int]) -> Reason:
    text = f"{axis}={value} does not divide {what}; {_that_do(fit)}"
    return Reason(axis=axis, value=value, supported=tuple(fit), message=text)


def _that_do(fit: list[int]) -> str:
    return f"sizes that do: {', '.join(map(str, fit))}" if fit else "no size of this many ranks does"


def _joined(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def choose_expert_dispatch(asked: str | None, split: Split, config: ModelConfig, chip: Chip) -> ExpertDispatch:
    """How tokens reach experts of other ranks.

    Args:
        asked: ``auto`` or None takes the chip's own way where replicas share the experts and both ways can be taken.

    Raises:
        ConfigError: all_to_all is asked for where it cannot be taken; says which sizes can.
    """
    possible = split.ep > 1 and split.tp % split.moe_tp == 0
    if asked == "all_to_all" and not possible:
        raise ConfigError(_why_not_all_to_all(split, config))
    if asked == "all_to_all" or (asked != "all_gather" and possible and split.dp > 1):
        return "all_to_all" if asked == "all_to_all" else chip.expert_dispatch
    return "all_gather"


def _why_not_all_to_all(split: Split, config: ModelConfig) -> str:
    text = "--expert-dispatch all_to_all sends a token to its experts' ranks alone, and"
    if config.moe is None:
        return f"{text} the model has no experts; leave it out"
    why = (
        "with ep 1 every rank of a stage has a part of every expert"
        if split.ep == 1
        else f"the {split.moe_tp} ranks that share an expert (tp x dp / ep) are more than a replica's {split.tp}"
    )
    sizes = [n for n in range(2, split.stage_size + 1) if split.stage_size % n == 0]
    fit = [n for n in sizes if config.moe.n_routed_experts % n == 0 and split.tp % (split.stage_size // n) == 0]
    way_out = f"take --ep {' or '.join(map(str, fit))}, or" if fit else "take"
    return f"{text} {why}; {way_out} --expert-dispatch all_gather"
