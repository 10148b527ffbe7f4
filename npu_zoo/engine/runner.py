"""The model on its device: computes the logits of a step, and drafts where the run has it draft."""

from __future__ import annotations

import functools
import socket
import time
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from npu_zoo.core.attention import AttentionMetadata
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import Progress
from npu_zoo.core.errors import EngineError
from npu_zoo.core.parallel import ALONE, Ranks
from npu_zoo.engine.activations import Activations, largest_step, measure_activations, slots_of
from npu_zoo.engine.decode.choice import create_decode_path
from npu_zoo.engine.decode.path import DecodePath
from npu_zoo.engine.device import free_memory, open_device, sharing_ranks
from npu_zoo.engine.host_memory import take_memory
from npu_zoo.engine.kv_cache import bytes_per_token, create_attention, plan_cache
from npu_zoo.engine.loading import load_model
from npu_zoo.engine.outputs import NO_OUTPUTS, Outputs, ResultShape, collect_outputs
from npu_zoo.engine.speculation.drafting import create_drafter
from npu_zoo.engine.speculation.steps import SeenStep, by_row
from npu_zoo.engine.step import MicroBatch, StepRow, largest_replica, micro_batches
from npu_zoo.nn.context import ForwardContext
from npu_zoo.nn.kernels.table import bind_kernels

_SPANS_KEPT = 64


class ModelRunner:
    """One rank's share of the model with its cache.

    Args:
        config: the run, which all ranks have alike.
        progress: told how far loading is.
        ranks: its place, and the groups that it talks in.

    Attributes:
        parameter_bytes: of its share of the weights.
        packed_weights: what was taken of an earlier run as kernels take it, or kept for later ones.
        decode_path: the prepared way to decode; None where every step goes through the model's code.
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
        loaded = load_model(config, self.kernels, self.device, ranks, progress)
        self.model, self.parameter_bytes, self.packed_weights = loaded.model, loaded.parameter_bytes, loaded.packed
        ranks.minimum(0)  # some load for longer than others may wait in one operation
        self.activations = self._measure_activations()
        free = max(0, free_memory(self.device) - (self.activations.reserved if self.activations else 0))
        self._token_bytes = bytes_per_token(config, self._place)
        largest = -ranks.minimum(-self._token_bytes)
        # The system takes what is mapped from a file for memory that it could give away.
        share = max(0, free // sharing_ranks(self.device, ranks) - loaded.packed.mapped_bytes)
        self.cache = plan_cache(config, largest, ranks.minimum(share))
        place, slots = self._place, (self.cache.num_slots, self.cache.slot_size)
        self.attention = create_attention(config, place, self.device, *slots)
        parts = self.model, self.attention
        self.decode_path = create_decode_path(config, *parts, place, self.cache.max_model_len, self.device)
        self.drafter = create_drafter(config, *parts, self.cache.slot_size, self.device, self.decode_path)
        if config.prefault_kv_cache and self.device.type == "cpu":
            told = functools.partial(progress, "taking memory for keys and values") if progress else None
            take_memory(self.attention.lazy_memory(), told)
        model = config.model_config
        self._shape = ResultShape(model.vocab_size, model.hidden_size, self.dtype, self.device)
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
        with torch.inference_mode(), self.packed_weights.in_use():
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
    def decode_form(self) -> str:
        """How steps of single tokens are computed: from graphs, as replays of recorded ones, or eagerly, and why."""
        return "eager" if self.decode_path is None else self.decode_path.form

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
            "kv_cache_bytes": self.cache.num_slots * self.cache.slot_size * self._token_bytes,
            "spans": list(self.spans),
        }

    def shutdown(self) -> None:
        """No step comes any more."""
        self.packed_weights.close()

    def _compute(self, rows: Sequence[StepRow], mine: Sequence[StepRow]) -> Outputs:
        if self.decode_path is not None and rows and all(row.decodes for row in rows):
            decoded = self._decode(self.decode_path, rows, mine)
            if decoded is not None:
                return decoded
        split = self._place.split
        parts = [self._run_batch(batch) for batch in micro_batches(rows, split.dp, split.pp)]
        if not self._place.is_last_stage:
            return NO_OUTPUTS
        return self._finish(parts[0] if len(parts) == 1 else torch.cat(parts), mine)  # a cat of one copies

    def _decode(self, path: DecodePath, rows: Sequence[StepRow], mine: Sequence[StepRow]) -> Outputs | None:
        """Take a decode step through this stage the prepared way; None where that does not take it."""
        token_ids = list(chain.from_iterable(row.token_ids for row in mine))
        slices = list(chain.from_iterable(row.slices for row in mine))
        x = self._stage_input(len(token_ids))
        begin, replicas = time.monotonic(), self._place.split.dp
        largest = len(slices) if replicas == 1 else largest_replica(rows, replicas)
        found = path.run(token_ids if x is None else x, slices, largest)
        if found is None:
            return None
        output, hidden = found
        self.spans.append((begin, time.monotonic()))
        if not self._place.is_last_stage:
            self._pass_on(output.clone())  # the next run overwrites it
            return NO_OUTPUTS
        if self.drafter is not None and hidden is not None:
            self._keep(mine, hidden.clone())
        return (output, []) if mine else NO_OUTPUTS

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

    def _measure_activations(self) -> Activations | None:
        """Memory beside weights and cache; None where nobody counts them, or the user has sized the cache."""
        config = self.config
        if self.device.type == "cpu" or config.kv_cache_memory is not None:
            return None
        size = min(config.max_model_len, config.max_num_batched_tokens)
        if config.attention == "paged":
            size = config.attention_choice.block_size or 1
        rows = largest_step(config, size)
        attention = create_attention(config, self._place, self.device, slots_of(rows), size)
        return measure_activations(
            self.model, self.kernels.top_k_top_p, attention, rows, config, self.device, self._place
        )
