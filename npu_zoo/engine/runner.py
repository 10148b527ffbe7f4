"""The model on its device: loads it, sizes the KV cache, and computes the logits of a step."""

from __future__ import annotations

import functools
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npu_zoo.checkpoint import detect_format
from npu_zoo.core.attention import (
    AttentionMetadata,
    CacheLayout,
    GraphAttention,
    LatentLayout,
    ReplayAttention,
    StepAttention,
)
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import Progress
from npu_zoo.core.errors import EngineError, HardwareError, WeightsError
from npu_zoo.core.parallel import ALONE, Ranks
from npu_zoo.engine.activations import Activations, largest_step, measure_activations, slots_of
from npu_zoo.engine.graph import DecodeGraphs
from npu_zoo.engine.host_memory import keep_freed_memory, return_freed_memory
from npu_zoo.engine.outputs import NO_OUTPUTS, Outputs, ResultShape, collect_outputs
from npu_zoo.engine.replay import DecodeReplays
from npu_zoo.engine.speculation.graph import MtpGraphs
from npu_zoo.engine.speculation.layer import MtpDrafter, SeenStep, by_row, require_mtp, require_stored
from npu_zoo.engine.step import MicroBatch, StepRow, micro_batches
from npu_zoo.nn.context import BuildContext, ForwardContext
from npu_zoo.nn.kernels.table import bind_kernels
from npu_zoo.nn.model import CausalLM, build_on_meta
from npu_zoo.nn.quantization import Quantization, bind_quantization
from npu_zoo.nn.rotary import softmax_scale
from npu_zoo.platforms.detection import available_memory
from npu_zoo.registry import get_registry, load_code
from npu_zoo.weights.load import compare_shapes, load_weights

_WEIGHTS_PER_THREAD = 16 * 2**20
_SPANS_KEPT = 64
_PRIMITIVES_KEPT = 128
_TORCH_THREADS = torch.get_num_threads()  # its own choice, which a model that runs here may lower for itself


@dataclass(frozen=True)
class CachePlan:
    """The KV cache as it was sized.

    Attributes:
        num_slots, slot_size: see :class:`CacheLayout`.
        max_model_len: the longest sequence that the cache takes.
        num_bytes: of all layers.
    """

    num_slots: int
    slot_size: int
    max_model_len: int
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache holds."""
        return self.num_slots * self.slot_size


class ModelRunner:
    """One rank's share of the model with its cache.

    Args:
        config: the run, which all ranks have alike.
        progress: told how far loading is.
        ranks: its place, and the groups that it talks in.

    Attributes:
        num_steps: that were computed, or begun; all ranks count alike.
        drafter: guesses next tokens with the model's own layer for it; None where the run does not.
        spans: when each of the last micro-batches was computed here, from and to, by ``time.monotonic``.
    """

    def __init__(self, config: EngineConfig, progress: Progress | None = None, ranks: Ranks = ALONE) -> None:
        self.config, self._ranks = config, ranks
        self._place = ranks.place
        self._layers = ranks.place.layers(config.model_config.num_hidden_layers)
        self.device = open_device(config, ranks.local_rank)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.kernels = bind_kernels(config.kernels)
        self.model = self._load_model(progress)
        ranks.minimum(0)  # some load for longer than others may wait in one operation
        self.activations = self._measure_activations()
        free = max(0, free_memory(self.device) - (self.activations.reserved if self.activations else 0))
        per_token = -ranks.minimum(-self._bytes_per_token())
        self.cache = plan_cache(config, per_token, ranks.minimum(free // self._sharing))
        self.attention = self._create_attention(self.cache.num_slots, self.cache.slot_size)
        self.graphs = self._create_graphs()
        self.replays = self._create_replays()
        self.drafter = self._create_drafter()
        self.num_steps = 0
        self.spans: deque[tuple[float, float]] = deque(maxlen=_SPANS_KEPT)

    def execute(self, rows: Sequence[StepRow]) -> tuple[Tensor, list[Tensor]]:
        """Compute a step; every rank is given all of its rows.

        Returns:
            On the first rank, [N, vocab_size] logits of the last ``num_logits`` tokens of each row, in the order of the
            rows; and the hidden states of every row whose prompt is asked for, in that order too. On others
            their own share of it, or nothing.
        """
        self.num_steps += 1
        with torch.inference_mode():
            mine = [row for row in rows if row.replica == self._place.replica]
            outputs = self._compute(rows, mine)
            return collect_outputs(self._ranks, rows, outputs, self._shape)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden_size] to [N, vocab_size]; on the last stage."""
        with torch.inference_mode():
            return self.model.compute_logits(hidden.to(self.device))

    def draft(self, steps: Sequence[SeenStep]) -> list[list[int]]:
        """Let the layer that predicts further tokens see steps, and guess what follows rows of the last one.

        Args:
            steps: some of the last :data:`STEPS_AT_ONCE`, the earliest first; each is seen once. The number of one is
                what :attr:`num_steps` was when it had been computed.

        Returns:
            For each row of the last step as many drafts as it wants, or none where that step was interrupted.
        """
        return by_row(steps[-1].rows, self._draft(steps).tolist())

    @property
    def master_port(self) -> int | None:
        """The port that ranks have met at; None where there is but one."""
        return None

    def report(self) -> list[dict[str, Any]]:
        """What each rank holds."""
        return [self.own_report()]

    def own_report(self) -> dict[str, Any]:
        """What this rank holds, in bytes, and what it did in the last step."""
        return {
            "rank": self._place.rank,
            "host": socket.gethostname(),
            "device": str(self.device),
            "layers": [self._layers.start, self._layers.stop],
            "parameter_bytes": self.parameter_bytes,
            "kv_cache_bytes": self.cache.num_slots * self.cache.slot_size * self._bytes_per_token(),
            "spans": list(self.spans),
        }

    def shutdown(self) -> None:
        """Nothing runs beside this process."""

    def _compute(self, rows: Sequence[StepRow], mine: Sequence[StepRow]) -> Outputs:
        if self.graphs is not None and rows and all(row.decodes for row in rows):
            hidden = self._replay(self.graphs, rows, mine)
            return (hidden, []) if mine and self._place.is_last_stage else NO_OUTPUTS
        if self.replays is not None and rows and all(row.decodes for row in rows):
            logits = self._replay_recorded(self.replays, rows)
            if logits is not None:
                return logits, []
        split = self._place.split
        parts = [self._run_batch(batch) for batch in micro_batches(rows, split.dp, split.pp)]
        if not self._place.is_last_stage:
            return NO_OUTPUTS
        return self._finish(parts[0] if len(parts) == 1 else torch.cat(parts), mine)  # a cat of one copies

    def _draft(self, steps: Sequence[SeenStep]) -> Tensor:
        if self.drafter is None:
            raise EngineError("the engine was started without speculative_method=mtp and has no layer to draft with")
        with torch.inference_mode():
            return self.drafter.draft(steps)

    def _keep(self, rows: Sequence[StepRow], hidden: Tensor) -> None:
        if self.drafter is not None:
            self.drafter.keep(self.num_steps, rows, hidden)

    def _finish(self, hidden: Tensor, rows: Sequence[StepRow]) -> Outputs:
        """Logits and prompts' hidden states of this replica's rows."""
        if not rows:
            return NO_OUTPUTS
        self._keep(rows, hidden)
        if all(row.decodes for row in rows):
            return self.model.compute_logits(hidden), []
        ends = list(accumulate(row.num_tokens for row in rows))
        last = [end - row.num_logits + n for end, row in zip(ends, rows, strict=True) for n in range(row.num_logits)]
        logits = self.model.compute_logits(hidden[torch.tensor(last, device=self.device)]) if last else None
        prompts = [hidden[end - row.num_tokens : end] for end, row in zip(ends, rows, strict=True) if row.wants_prompt]
        return logits, prompts

    def _run_batch(self, batch: MicroBatch) -> Tensor:
        """Take a micro-batch through this stage: from the one before, and to the one behind."""
        rows = batch.rows[self._place.replica]
        count = sum(row.num_tokens for row in rows)
        x = self._stage_input(count)
        begin = time.monotonic()
        hidden = self._forward(rows, batch.replica_tokens, x)
        self._pass_on(hidden)
        self.spans.append((begin, time.monotonic()))
        return hidden

    def _stage_input(self, count: int) -> Tensor | None:
        """What the stage before gives for some tokens; None at the first."""
        if self._place.stage == 0:
            return None
        shape = (count, self.config.model_config.hidden_size)
        if not count:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        return self._ranks.world.receive(shape, self.dtype, self._place.pp_group[self._place.stage - 1])

    def _pass_on(self, hidden: Tensor) -> None:
        if not self._place.is_last_stage and len(hidden):
            self._ranks.world.send(hidden, self._place.pp_group[self._place.stage + 1])

    @property
    def _shape(self) -> ResultShape:
        config = self.config.model_config
        return ResultShape(config.vocab_size, config.hidden_size, self.dtype, self.device)

    @property
    def _sharing(self) -> int:
        """Ranks that share one device's memory and processors: all of a host's CPU."""
        return self._ranks.local_size if self.device.type == "cpu" else 1

    def _replay(self, graphs: DecodeGraphs, rows: Sequence[StepRow], mine: Sequence[StepRow]) -> Tensor:
        replicas = range(self._place.split.dp)
        largest = max(sum(row.num_tokens for row in rows if row.replica == replica) for replica in replicas)
        token_ids = list(chain.from_iterable(row.token_ids for row in mine))
        slices = list(chain.from_iterable(row.slices for row in mine))
        hidden = self._stage_input(len(token_ids))
        given = token_ids if hidden is None else hidden
        output = graphs.run(given, [row.start for row in slices], slices, largest)
        # A replay overwrites what one before has given.
        self._pass_on(output.clone() if self._place.split.pp > 1 else output)
        if self.drafter is not None:
            self._keep(mine, graphs.hidden(len(token_ids)).clone())
        return output

    def _replay_recorded(self, replays: DecodeReplays, rows: Sequence[StepRow]) -> Tensor | None:
        begin = time.monotonic()
        slices = list(chain.from_iterable(row.slices for row in rows))
        found = replays.run(list(chain.from_iterable(row.token_ids for row in rows)), slices)
        if found is None:
            return None
        hidden, logits = found
        if self.drafter is not None:
            self._keep(rows, hidden.clone())
        self.spans.append((begin, time.monotonic()))
        return logits

    @property
    def decode_form(self) -> str:
        """How steps of single tokens are computed: from graphs, as replays of recorded ones, or eagerly, and why."""
        if self.graphs is not None:
            return "captured graphs"
        if self.replays is None:
            return "eager"
        return f"eager: {self.replays.obstacle}" if self.replays.obstacle else "replays of recorded steps"

    def _create_replays(self) -> DecodeReplays | None:
        attention, config = self.attention, self.config
        if config.enforce_eager or config.world_size > 1 or not isinstance(attention, ReplayAttention):
            return None
        return DecodeReplays(self.model, attention, self.cache.max_model_len)

    def _create_graphs(self) -> DecodeGraphs | None:
        attention, config = self.attention, self.config
        if config.enforce_eager or not isinstance(attention, GraphAttention):
            return None
        return DecodeGraphs(self.model, attention, self._place, config, self.cache.max_model_len, self.device)

    def _create_drafter(self) -> MtpDrafter | None:
        config, attention, speculation = self.config, self.attention, self.config.speculation
        if speculation is None or not config.mtp:
            return None
        graphs = []
        if self.graphs is not None and isinstance(attention, GraphAttention):
            longest, count = self.cache.max_model_len, speculation.num_tokens
            arguments = (self.model, attention, self._place, config, longest, self.device)
            graphs = [MtpGraphs(*arguments) for _ in range(count)]
        return MtpDrafter(self.model, attention, self.cache.slot_size, self.device, graphs)

    def _forward(self, rows: Sequence[StepRow], replica_tokens: tuple[int, ...], x: Tensor | None) -> Tensor:
        tokens = list(chain.from_iterable(row.token_ids for row in rows))
        positions = list(chain.from_iterable(row.positions for row in rows))
        slices = list(chain.from_iterable(row.slices for row in rows))
        # A replica without tokens attends to nothing; most operators take no rows of none.
        metadata = self.attention.prepare(slices) if rows else AttentionMetadata([], 0)
        context = ForwardContext(self.attention, metadata, self._layers.start, replica_tokens)
        places = torch.tensor(positions, dtype=torch.long).to(self.device)
        given = torch.tensor(tokens, dtype=torch.long).to(self.device) if x is None else x
        hidden: Tensor = self.model(given, places, context)
        return hidden

    def _load_model(self, progress: Progress | None) -> CausalLM:
        config = self.config
        quantization, dispatch = self._quantization(), config.expert_dispatch
        length, mtp = config.max_model_len, config.mtp
        context = BuildContext(self.kernels, self.dtype, length, quantization, self._ranks, dispatch, mtp)
        model = build_on_meta(load_code(config.model_class), config.model_config, context)
        if mtp:
            require_mtp(model)
        directory = Path(config.weights)
        spec = detect_format(directory, get_registry().weight_formats)
        if spec.loader is None:
            raise WeightsError(f"{directory} is in the format {spec.name}, which must be converted first")
        loader = load_code(spec.loader)(directory)
        optional, ignored = model.optional_tensors(), model.ignored_tensors
        due = model.checkpoint_tensors()
        shards, elsewhere = model.shards(), model.held_elsewhere()
        comparison = compare_shapes(
            due, loader.shapes(), optional=optional, ignored=ignored, shards=shards, elsewhere=elsewhere
        )
        if mtp:
            require_stored(comparison.missing, config.model_config.num_hidden_layers, directory)
        comparison.require(directory)
        self.parameter_bytes = sum(t.nbytes for name, t in due.items() if name not in comparison.absent)
        self._check_memory(self.parameter_bytes)
        if config.deterministic:
            # Operators that have no such form say so once; torch_npu hands the setting on to its own.
            torch.use_deterministic_algorithms(True, warn_only=True)
            # The cache is to stay untouched until it is used.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if self.device.type == "cpu":
            threads = config.threads or default_threads(self.parameter_bytes * self._sharing) // self._sharing
            torch.set_num_threads(max(1, threads))
            return_freed_memory()
        model.allocate(self.device)
        load_weights(
            model.checkpoint_tensors(),
            loader,
            optional=optional,
            ignored=ignored,
            shards=shards,
            elsewhere=elsewhere,
            adopt=model.adopt,
            storage=model.storage_of,
            on_loaded=model.tensor_loaded,
            progress=functools.partial(progress, "loading weights") if progress else None,
        )
        model.finish_loading()
        if self.device.type == "cpu":
            keep_freed_memory()
        return model.eval()

    def _quantization(self) -> Quantization | None:
        stored, method = self.config.quantization_config, self.config.quantization_method
        if stored is None or method is None:
            return None
        return bind_quantization(stored, method, self.kernels, has_experts=self.config.model_config.moe is not None)

    def _check_memory(self, needed: int) -> None:
        free = free_memory(self.device)
        if needed > free:
            raise HardwareError(
                f"{self.config.model} takes {needed / 2**30:.1f} GiB in {self.config.dtype}, and "
                f"{free / 2**30:.1f} GiB are free on {self.config.hardware}; "
                "take a smaller variant or a dtype of fewer bytes; "
                f"`npu-zoo plan --model {self.config.model}` shows what fits"
            )

    def _bytes_per_token(self) -> int:
        config, itemsize = self.config.model_config, self.dtype.itemsize
        backend = load_code(self.config.attention_choice.implementation)
        if config.mla:
            return self._cached_layers * int(backend.bytes_per_token(config.mla, itemsize))
        _, kv_heads, head_dim = self.config.head_layout
        return self._cached_layers * int(backend.bytes_per_token(kv_heads, head_dim, itemsize))

    @property
    def _cached_layers(self) -> int:
        """Layers whose keys and values are cached here: the stage's, and behind the last one that which drafts."""
        return len(self._layers) + (self.config.mtp and self._place.is_last_stage)

    def _measure_activations(self) -> Activations | None:
        """Memory beside weights and cache; None where nobody counts them, or the user has sized the cache."""
        config = self.config
        if self.device.type == "cpu" or config.kv_cache_memory is not None:
            return None
        size = min(config.max_model_len, config.max_num_batched_tokens)
        if config.attention == "paged":
            size = config.attention_choice.block_size or 1
        rows = largest_step(config, size)
        attention = self._create_attention(slots_of(rows), size)
        return measure_activations(
            self.model, self.kernels.top_k_top_p, attention, rows, config, self.device, self._place
        )

    def _create_attention(self, *slots: int) -> StepAttention:
        """The backend with a cache of ``num_slots`` slots of ``slot_size`` tokens."""
        config = self.config.model_config
        heads, kv_heads, head_dim = self.config.head_layout
        layers = self._cached_layers
        layout: CacheLayout | LatentLayout = (
            LatentLayout(layers, config.mla, *slots) if config.mla else CacheLayout(layers, kv_heads, head_dim, *slots)
        )
        backend = load_code(self.config.attention_choice.implementation)
        created: StepAttention = backend(layout, self.dtype, self.device, heads, softmax_scale(config))
        return created


def plan_cache(config: EngineConfig, bytes_per_token: int, free: int) -> CachePlan:
    """Size the KV cache: what the user gave, or a share of what is free, but no more than all sequences could fill.

    Args:
        config: the run.
        bytes_per_token: of all layers.
        free: bytes of free memory on the device.

    Raises:
        HardwareError: the memory does not hold one sequence of the length that was asked for, or is not there.
    """
    given = config.kv_cache_memory or int(free * config.kv_cache_fraction)
    paged = config.attention == "paged"
    size = (config.attention_choice.block_size or 1) if paged else 1
    affordable = given // (bytes_per_token * size) * size
    longest = config.max_model_len
    if affordable < longest:
        if config.max_model_len_asked or affordable < 1:
            raise HardwareError(
                f"max_model_len={longest} takes {longest * bytes_per_token / 2**20:.0f} MiB of keys and values, and "
                f"{given / 2**20:.0f} MiB are there, enough for {affordable} tokens; lower --max-model-len or give "
                "--kv-cache-memory"
            )
        longest = affordable
    slot_size, slots_per_sequence = (size, -(-longest // size)) if paged else (longest, 1)
    slots = min(affordable // slot_size, config.max_num_seqs * slots_per_sequence)
    num_bytes = slots * slot_size * bytes_per_token
    if num_bytes > free:
        raise HardwareError(
            f"the KV cache of {num_bytes / 2**30:.1f} GiB that --kv-cache-memory allows does not fit: "
            f"{free / 2**30:.1f} GiB are free; lower it, or leave it unset for a share of what is free"
        )
    return CachePlan(slots, slot_size, longest, num_bytes)


def default_threads(parameter_bytes: int) -> int:
    """CPU threads for a model: torch's own choice, but one per 16 MiB of weights.

    The share of a smaller model is computed sooner than threads meet at a barrier, and much sooner on a busy machine.
    """
    return max(1, min(_TORCH_THREADS, parameter_bytes // _WEIGHTS_PER_THREAD))


def free_memory(device: torch.device) -> int:
    """Free bytes on a device."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    return available_memory()


def _bound_primitive_caches() -> None:
    """Keep fewer of oneDNN's compiled products, unless the user says how many; read when the first one is made.

    Both torch and oneDNN keep 1,024 of them, one for every number of rows, which took up to 400 MiB and saved no time.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_PRIMITIVES_KEPT))


def open_device(config: EngineConfig, number: int, ranks: int = 1) -> torch.device:
    """The device of a rank; an NPU is this process's current one then.

    Args:
        number: of the rank among those of this host.
        ranks: how many they are.

    Raises:
        HardwareError: there is none, or not one for each.
    """
    if config.device == "cpu":
        _bound_primitive_caches()
        return torch.device("cpu")
    if config.device == "npu":
        _import_torch_npu(config)
    module = torch.get_device_module(config.device)
    if not module.is_available():
        raise HardwareError(
            f"--hardware {config.hardware} was asked for, and torch sees no device of it; --hardware cpu runs here"
        )
    if ranks > module.device_count():
        raise HardwareError(
            f"{ranks} ranks of this host need {ranks} devices of {config.hardware}, and torch sees "
            f"{module.device_count()}; take a smaller --world-size, or look at what hides the others "
            "(ASCEND_RT_VISIBLE_DEVICES, CUDA_VISIBLE_DEVICES)"
        )
    if config.device == "npu":
        module.set_device(number)
    return torch.device(config.device, number)


def _import_torch_npu(config: EngineConfig) -> None:
    try:
        import torch_npu  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise HardwareError(f"torch_npu cannot be imported, so {config.hardware} is out of reach: {error}") from error
