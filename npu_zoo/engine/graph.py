"""Decode from captured graphs: a step of single tokens, and of drafts, is one launch instead of some hundred.

A graph is captured for each of some batch sizes when a step first needs it; a smaller batch is padded to the next one
with rows in a block of their own, a slot each. Lengths of sequences are host values of the attention operators,
which torch_npu's graphs update before each replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_zoo.core.attention import AttentionMetadata, GraphAttention, SequenceSlice
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.errors import EngineError
from npu_zoo.core.parallel import Place
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


class DecodeGraphs:
    """The graphs of a model, captured as they are needed.

    Args:
        model: with its weights loaded.
        attention: its backend.
        place: of this rank.
        config: gives the largest batch.
        max_model_len: the longest sequence.
    """

    def __init__(
        self,
        model: CausalLM,
        attention: GraphAttention,
        place: Place,
        config: EngineConfig,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self._model, self._attention, self._device = model, attention, device
        self._place, self._config = place, config
        self._max_model_len = max_model_len
        self.sizes = graph_sizes(config.max_num_seqs, config.max_sampled_tokens)
        self._graphs: dict[int, DecodeGraph] = {}
        self._npu: Any = torch.get_device_module(device)
        self._pool: Any = None
        self._replayed: DecodeGraph | None = None

    def run(self, given: list[int] | Tensor, positions: list[int], rows: list[SequenceSlice], largest: int) -> Tensor:
        """[B, vocab_size] logits of B rows of one token each, or what the next stage takes; the next run overwrites it.

        Args:
            given: the rows' tokens, or the [B, hidden_size] of the stage before.
            positions: of the rows.
            rows: where their keys and values lie.
            largest: the most rows that any replica of the attention has in this step.
        """
        entry = self._entry(largest)
        self._stage(entry, [0] * len(rows) if isinstance(given, Tensor) else given, positions)
        if isinstance(given, Tensor) and entry.hidden is not None:
            entry.hidden[: len(given)].copy_(given)
        return self._replay(entry, rows)

    def hidden(self, count: int) -> Tensor:
        """[count, hidden_size] of the last replay's first rows, where the run drafts with them; the next overwrites it.

        Raises:
            EngineError: the graphs keep none.
        """
        if self._replayed is None or self._replayed.last is None:
            raise EngineError("no graph was replayed that keeps hidden states; the run does not draft with them")
        return self._replayed.last[:count]

    def _entry(self, count: int) -> DecodeGraph:
        """The graph that takes so many rows."""
        size = next(size for size in self.sizes if size >= count)
        return self._graphs.get(size) or self._allocate(size)

    def _stage(self, entry: DecodeGraph, token_ids: list[int], positions: list[int]) -> None:
        """Bring a step's ids and positions to the device, without waiting for it."""
        zeros = [0] * (entry.staged.shape[1] - len(positions))
        entry.staged.copy_(torch.tensor([token_ids + zeros, positions + zeros]))
        entry.inputs.copy_(entry.staged, non_blocking=True)

    def _replay(self, entry: DecodeGraph, rows: list[SequenceSlice]) -> Tensor:
        """What a graph gives for rows whose inputs are staged; captures it before its first replay."""
        size = entry.staged.shape[1]
        padding = [SequenceSlice(place, 1, (self._attention.spare_slot,)) for place in range(size - len(rows))]
        update = self._attention.fill(entry.metadata, [*rows, *padding])
        if entry.output is None:
            self._capture(entry, size)
        entry.graph.update(cpu_update_input=[update])
        entry.graph.replay()
        assert entry.output is not None
        self._replayed = entry
        return entry.output[: len(rows)]

    @property
    def _takes_hidden(self) -> bool:
        """Whether it is given hidden states."""
        return self._place.stage > 0

    def _allocate(self, size: int) -> DecodeGraph:
        staged = torch.zeros(2, size, dtype=torch.long).pin_memory()
        metadata = self._attention.graph_metadata(size, self._max_model_len)
        config = self._config
        shape, dtype = (size, config.model_config.hidden_size), getattr(torch, config.dtype)
        hidden = torch.zeros(shape, dtype=dtype, device=self._device) if self._takes_hidden else None
        self._graphs[size] = DecodeGraph(staged, staged.to(self._device), metadata, hidden)
        return self._graphs[size]

    def _capture(self, entry: DecodeGraph, size: int) -> None:
        layers = self._place.layers(self._config.model_config.num_hidden_layers)
        tokens = (size,) * self._place.split.dp
        context = ForwardContext(self._attention, entry.metadata, layers.start, tokens, captured=True)
        self._forward(entry, context)  # what is computed once, such as rotary tables, stays outside of the graph
        entry.graph = self._npu.NPUGraph()
        self._pool = self._pool or self._npu.graph_pool_handle()
        with self._npu.graph(entry.graph, pool=self._pool, auto_dispatch_capture=True):
            hidden, entry.output = self._forward(entry, context)
        if self._config.mtp:
            entry.last = hidden

    def _forward(self, entry: DecodeGraph, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """The model's hidden states, and what a replay gives."""
        given = entry.inputs[0] if entry.hidden is None else entry.hidden
        hidden: Tensor = self._model(given, entry.inputs[1], context)
        return hidden, self._model.compute_logits(hidden) if self._place.is_last_stage else hidden
