"""What a step takes of a device's memory beside weights and cache, measured by running the largest one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_zoo.core.attention import SequenceSlice, StepAttention
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import CompletionOutput
from npu_zoo.core.parallel import Place
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine.decode.graph import graph_sizes
from npu_zoo.engine.sampler import Sampler
from npu_zoo.engine.sequence import Sequence
from npu_zoo.engine.speculation.layer import require_mtp
from npu_zoo.nn.context import ForwardContext
from npu_zoo.nn.kernels.table import TopKTopP
from npu_zoo.nn.model import CausalLM

_SEGMENT = 20 << 20
"""What torch's allocators take from a device at once; a pool of graphs has pieces of its own."""
_WORST = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, min_p=0.01, logprobs=1)
"""Every stage of sampling at once."""


def largest_step(config: EngineConfig, slot_size: int) -> list[SequenceSlice]:
    """Rows of the step that takes most: as many tokens as a step may have, in sequences as long as they may be.

    A row that is a chunk of a longer sequence reads one block again and again in place of what came before.

    Args:
        slot_size: tokens of a block, or of a contiguous slot.
    """
    longest = min(config.max_model_len, slot_size) if config.attention == "flash" else config.max_model_len
    per_row = min(longest, config.max_num_batched_tokens)
    count = min(config.max_num_seqs, -(-config.max_num_batched_tokens // per_row))
    if config.attention == "flash":
        return [SequenceSlice(0, per_row, (number,)) for number in range(count)]
    new = -(-per_row // slot_size)
    before = (longest - per_row) // slot_size
    blocks = [range(number * new, (number + 1) * new) for number in range(count)]
    return [SequenceSlice(before * slot_size, per_row, [0] * before + list(own)) for own in blocks]


def slots_of(rows: list[SequenceSlice]) -> int:
    """How many blocks or slots a cache must have for rows."""
    return 1 + max(slot for row in rows for slot in row.slots)


@dataclass(frozen=True)
class Activations:
    """Bytes that the largest step takes at its peak.

    Attributes:
        allocated: by tensors.
        reserved: what the allocator keeps for them, in pieces of its own, and what decode graphs will hold for good.
    """

    allocated: int
    reserved: int


def measure_activations(
    model: CausalLM,
    top_k_top_p: TopKTopP,
    attention: StepAttention,
    rows: list[SequenceSlice],
    config: EngineConfig,
    device: torch.device,
    place: Place,
) -> Activations:
    """Run the largest step, then the most that sampling may be asked for.

    Args:
        top_k_top_p: what sampling takes.
        attention: with a cache that the rows fit.
        device: one whose allocator counts, which a CPU's does not.
        place: of this rank; all run the same step at once.
    """
    memory: Any = torch.get_device_module(device)
    step = _peak(memory, device, lambda: _run(model, attention, rows, config, device, place))
    batch = config.max_sampled_tokens
    dtype: torch.dtype = getattr(torch, config.dtype)
    shape = (batch, config.model_config.vocab_size)
    sampler = Sampler(top_k_top_p)
    sampling = _peak(memory, device, lambda: _sample(sampler, torch.zeros(shape, dtype=dtype, device=device)))
    tokens = sum(row.num_tokens for row in rows)
    graphs = _graphs(config, dtype.itemsize, step.allocated * batch // tokens)
    waiting = _waiting(config, dtype.itemsize)
    allocated, reserved = max(step.allocated, sampling.allocated), max(step.reserved, sampling.reserved)
    return Activations(allocated + waiting, reserved + waiting + graphs)


def _waiting(config: EngineConfig, itemsize: int) -> int:
    """Hidden states of steps that a layer which drafts has not seen: as many as a step may have, and the last one's."""
    return 2 * config.max_num_batched_tokens * config.model_config.hidden_size * itemsize if config.mtp else 0


def _graphs(config: EngineConfig, itemsize: int, largest: int) -> int:
    """Logits of every captured batch size, and the activations of the largest, whose memory the others share.

    Where a layer drafts, hidden states of every size as well; each of its guesses has graphs of its own, which keep
    their hidden states, and take their logits' room from the same pool.
    """
    if config.enforce_eager or config.device != "npu":
        return 0
    rows = sum(graph_sizes(config.max_num_seqs, config.max_sampled_tokens))
    model, guesses = config.model_config, config.speculation.num_tokens if config.speculation and config.mtp else 0
    kept = rows * itemsize * (model.vocab_size + (model.hidden_size * (1 + 2 * guesses) if guesses else 0))
    return (-(-(kept + largest) // _SEGMENT + 1) + guesses * -(-largest // _SEGMENT)) * _SEGMENT


def _peak(memory: Any, device: torch.device, work: Callable[[], object]) -> Activations:
    """What the allocator held at most while some work ran, beyond what it held before."""
    memory.synchronize(device)
    memory.empty_cache()
    allocated, reserved = memory.memory_allocated(device), memory.memory_reserved(device)
    memory.reset_peak_memory_stats(device)
    work()
    memory.synchronize(device)
    found = memory.max_memory_allocated(device) - allocated, memory.max_memory_reserved(device) - reserved
    memory.empty_cache()
    return Activations(*found)


def _run(
    model: CausalLM,
    attention: StepAttention,
    rows: list[SequenceSlice],
    config: EngineConfig,
    device: torch.device,
    place: Place,
) -> Tensor:
    with torch.inference_mode():
        total = sum(row.num_tokens for row in rows)
        positions = torch.cat([torch.arange(row.start, row.context_len) for row in rows]).to(device)
        if place.stage:
            shape = (total, config.model_config.hidden_size)
            given = torch.zeros(shape, dtype=getattr(torch, config.dtype), device=device)
        else:
            given = torch.zeros(total, dtype=torch.long, device=device)
        layers = place.layers(config.model_config.num_hidden_layers)
        context = ForwardContext(attention, attention.prepare(rows), layers.start, (total,) * place.split.dp)
        hidden: Tensor = model(given, positions, context)
        if config.mtp:
            require_mtp(model).predict_further(hidden, given, positions, context)
        return model.compute_logits(hidden[: len(rows)]) if place.is_last_stage else hidden


def _sample(sampler: Sampler, logits: Tensor) -> None:
    with torch.inference_mode():
        sequences = [
            Sequence(
                index=0,
                token_ids=[0],
                num_prompt_tokens=1,
                params=_WORST,
                max_tokens=1,
                seed=number,
                output=CompletionOutput(0),
            )
            for number in range(len(logits))
        ]
        sampler.sample(logits, sequences, [()] * len(logits))
