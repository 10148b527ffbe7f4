"""Which splits and lengths of a request fit the memory of its hardware."""

from __future__ import annotations

from npu_zoo.core.config import (
    DEFAULT_KV_CACHE_FRACTION,
    DEFAULT_MAX_NUM_BATCHED_TOKENS,
    DEFAULT_MAX_NUM_SEQS,
    EngineArgs,
)
from npu_zoo.core.errors import HardwareError
from npu_zoo.core.features import split_flags, splits_of
from npu_zoo.core.hardware import PRODUCTS, chip_of
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.planning import RankPlan, Workload, plan_rank
from npu_zoo.platforms.ascend import detect_ascend, parse_npu_smi, run_npu_smi
from npu_zoo.platforms.detection import total_memory
from npu_zoo.request import Request
from npu_zoo.speculation import asked_drafts
from npu_zoo.splitting import split_faults

GIB = 1 << 30


def device_memory(hardware: str) -> tuple[int, ...]:
    """Bytes of one device: this machine's where it has that hardware, else of every model that is sold."""
    if hardware == "cpu":
        return (total_memory(),)
    if hardware in _detected_products():
        found = {device.memory for device in parse_npu_smi(run_npu_smi()) if device.memory}
        if found:
            return (min(found),)
    return tuple(size * GIB for size in PRODUCTS[hardware].memory_gib)


def rank_memory(hardware: str, memory: int, split: Split) -> int:
    """What one rank has of a device's memory: ranks on a CPU share the machine's."""
    return memory // split.world_size if hardware == "cpu" else memory


def _detected_products() -> tuple[str, ...]:
    try:
        return detect_ascend()
    except HardwareError:  # what this machine has does not matter to a request for other hardware
        return ()


def workload_of(args: EngineArgs, config: ModelConfig) -> Workload:
    """What an engine would keep at once; where no length is asked for, the model's own."""
    longest = args.max_model_len or config.max_position_embeddings
    tokens = args.max_num_batched_tokens or DEFAULT_MAX_NUM_BATCHED_TOKENS
    return Workload(longest, args.max_num_seqs or DEFAULT_MAX_NUM_SEQS, tokens, asked_drafts(args))


def cache_share(args: EngineArgs, hardware: str) -> float:
    """The share of what weights and activations leave that keys and values get."""
    return args.kv_cache_fraction or DEFAULT_KV_CACHE_FRACTION[chip_of(hardware).device]


def asked_split(args: EngineArgs, request: Request) -> Split | None:
    """The split of a request that names a size; None where it leaves the choice to the matrix."""
    sizes = (args.tensor_parallel_size, args.pipeline_parallel_size, args.expert_parallel_size, args.data_parallel_size)
    return None if (*sizes, args.world_size) == (None,) * 5 else request.split


def offered_splits(args: EngineArgs, request: Request) -> list[Split]:
    """Every split that the matrix offers a request and its shape allows, by world size; its other axes stand."""
    rows = request.family.matrix.of_size(request.variant.size, experimental=bool(args.allow_experimental))
    fixed = [axis for axis in request.axes if axis not in ("world_size", "parallelism")]
    rows = tuple(row for row in rows if all(row.offers(axis, request.axes[axis]) for axis in fixed))
    found = {
        split
        for row in rows
        for world in row.world_size
        for layout in row.parallelism
        for split in splits_of(layout, world)
        if request.config is None or not split_faults(args, request, row, request.config, split)
    }
    return sorted(found, key=lambda split: (split.world_size, split.pp, split.dp, split.ep))


def plan_request(args: EngineArgs, request: Request, config: ModelConfig, split: Split) -> RankPlan:
    """The plan of a request's rank under a split."""
    return plan_rank(
        config,
        request.dtype,
        split,
        workload_of(args, config),
        weight_bits=request.weight_bits,
        group_size=request.quantization_config.group_size if request.quantization_config else None,
        kv_cache_dtype=request.kv_cache_dtype,
        device=chip_of(request.hardware).device,
        mtp=args.speculative_method == "mtp",
    )


def require_fit(args: EngineArgs, request: Request, config: ModelConfig) -> None:
    """Refuse what cannot fit a device, before anybody downloads or reads it.

    Raises:
        HardwareError: names the smallest world size, or else the longest sequence, that fits.
    """
    memory = max(device_memory(request.hardware), default=0)
    if not memory:  # such as a GPU, of which nothing is known here
        return
    split = request.split
    plan = plan_request(args, request, config, split)
    wanted = args.max_model_len or 1
    tokens = plan.cache_tokens(memory, cache_share(args, request.hardware))
    if tokens >= wanted:
        return
    what = f"{request.model} in {request.dtype}" + (
        "" if request.quantization == "none" else f", {request.quantization},"
    )
    text = (
        f"{what} takes {_gib(plan.weights)} of weights and about {_gib(plan.activations)} of activations a device at "
        f"world size {split.describe()}; a device of {request.hardware} has {_gib(memory)}"
    )
    if tokens:
        text += (
            f", which leaves room for keys and values of {tokens:,} tokens, and max_model_len={wanted} was asked for"
        )
    raise HardwareError(f"{text}; {_way_out(args, request, config, tokens, memory, wanted)}")


def _way_out(args: EngineArgs, request: Request, config: ModelConfig, tokens: int, memory: int, wanted: int) -> str:
    share = cache_share(args, request.hardware)
    larger = (s for s in offered_splits(args, request) if s.world_size > request.world_size)
    fits = next(
        (s for s in larger if plan_request(args, request, config, s).cache_tokens(memory, share) >= wanted), None
    )
    ways = [f"--max-model-len {tokens} fits"] if tokens else []
    if fits:
        sizes = f"--world-size {fits.world_size}" if fits == Split(fits.tp) else split_flags(fits)
        ways.append(f"{sizes} is the smallest of the matrix that fits")
    if not ways:
        ways.append("no world size of the matrix fits; take a smaller variant or a quantized one")
    return ", ".join(ways) + f" (`npu-zoo plan --model {request.model} --hardware {request.hardware}` shows all)"


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"
