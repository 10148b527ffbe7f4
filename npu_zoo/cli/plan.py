"""``plan``: the memory that a model takes on a device, for every world size that the matrix offers."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from npu_zoo.cli.help import json_output
from npu_zoo.cli.options import JsonFlag, request_options
from npu_zoo.cli.output import count_text, note, print_fields, print_json, print_table
from npu_zoo.core.errors import HardwareError, UnsupportedError, WeightsError
from npu_zoo.core.hardware import PRODUCTS
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.dispatch import check, parse_bytes
from npu_zoo.fitting import (
    GIB,
    asked_split,
    cache_share,
    device_memory,
    offered_splits,
    plan_request,
    rank_memory,
    workload_of,
)
from npu_zoo.planning import RankPlan
from npu_zoo.registry import get_registry
from npu_zoo.request import read_request
from npu_zoo.settings import Settings
from npu_zoo.splitting import require_split

_LENGTHS = (1024, 4096, 16384, 65536)
PLAN_KEYS: dict[str, str] = {
    "model": "The model with its variant.",
    "request": "The request's value on every axis of the matrix.",
    "workload": "max_model_len, max_num_seqs and max_num_batched_tokens, which activations follow from.",
    "memory": "Bytes of a device: this machine's where it has that hardware, else of each model that is sold.",
    "splits": "One object for each split that the matrix offers, or for the one that was asked for.",
    "splits[].tp": "Ranks that share every layer; also pp, ep, dp and world_size.",
    "splits[].weights": "Bytes of weights of the rank that has most.",
    "splits[].activations": "Estimated bytes of the peak of one step; an engine on a device measures it.",
    "splits[].cache_per_token": "Bytes of keys and values of one token.",
    "splits[].devices": "One object for each size of memory: cache_tokens, and batch, the largest by length; of all "
    "replicas.",
}
"""What ``plan --json`` writes."""


@dataclasses.dataclass(frozen=True)
class Plans:
    """The plans of one request, by split."""

    settings: Settings
    model: str
    axes: dict[str, Any]
    config: ModelConfig
    hardware: str
    memory: tuple[int, ...]
    plans: tuple[tuple[Split, RankPlan], ...]

    @property
    def share(self) -> float:
        """Of what weights and activations leave, what the cache gets."""
        return cache_share(self.settings.args, self.hardware)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths that batches are shown for."""
        longest = self.config.context_length
        return (*(length for length in _LENGTHS if length < longest), longest)


@json_output(PLAN_KEYS)
@request_options(engine=True)
def plan(
    settings: Settings,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Memory of a device, such as 32GiB.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Plan the memory of a run: weights, activations and cache of a rank, and the largest batches.

    Needs no device and no weights. Without parallel sizes every split is planned that the matrix offers.
    """
    found = plan_settings(settings, memory)
    if as_json:
        print_json(_data(found))
    else:
        _print(found)


def plan_settings(settings: Settings, memory: str | None) -> Plans:
    """The plans of what the settings ask for.

    Raises:
        UnsupportedError: the matrix refuses it, or the model's shape the split that was asked for.
        WeightsError: nothing is known of the model's shape.
        HardwareError: nothing is known of the hardware's memory.
    """
    verdict = check(settings.args)
    if not verdict.supported or verdict.row is None:
        raise UnsupportedError(verdict)
    request = read_request(settings.args, get_registry())
    if request.config is None:
        raise WeightsError(f"{request.model} takes any checkpoint; name the one to plan for with --weights DIR")
    sizes = (parse_bytes(memory, "--memory") or 0,) if memory else device_memory(request.hardware)
    if not sizes:
        raise HardwareError(f"the memory of {PRODUCTS[request.hardware].title} is not known here; give --memory SIZE")
    asked = asked_split(settings.args, request)
    if asked:
        require_split(settings.args, request, verdict.row, request.config)
    splits = [asked] if asked else offered_splits(settings.args, request)
    plans = tuple((split, plan_request(settings.args, request, request.config, split)) for split in splits)
    return Plans(settings, request.model, verdict.request, request.config, request.hardware, sizes, plans)


def _print(found: Plans) -> None:
    shown = ["hardware", "dtype", "attention"]
    shown += [axis for axis in ("quantization", "kv_cache_dtype") if found.axes[axis] not in ("none", "auto")]
    workload = workload_of(found.settings.args, found.config)
    print_fields(
        {
            "model": found.model,
            **{axis.replace("_", " "): str(found.axes[axis]) for axis in shown},
            "parameters": count_text(found.config.num_parameters),
            "a step": f"up to {workload.max_num_batched_tokens} tokens of {workload.max_num_seqs} sequences, "
            f"none longer than {workload.max_model_len:,}",
            "keys and values": f"{found.share:g} of what weights and activations leave",
        }
    )
    print()
    columns = ["devices", "memory", "weights", "activations", "cache a token", "tokens in cache"]
    rows = [_row(found, split, plan, size) for split, plan in found.plans for size in found.memory]
    print_table([*columns, *(f"batch of {length:,}" for length in found.lengths)], rows)
    note("bytes of the rank that takes most; activations are estimated, and an engine on a device measures them")


def _row(found: Plans, split: Split, plan: RankPlan, size: int) -> list[str]:
    room = rank_memory(found.hardware, size, split)
    tokens = plan.cache_tokens(room, found.share)
    fixed = [
        split.describe(),
        f"{size / GIB:,.4g} GiB",
        _bytes(plan.weights),
        _bytes(plan.activations),
        _bytes(plan.cache_per_token),
    ]
    if not tokens:
        return [*fixed, "does not fit", *("" for _ in found.lengths)]
    batches = (split.dp * plan.largest_batch(room, found.share, n) for n in found.lengths)
    return [*fixed, f"{split.dp * tokens:,}", *(f"{batch:,}" for batch in batches)]


def _bytes(size: int) -> str:
    for unit, factor in (("GiB", GIB), ("MiB", 1 << 20)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size / 1024:,.1f} KiB"


def _data(found: Plans) -> dict[str, Any]:
    return {
        "model": found.model,
        "request": found.axes,
        "workload": dataclasses.asdict(workload_of(found.settings.args, found.config)),
        "memory": list(found.memory),
        "splits": [
            {
                **dataclasses.asdict(split),
                "world_size": split.world_size,
                **dataclasses.asdict(plan),
                "devices": [_device_data(found, split, plan, size) for size in found.memory],
            }
            for split, plan in found.plans
        ],
    }


def _device_data(found: Plans, split: Split, plan: RankPlan, size: int) -> dict[str, Any]:
    room = rank_memory(found.hardware, size, split)
    return {
        "memory": size,
        "cache_tokens": split.dp * plan.cache_tokens(room, found.share),
        "batch": {str(n): split.dp * plan.largest_batch(room, found.share, n) for n in found.lengths},
    }
