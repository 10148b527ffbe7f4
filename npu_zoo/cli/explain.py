"""``explain``: what would run and why, found without loading weights or importing torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, cast

import typer

from npu_zoo.cli.launches import launches_data, print_launches, simulate_launches
from npu_zoo.cli.matrix import request_fields, row_fields
from npu_zoo.cli.options import JsonFlag, request_options
from npu_zoo.cli.output import note, print_fields, print_json, print_table
from npu_zoo.core.config import AttentionChoice, EngineArgs, EngineConfig, KernelChoice
from npu_zoo.core.errors import HardwareError, NpuZooError, PluginError, UnsupportedError, WeightsError
from npu_zoo.core.features import Attention, FeatureRow, Verdict
from npu_zoo.core.hardware import DType, chip_of
from npu_zoo.core.parallel import stage_layers
from npu_zoo.dispatch import check, resolve
from npu_zoo.registry import get_registry
from npu_zoo.request import read_request
from npu_zoo.selection import select_attention, select_kernels
from npu_zoo.settings import Settings

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What is known of a request; ``config`` is None where something beyond the matrix stands in its way."""

    verdict: Verdict
    row: FeatureRow
    config: EngineConfig | None
    obstacle: NpuZooError | None
    attention: AttentionChoice | str
    kernels: tuple[KernelChoice, ...] | str

    @property
    def weights_missing(self) -> bool:
        """Whether all that is missing is a weights directory."""
        return isinstance(self.obstacle, WeightsError)


@request_options(engine=True)
def explain(
    settings: Settings,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Count what a decode step launches, on the simulated NPU.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Explain what a request would run, and why.

    Shows the engine, the attention backend, a kernel per operation with what was passed over, and the matrix row.
    Weights are not loaded. Where none are given, everything that does not depend on them is explained. --simulate
    needs torch_npu and a C compiler, and no NPU; it runs the demo, or a small random model with the request's heads.
    """
    found = explain_request(settings.args)
    report = simulate_launches(settings.args) if simulate else None
    if as_json:
        print_json(_data(found, settings.args) | ({"simulated": launches_data(report)} if report else {}))
    else:
        _print(found, settings.args)
    if report and not as_json:
        print_launches(report)
    if found.obstacle is not None and not found.weights_missing:
        raise found.obstacle


def explain_request(args: EngineArgs) -> Explanation:
    """Everything that can be said of a request.

    Raises:
        UnsupportedError: the matrix refuses it.
        UsageError: it is malformed.
        WeightsError: weights were given and are unfit.
    """
    verdict = check(args)
    if verdict.row is None or not verdict.supported:
        raise UnsupportedError(verdict)
    try:
        config = resolve(args)
    except (WeightsError, HardwareError, PluginError) as error:
        if isinstance(error, WeightsError) and args.weights:
            raise
        return _without_weights(args, verdict, verdict.row, error)
    return Explanation(verdict, verdict.row, config, None, config.attention_choice, config.kernels)


def _without_weights(args: EngineArgs, verdict: Verdict, row: FeatureRow, obstacle: NpuZooError) -> Explanation:
    registry, request = get_registry(), verdict.request
    chip, dtype = chip_of(str(request["hardware"])).name, cast("DType", request["dtype"])
    asked = read_request(args, registry)
    model_config, operations = asked.config, asked.family.operations
    attention: AttentionChoice | str = "depends on the head size of the checkpoint; give --weights"
    if model_config:
        kind, stored = cast("Attention", request["attention"]), str(request["kv_cache_dtype"])
        attention = _or_reason(
            lambda: select_attention(
                registry.attention_backends, kind, chip, dtype, model_config, args.block_size, stored
            )
        )
    kernels = _or_reason(lambda: select_kernels(registry.kernels, chip, dtype, operations=operations))
    return Explanation(verdict, row, None, obstacle, attention, kernels)


def _or_reason(choose: Callable[[], T]) -> T | str:
    try:
        return choose()
    except NpuZooError as error:
        return str(error)


def _print(found: Explanation, args: EngineArgs) -> None:
    config, hardware = found.config, str(found.verdict.request["hardware"])
    fields = {
        "model": found.verdict.model,
        **request_fields(found.verdict),
        "hardware": f"{hardware} (chip {chip_of(hardware).name})",
        "engine": _engine(args, config),
        "attention": _attention(found),
        "weights": _weights(found),
    }
    if config:
        fields["limits"] = (
            f"max_model_len {config.max_model_len}, max_num_seqs {config.max_num_seqs}, "
            f"max_num_batched_tokens {config.max_num_batched_tokens}"
        )
        if config.speculation:
            fields["speculation"] = f"{config.speculation.method}, up to {config.speculation.num_tokens} drafts"
        fields["binding"] = "\n".join(config.binding)
        fields |= _shares(config)
    print_fields({**fields, **row_fields(found.row)})
    print()
    if isinstance(found.kernels, str):
        print(found.kernels)
    else:
        _print_kernels(found.kernels)
    for text in config.notes if config else ():
        note(text)


def _shares(config: EngineConfig) -> dict[str, str]:
    """How ranks share the layers and the experts, where they do."""
    split, model = config.split, config.model_config
    fields = {}
    if split.pp > 1:
        stages = stage_layers(model.num_hidden_layers, split.pp)
        fields["stages"] = "\n".join(f"layers {', '.join(map(str, stage))}" for stage in stages)
    if model.moe and split.stage_size > 1:
        held = model.moe.n_routed_experts // split.ep
        part = "whole" if split.moe_tp == 1 else f"1/{split.moe_tp} of each"
        fields["experts"] = f"{held} on a rank, {part}, reached by {config.expert_dispatch}"
        fields["experts"] += "" if config.device == "cpu" else "; captured steps by all_gather"
    return fields


def _print_kernels(kernels: tuple[KernelChoice, ...]) -> None:
    rows = []
    for choice in kernels:
        passed = (f"not {reason}" for reason in choice.passed_over)
        rows.append([choice.operation, "\n".join([f"{choice.kernel}: {choice.reason}", *passed])])
    print_table(["operation", "kernel, and those passed over"], rows)


def _engine(args: EngineArgs, config: EngineConfig | None) -> str:
    name = config.engine if config else args.engine or "native"
    spec = get_registry().engines.get(name)
    return f"{name}: {spec.description}" if spec and spec.description else name


def _attention(found: Explanation) -> str:
    choice, kind = found.attention, found.verdict.request["attention"]
    if isinstance(choice, str):
        return choice
    size = f", block size {choice.block_size}" if choice.block_size else ""
    passed = "".join(f"\npassed over: {reason}" for reason in choice.passed_over)
    return f"{kind}: {choice.backend}{size}; {choice.reason}{passed}"


def _weights(found: Explanation) -> str:
    if found.config:
        return found.config.weights + (" (bundled)" if found.config.bundled else "")
    return "not looked at: none were given" if found.weights_missing else "not looked at"


def _data(found: Explanation, args: EngineArgs) -> dict[str, Any]:
    config = found.config
    attention = found.attention if isinstance(found.attention, str) else dataclasses.asdict(found.attention)
    kernels = found.kernels if isinstance(found.kernels, str) else [dataclasses.asdict(k) for k in found.kernels]
    limits = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
    return {
        "model": found.verdict.model,
        "request": found.verdict.request,
        "engine": config.engine if config else args.engine or "native",
        "attention": attention,
        "kernels": kernels,
        "weights": config.weights if config else None,
        "obstacle": str(found.obstacle) if found.obstacle else None,
        "binding": list(config.binding) if config else None,
        "speculation": dataclasses.asdict(config.speculation) if config and config.speculation else None,
        "limits": {name: getattr(config, name) for name in limits} if config else None,
        "row": found.row.model_dump(mode="json"),
        "notes": list(config.notes) if config else [],
    }
