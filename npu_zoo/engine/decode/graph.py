"""Decode from captured graphs: a step of single tokens, and of drafts, is one launch instead of some hundred.

A graph is captured for each of some batch sizes when a step first needs it; a smaller batch is padded to the next one
with rows in a block of their own, a slot each. Lengths of sequences are host values of the attention operators,
which torch_npu's graphs update before each replay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_zoo.core.attention import AttentionMetadata, GraphAttention, SequenceSlice
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.parallel import Place
from npu_zoo.engine.decode.path import DecodePath
from npu_zoo.nn.context import ForwardContext
from npu_zoo.nn.model import CausalLM

_COARSE = 32


def graph_sizes(max_num_seqs: int, most: int | None = None) -> list[int]:
    """Batch sizes that graphs are captured for: 1, 2, 4, 8, then every eighth, and the largest batch.

    Args:
        most: tokens of the largest batch with the drafts of its sequences; from one to the other every 32nd is taken.
    """
    most = most or max_num_seqs
    sizes = {1, 2, 4, *range(8, max_num_seqs + 1, 8), max_num_seqs, *range(_COARSE, most, _COARSE), most}
    return sorted(size for size in sizes if size <= max_num_seqs or size % _COARSE == 0 or size == most)


@dataclass
class DecodeGraph:
    """One batch size.

    Attributes:
        staged: [2, batch] ids and positions on the host, pinned; ``inputs`` are those on the device.
        hidden: [batch, hidden_size] that are given, such as those of the stage before; None where ids alone are.
        last: [batch, hidden_size], what the head takes, where drafts are made of it; a replay writes it.
        graph: None until it is captured.
        output: [batch, vocab_size] logits, or [batch, hidden_size] for the next stage, which a replay writes.
    """

    staged: Tensor
    inputs: Tensor
    metadata: AttentionMetadata
    hidden: Tensor | None = None
    last: Tensor | None = None
    graph: Any = None
    output: Tensor | None = None


@dataclass(frozen=True)
class GraphSetup:
    """What graphs are captured of.

    Attributes:
        model: with its weights loaded.
        attention: its backend.
        place: of this rank.
        config: gives the largest batch.
        max_model_len: the longest sequence.
    """

    model: CausalLM
    attention: GraphAttention
    place: Place
    config: EngineConfig
    max_model_len: int
    device: torch.device


class CapturedGraphs(ABC):
    """Graphs of single tokens by batch size, captured as they are needed."""

    def __init__(self, setup: GraphSetup) -> None:
        config = setup.config
        self.setup = setup
        self.sizes = graph_sizes(config.max_num_seqs, config.max_sampled_tokens)
        self._attention = setup.attention
        self._graphs: dict[int, DecodeGraph] = {}
        self._npu: Any = torch.get_device_module(setup.device)
        self._pool: Any = None

    def _entry(self, count: int) -> DecodeGraph:
        """The graph that takes so many rows."""
        size = next(size for size in self.sizes if size >= count)
        return self._graphs.get(size) or self._allocate(size)

    def _stage(self, entry: DecodeGraph, token_ids: list[int], positions: list[int]) -> None:
        """Bring a step's ids and positions to the device, without waiting for it."""
        zeros = [0] * (entry.staged.shape[1] - len(positions))
        entry.staged.copy_(torch.tensor([token_ids + zeros, positions + zeros]))
        entry.inputs.copy_(entry.staged, non_blocking=True)

    def _replay(self, entry: DecodeGraph, rows: list[SequenceSlice]) -> tuple[Tensor, Tensor | None]:
        """A graph's output and ``last`` of rows whose inputs are staged; captures it before its first replay."""
        size = entry.staged.shape[1]
        padding = [SequenceSlice(place, 1, (self._attention.spare_slot,)) for place in range(size - len(rows))]
        update = self._attention.fill(entry.metadata, [*rows, *padding])
        if entry.output is None:
            self._capture(entry, size)
        entry.graph.update(cpu_update_input=[update])
        entry.graph.replay()
        assert entry.output is not None
        return entry.output[: len(rows)], None if entry.last is None else entry.last[: len(rows)]

    def _allocate(self, size: int) -> DecodeGraph:
        config, device = self.setup.config, self.setup.device
        staged = torch.zeros(2, size, dtype=torch.long).pin_memory()
        metadata = self._attention.graph_metadata(size, self.setup.max_model_len)
        shape, dtype = (size, config.model_config.hidden_size), getattr(torch, config.dtype)
        hidden = torch.zeros(shape, dtype=dtype, device=device) if self._takes_hidden else None
        self._graphs[size] = DecodeGraph(staged, staged.to(device), metadata, hidden)
        return self._graphs[size]

    def _capture(self, entry: DecodeGraph, size: int) -> None:
        place, config = self.setup.place, self.setup.config
        layers = place.layers(config.model_config.num_hidden_layers)
        tokens = (size,) * place.split.dp
        context = ForwardContext(self._attention, entry.metadata, layers.start, tokens, captured=True)
        self._forward(entry, context)  # what is computed once, such as rotary tables, stays outside of the graph
        entry.graph = self._npu.NPUGraph()
        self._pool = self._pool or self._npu.graph_pool_handle()
        with self._npu.graph(entry.graph, pool=self._pool, auto_dispatch_capture=True):
            hidden, entry.output = self._forward(entry, context)
        if config.mtp:
            entry.last = hidden

    @property
    @abstractmethod
    def _takes_hidden(self) -> bool:
        """Whether they are given hidden states."""

    @abstractmethod
    def _forward(self, entry: DecodeGraph, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """The hidden states that the head takes, and what a replay gives."""


class DecodeGraphs(CapturedGraphs, DecodePath):
    """The graphs of a rank's share of the model."""

    @property
    def form(self) -> str:
        """See :class:`DecodePath`."""
        return "captured graphs"

    def run(self, given: list[int] | Tensor, rows: list[SequenceSlice], largest: int) -> tuple[Tensor, Tensor | None]:
        """See :meth:`DecodePath.run`."""
        entry = self._entry(largest)
        token_ids = [0] * len(rows) if isinstance(given, Tensor) else given
        self._stage(entry, token_ids, [row.start for row in rows])
        if isinstance(given, Tensor) and entry.hidden is not None:
            entry.hidden[: len(given)].copy_(given)
        return self._replay(entry, rows)

    @property
    def _takes_hidden(self) -> bool:
        return self.setup.place.stage > 0

    def _forward(self, entry: DecodeGraph, context: ForwardContext) -> tuple[Tensor, Tensor]:
        model = self.setup.model
        given = entry.inputs[0] if entry.hidden is None else entry.hidden
        hidden: Tensor = model(given, entry.inputs[1], context)
        return hidden, model.compute_logits(hidden) if self.setup.place.is_last_stage else hidden
