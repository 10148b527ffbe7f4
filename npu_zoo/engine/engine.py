"""The native engine: scheduler, runner, sampler and detokeniser behind the engine's interface."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Sequence as SequenceOf
from typing import Any

from torch import Tensor

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import (
    CompletionOutput,
    Engine,
    EngineStats,
    FinishReason,
    Logprob,
    Progress,
    RequestMetrics,
    RequestOutput,
)
from npu_zoo.core.errors import EngineError, UsageError
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine.block_manager import BlockManager, KVManager, SlotManager
from npu_zoo.engine.detokenizer import IncrementalDetokenizer
from npu_zoo.engine.executor import create_runner
from npu_zoo.engine.guidance import Guide
from npu_zoo.engine.prompt_scores import PromptScores
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.engine.replicas import ReplicatedKV
from npu_zoo.engine.runner import ModelRunner
from npu_zoo.engine.sampler import Sampler, SamplingState, TokenLogprobs
from npu_zoo.engine.scheduler import ScheduledRow, Scheduler
from npu_zoo.engine.sequence import Request, Sequence
from npu_zoo.engine.speculation.proposer import StepResult
from npu_zoo.engine.speculation.speculator import create_speculator
from npu_zoo.engine.speculation.verification import count_kept, positions
from npu_zoo.engine.step import step_rows

_STALE_DEADLINES = 64
MAX_TIME = "max_time"
"""The stop reason of a completion that its request's time limit ended."""


class NativeEngine(Engine):
    """Runs one model in this process."""

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        self.config = config
        self.prompts = PromptEncoder(config)
        self.tokenizer = self.prompts.tokenizer
        self.runner = create_runner(config, progress)
        self.kv = create_kv_manager(config, self.runner)
        self.scheduler = Scheduler(
            self.kv,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_chunked_prefill=config.enable_chunked_prefill,
        )
        self.sampler = Sampler(self.runner.kernels.top_k_top_p)
        self.speculator = create_speculator(config, self.runner, self.kv)
        self.max_model_len = self.prompts.max_model_len = self.runner.cache.max_model_len
        self._stop_ids = self.prompts.stop_token_ids
        self._requests: dict[str, Request] = {}
        self._owner: dict[int, Request] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._limited: dict[int, Request] = {}
        self._shut_down = False

    def add_request(
        self,
        request_id: str,
        prompt: str | SequenceOf[int],
        sampling_params: SamplingParams,
        *,
        add_special_tokens: bool = True,
        priority: int = 0,
        max_time: float | None = None,
    ) -> None:
        """See :meth:`Engine.add_request`."""
        if self._shut_down:
            raise EngineError("the engine was shut down and takes no more requests; start another one")
        if request_id in self._requests:
            raise UsageError(f"request id '{request_id}' is in use by an unfinished request")
        if max_time is not None and not max_time > 0:
            raise UsageError(f"max_time={max_time!r} is not a number of seconds above 0")
        token_ids = self.prompts.encode(prompt, add_special_tokens=add_special_tokens)
        metrics = RequestMetrics(arrival_time=time.monotonic())
        sequences = [self._sequence(index, token_ids, sampling_params, priority) for index in range(sampling_params.n)]
        text = prompt if isinstance(prompt, str) else None
        opened = self.prompts.ends_in_reasoning(token_ids)
        request = Request(request_id, text, token_ids, sampling_params, sequences, metrics, opened)
        self._requests[request_id] = request
        if max_time is not None:
            self._limit(request, metrics.arrival_time + max_time)
        for sequence in sequences:
            sequence.form_start = None if opened else len(token_ids)
            self._owner[sequence.number] = request
            self.scheduler.add(sequence)

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """See :meth:`Engine.abort_request`."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._end(request, "abort")
        return self._report(request)

    def has_unfinished_requests(self) -> bool:
        """See :meth:`Engine.has_unfinished_requests`."""
        return self.scheduler.has_work()

    def step(self) -> list[RequestOutput]:
        """See :meth:`Engine.step`."""
        return [*self._end_overdue(), *self._compute_step()]

    def _compute_step(self) -> list[RequestOutput]:
        drafts = self.speculator.begin_step(self.scheduler.running) if self.speculator else None
        rows = self.scheduler.schedule(drafts)
        if not rows:
            if self.scheduler.has_work():
                raise EngineError("the scheduler found nothing to run while requests wait")
            return []
        self._note_scheduled(rows)
        step = step_rows(rows)
        logits, prompts = self.runner.execute(step)
        for row, hidden in zip((r for r, s in zip(rows, step, strict=True) if s.wants_prompt), prompts, strict=True):
            self._score_prompt(row, hidden)
        self.kv.settle()
        for row in rows:
            # A sequence that got no token yet must find one to compute, should the step be interrupted before it does.
            row.sequence.num_computed_tokens = row.start + row.num_known - row.samples
        return self._sample(logits, rows)

    def render_chat(self, messages: SequenceOf[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """See :meth:`Engine.render_chat`."""
        return self.prompts.render_chat(messages, add_generation_prompt=add_generation_prompt)

    def render_fim(self, prefix: str, suffix: str) -> list[int]:
        """See :meth:`Engine.render_fim`."""
        return self.prompts.render_fim(prefix, suffix)

    def stats(self) -> EngineStats:
        """See :meth:`Engine.stats`."""
        speculator = self.speculator
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=self.scheduler.num_waiting,
            kv_cache_usage=self.kv.usage,
            prefix_cache_queries=self.scheduler.prefix_queries,
            prefix_cache_hits=self.scheduler.prefix_hits,
            num_preemptions=self.scheduler.num_preemptions,
            num_drafts=speculator.num_drafts if speculator else 0,
            num_draft_tokens=speculator.num_draft_tokens if speculator else 0,
            num_accepted_tokens=speculator.num_accepted_tokens if speculator else 0,
        )

    def explain(self) -> dict[str, Any]:
        """See :meth:`Engine.explain`."""
        cache, attention = self.runner.cache, self.config.attention_choice
        activations, packed = self.runner.activations, self.runner.packed_weights
        return {
            "engine": self.config.engine,
            "device": str(self.runner.device),
            "attention": {"backend": attention.backend, "block_size": attention.block_size, "reason": attention.reason},
            "kernels": {choice.operation: choice.kernel for choice in self.config.kernels},
            "decode": self.runner.decode_form,
            "parameter_bytes": self.runner.parameter_bytes,
            "packed_weights": {"file": packed.file and str(packed.file), "remark": packed.remark},
            "activation_bytes": activations.allocated if activations else None,
            "reserved_bytes": activations.reserved if activations else None,
            "kv_cache_bytes": cache.num_bytes,
            "kv_cache_tokens": cache.num_tokens * self.config.data_parallel_size,
            "max_model_len": cache.max_model_len,
            "speculation": self.speculator.explain() if self.speculator else None,
            "master_port": self.runner.master_port,
            "ranks": self.runner.report() if self.config.world_size > 1 else [],
        }

    def shutdown(self) -> None:
        """See :meth:`Engine.shutdown`."""
        for request_id in list(self._requests):
            self.abort_request(request_id)
        self._shut_down = True
        runner = self.__dict__.pop("runner", None)
        if runner is not None:
            runner.shutdown()

    def _sample(self, logits: Tensor, rows: list[ScheduledRow]) -> list[RequestOutput]:
        """Draw the next tokens of the rows that sample, and report the requests that they belong to."""
        sampling = [row for row in rows if row.samples]
        touched = {id(owner): owner for owner in (self._owner[row.sequence.number] for row in sampling)}
        new_tokens = self._draw(logits, sampling)
        if self.speculator:
            given = dict(zip(map(id, sampling), new_tokens, strict=True))
            self.speculator.end_step([StepResult(row, given.get(id(row), ())) for row in rows])
        return [self._report(request) for request in touched.values()]

    def _draw(self, logits: Tensor, rows: list[ScheduledRow]) -> list[tuple[int, ...]]:
        """Draw the next tokens of rows, and give each sequence what stands of them."""
        if not rows:
            return []
        drawn_for = [position for row in rows for position in positions(row)]
        sampled = self.sampler.sample(logits, drawn_for, [self._held_back(position) for position in drawn_for])
        found = zip(sampled.token_ids, sampled.logprobs, strict=True)
        return [self._accept(row, list(itertools.islice(found, 1 + len(row.drafts)))) for row in rows]

    def _accept(self, row: ScheduledRow, drawn: list[tuple[int, TokenLogprobs | None]]) -> tuple[int, ...]:
        """Give a sequence those drawn tokens that follow right drafts, as far as it goes on."""
        sequence, before = row.sequence, row.sequence.num_tokens
        for token_id, logprobs in drawn[: count_kept(row.drafts, [token_id for token_id, _ in drawn])]:
            self._append(sequence, token_id, logprobs)
            if sequence.finished:
                break
        new_tokens = tuple(sequence.token_ids[before:])
        if row.drafts:
            self.scheduler.keep_accepted(row)
            metrics = self._owner[sequence.number].metrics
            metrics.drafts += 1
            metrics.draft_tokens += len(row.drafts)
            metrics.accepted_tokens += len(new_tokens) - 1
        if sequence.finished:
            self._retire(sequence)
        return new_tokens

    def _note_scheduled(self, rows: list[ScheduledRow]) -> None:
        for metrics in (self._owner[row.sequence.number].metrics for row in rows):
            if metrics.scheduled_time is None:
                metrics.scheduled_time = time.monotonic()

    def _limit(self, request: Request, deadline: float) -> None:
        """Remember when a request is to end; those that have ended are forgotten before they outnumber the others."""
        self._limited[request.number] = request
        heapq.heappush(self._deadlines, (deadline, request.number))
        if len(self._deadlines) > 2 * len(self._limited) + _STALE_DEADLINES:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._limited]
            heapq.heapify(self._deadlines)

    def _end_overdue(self) -> list[RequestOutput]:
        """End the requests whose time is over, as they are; their outputs are reported once more."""
        ended = []
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            request = self._limited.get(heapq.heappop(self._deadlines)[1])
            if request is not None:
                self._end(request, "length", MAX_TIME)
                ended.append(self._report(request))
        return ended

    def _end(self, request: Request, reason: FinishReason, stop_reason: str | None = None) -> None:
        # A step that was interrupted may have finished a sequence without retiring it.
        for sequence in request.sequences:
            if sequence.number in self._owner:
                if not sequence.finished:
                    sequence.finish(reason, stop_reason)
                    self._flush_text(sequence)
                self._retire(sequence)

    def _sequence(self, index: int, token_ids: list[int], params: SamplingParams, priority: int) -> Sequence:
        room = self.max_model_len - len(token_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        wants_logprobs, scored = params.logprobs is not None, params.prompt_logprobs is not None and index == 0
        output = CompletionOutput(
            index, logprobs=[] if wants_logprobs else None, cumulative_logprob=0.0 if wants_logprobs else None
        )
        return Sequence(
            index=index,
            token_ids=list(token_ids),
            num_prompt_tokens=len(token_ids),
            params=params,
            max_tokens=max_tokens,
            seed=self.config.seed if params.seed is None else params.seed,
            priority=priority,
            output=output,
            detokenizer=self._detokenizer(params),
            guide=self._guide(params),
            prompt_scores=PromptScores(params, len(token_ids)) if scored else None,
        )

    def _detokenizer(self, params: SamplingParams) -> IncrementalDetokenizer | None:
        if self.tokenizer is None:
            if params.stop_strings:
                raise UsageError("stop strings need the tokenizer, and skip_tokenizer_init is set; use stop_token_ids")
            return None
        return IncrementalDetokenizer(
            self.tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            stop_strings=params.stop_strings,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def _guide(self, params: SamplingParams) -> Guide | None:
        form = params.structured_outputs
        return None if form is None else self.prompts.guides.make(form)

    def _held_back(self, state: SamplingState) -> tuple[int, ...]:
        """Ids that must not be drawn while ``min_tokens`` is not reached."""
        params = state.params
        if state.num_output_tokens >= params.min_tokens:
            return ()
        return tuple(self._stop_ids | frozenset(params.stop_token_ids))

    def _append(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> None:
        output = sequence.output
        sequence.token_ids.append(token_id)
        sequence.num_computed_tokens = sequence.num_tokens - 1
        output.token_ids.append(token_id)
        if logprobs is not None and output.logprobs is not None:
            output.logprobs.append(self._describe(logprobs))
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + logprobs.chosen[1]
        self._check_stop(sequence, token_id)
        if sequence.guide is not None:
            self._follow(sequence, sequence.guide)
        request = self._owner[sequence.number]
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = time.monotonic()
            request.metrics.cached_tokens = request.sequences[0].num_cached_tokens

    def _check_stop(self, sequence: Sequence, token_id: int) -> None:
        params, early = sequence.params, sequence.num_output_tokens < sequence.params.min_tokens
        detokenizer = sequence.detokenizer
        ends_text = token_id in self._stop_ids and not params.ignore_eos
        if detokenizer is not None and not (ends_text and params.skip_special_tokens):
            detokenizer.append(token_id)
        if not early and ends_text:
            sequence.finish("stop")
        elif not early and token_id in params.stop_token_ids:
            sequence.finish("stop", token_id)
        elif detokenizer is not None and detokenizer.stopped_on is not None:
            sequence.finish("stop", detokenizer.stopped_on)
        elif sequence.num_output_tokens >= sequence.max_tokens:
            sequence.finish("length")
        if sequence.finished:
            self._flush_text(sequence)
        elif detokenizer is not None:
            sequence.output.text = detokenizer.text

    def _follow(self, sequence: Sequence, guide: Guide) -> None:
        """Lead a sequence on in its form, which begins after its reasoning; end it where nothing can follow."""
        if sequence.form_start is None:
            sequence.form_start = self._end_of_reasoning(sequence)
            return
        complete = guide.advance(sequence.token_ids, sequence.form_start)
        if guide.error:
            sequence.finish("error", f"structured_outputs cannot be kept: {guide.error}")
        elif complete and sequence.output.finish_reason in (None, "length"):
            sequence.finish("stop")
            self._flush_text(sequence)

    def _end_of_reasoning(self, sequence: Sequence) -> int | None:
        """The number of tokens up to the end of the reasoning; None as long as it goes on."""
        if self.config.reasoning is None or self.tokenizer is None:
            return sequence.num_tokens
        marker = self.config.reasoning.end
        # Of the tokens, for the text may be held back for a stop string; a token has a byte of the marker at least.
        tail = sequence.token_ids[max(sequence.num_prompt_tokens, sequence.num_tokens - len(marker.encode()) - 1) :]
        found = marker in self.tokenizer.decode(tail, skip_special_tokens=False, continues=True)
        return sequence.num_tokens if found else None

    def _flush_text(self, sequence: Sequence) -> None:
        if sequence.detokenizer is not None:
            sequence.detokenizer.finish()
            sequence.output.text = sequence.detokenizer.text

    def _retire(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        request = self._owner.pop(sequence.number)
        request.metrics.preemptions += sequence.preemptions
        if request.finished:
            request.metrics.finished_time = time.monotonic()
            del self._requests[request.request_id]
            self._limited.pop(request.number, None)

    def _report(self, request: Request) -> RequestOutput:
        scores = request.sequences[0].prompt_scores
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[sequence.output for sequence in request.sequences],
            finished=request.finished,
            metrics=request.metrics,
            prompt_logprobs=scores.logprobs if scores else None,
            reasoning_open=request.reasoning_open,
            prompt_logits=scores.logits() if scores and request.finished else None,
        )

    def _score_prompt(self, row: ScheduledRow, hidden: Tensor) -> None:
        """Tell what a row predicts of its prompt."""
        sequence = row.sequence
        if sequence.prompt_scores is not None:
            compute = self.runner.compute_logits
            sequence.prompt_scores.add(hidden, row.start, sequence.token_ids, compute, self._describe)

    def _describe(self, logprobs: TokenLogprobs) -> dict[int, Logprob]:
        token_id, logprob, rank = logprobs.chosen
        entries = {token_id: Logprob(logprob, rank, self._token_text(token_id))}
        for place, (top_id, top_logprob) in enumerate(logprobs.top, start=1):
            entries.setdefault(top_id, Logprob(top_logprob, place, self._token_text(top_id)))
        return entries

    def _token_text(self, token_id: int) -> str:
        return self.tokenizer.token_text(token_id) if self.tokenizer else ""


def create_kv_manager(config: EngineConfig, runner: ModelRunner) -> KVManager:
    """Blocks for a paged cache, slots for a contiguous one, in each replica of the attention."""
    cache = runner.cache

    def create() -> KVManager:
        if config.attention == "flash":
            return SlotManager(cache.num_slots, cache.slot_size)
        return BlockManager(
            cache.num_slots,
            cache.slot_size,
            enable_prefix_caching=config.enable_prefix_caching,
            share_within_step=config.pipeline_parallel_size == 1,
        )

    managers = [create() for _ in range(config.data_parallel_size)]
    return managers[0] if len(managers) == 1 else ReplicatedKV(managers)
