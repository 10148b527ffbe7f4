"""``explain --simulate``: what a decode step of a request launches, counted on the simulated Ascend runtime."""

from __future__ import annotations

import dataclasses
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

import npu_zoo
from npu_zoo.cli.output import print_fields, print_table
from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.core.errors import HardwareError, UsageError
from npu_zoo.core.hardware import chip_of
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.dispatch import resolve
from npu_zoo.registry import get_registry
from npu_zoo.request import Request, read_request
from npu_zoo.speculation import asked_drafts
from npu_zoo.testing.launches import REASONS, StepLaunches, decode_launches, drafted_launches
from npu_zoo.testing.shapes import rank_shape, write_random_model

_SIMULATE = "NPU_ZOO_SIMULATE"
_PROMPTS = [[3], [4], [5], [6]]


@dataclasses.dataclass(frozen=True)
class LaunchReport:
    """One decode step of a few sequences.

    Attributes:
        shape: what ran in the request's place.
        eager, graph: every operator by itself, and from a captured graph.
        drafts: of each sequence, as asked for.
        drafted: from a graph, with so many drafts; None where none were asked for. What makes them is not counted.
        method: that was asked for to make them.
    """

    shape: str
    eager: StepLaunches
    graph: StepLaunches
    drafts: int = 0
    drafted: StepLaunches | None = None
    method: str = "none"


def simulate_launches(args: EngineArgs) -> LaunchReport:
    """Run a request's demo, or a small random model with its heads, on the simulated product.

    Raises:
        UsageError: the hardware is no NPU, or the family has no variant for a model of any size.
        HardwareError: it cannot be simulated here.
    """
    request = read_request(args, get_registry())
    if chip_of(request.hardware).device != "npu":
        raise UsageError(f"--simulate counts launches of an NPU, not of {request.hardware}; name one with --hardware")
    measure = _activate(request.hardware)
    with tempfile.TemporaryDirectory() as folder:
        config, shape = _stand_in(args, request, Path(folder))
        eager = decode_launches(config, _PROMPTS, measure, enforce_eager=True)
        graph = decode_launches(config, _PROMPTS, measure, enforce_eager=False)
        drafts = asked_drafts(args)
        drafted = drafted_launches(config, _PROMPTS, measure, enforce_eager=False, drafts=drafts) if drafts else None
    return LaunchReport(shape, eager, graph, drafts, drafted, args.speculative_method or "none")


def _activate(product: str) -> Any:
    """Start the simulated product; returns the simulator's ``measure``."""
    active = os.environ.get(_SIMULATE)
    if active and active != product:
        raise HardwareError(f"{_SIMULATE}={active} is simulated, and {product} was asked for; unset it, or ask for it")
    os.environ[_SIMULATE] = product
    try:
        npu_zoo.simulate()
        simulator = importlib.import_module("npu_zoo.simulator")  # stands alone: nobody imports it by name
    except RuntimeError as error:
        raise HardwareError(f"{product} cannot be simulated here: {error}") from error
    if simulator.simulated_machine() is None:
        raise HardwareError(f"{product} cannot be simulated here without torch_npu and a C compiler")
    return simulator.measure


def _stand_in(args: EngineArgs, request: Request, folder: Path) -> tuple[EngineConfig, str]:
    """What runs: a bundled checkpoint as it is, else a small random model with one rank's heads."""
    if request.variant.bundled and args.weights is None:
        config = resolve(_engine_args(args, request))
        return config, f"the bundled checkpoint, {config.model_config.num_hidden_layers} layers"
    if request.config is None:
        raise UsageError(f"{request.model} takes any checkpoint; name one with --weights DIR")
    if request.family.variant("custom") is None:
        raise UsageError(f"{request.family.name} has no variant 'custom', which a model of any size could run as")
    shape = rank_shape(request.config, request.split)
    write_random_model(folder, request.family, shape)
    custom = {"model": f"{request.family.name}:custom", "weights": str(folder), "allow_experimental": True}
    return resolve(_engine_args(args, request).model_copy(update=custom)), _describe(shape)


def _engine_args(args: EngineArgs, request: Request) -> EngineArgs:
    small = {"world_size": 1, "max_model_len": 256, "kv_cache_memory": "64MiB", "skip_tokenizer_init": True}
    kept = {"model": args.model, "block_size": args.block_size, "strict_kernels": args.strict_kernels}
    asked = {"hardware": request.hardware, "dtype": request.dtype, "attention": request.attention}
    return EngineArgs.model_validate({**kept, **asked, **small})


def _describe(shape: ModelConfig) -> str:
    heads = f"{shape.num_attention_heads} heads, {shape.num_key_value_heads} for keys and values"
    kind = f"a random model of {shape.num_hidden_layers} layers with one device's {heads}, of size {shape.head_dim}"
    return kind + (f", {shape.moe.n_routed_experts} experts" if shape.moe else "")


def print_launches(report: LaunchReport) -> None:
    """Write the report for people."""
    graph = report.graph
    print()
    fields = {
        "simulated": report.shape,
        "a decode step": f"of {len(_PROMPTS)} sequences, from a captured graph: {graph.total} launches, "
        f"{graph.copies_back} copy to the host, {graph.synchronisations} wait for the device",
        "without graphs": f"{report.eager.total} launches",
    }
    if report.drafted:
        least, most = (report.drafted.total / len(_PROMPTS) / tokens for tokens in (1 + report.drafts, 1))
        fields["with drafts"] = (
            f"{report.drafts} of each sequence: {report.drafted.total} launches, {least:.3g} to {most:.3g} a token, as "
            f"all or none are right; without {graph.total / len(_PROMPTS):.3g}"
            + ("; the layer that makes the drafts is not counted" if report.method == "mtp" else "")
        )
    print_fields(fields)
    print()
    rows = [[str(count), name, REASONS.get(name, "")] for name, count in report.eager.launches.items()]
    print_table(["launches", "kernel", "for"], rows)


def launches_data(report: LaunchReport) -> dict[str, Any]:
    """The report as plain data."""
    return dataclasses.asdict(report)
