"""The native engine: scheduler, runner, sampler and detokeniser behind the engine's interface."""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

from torch import Tensor

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import CompletionOutput, Engine, Logprob, Progress, RequestMetrics, RequestOutput
from npu_zoo.core.errors import EngineError, PromptError, UsageError
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine.block_manager import BlockManager, KVManager, SlotManager
from npu_zoo.engine.detokenizer import IncrementalDetokenizer
from npu_zoo.engine.executor import create_runner
from npu_zoo.engine.replicas import ReplicatedKV
from npu_zoo.engine.runner import ModelRunner
from npu_zoo.engine.sampler import Sampler, TokenLogprobs, top_logprobs
from npu_zoo.engine.scheduler import ScheduledRow, Scheduler
from npu_zoo.engine.sequence import Request, Sequence
from npu_zoo.engine.step import step_rows
from npu_zoo.engine.tokenizer import Tokenizer, checked_messages

_REASONING_TAIL = 16  # tokens of a prompt in which a marker and white space behind it are looked for
_PROMPT_LOGPROB_ROWS = 256  # positions at a time, so that long prompts do not hold [tokens, vocab_size] at once


class NativeEngine(Engine):
    """Runs one model in this process."""

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        self.config = config
        self.tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config)
        self.runner = create_runner(config, progress)
        self.kv = create_kv_manager(config, self.runner)
        self.scheduler = Scheduler(
            self.kv,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_chunked_prefill=config.enable_chunked_prefill,
        )
        self.sampler = Sampler(self.runner.kernels.top_k_top_p)
        self.max_model_len = self.runner.cache.max_model_len
        self._stop_ids = frozenset(config.stop_token_ids) | frozenset(
            self.tokenizer.eos_token_ids if self.tokenizer else ()
        )
        self._requests: dict[str, Request] = {}
        self._owner: dict[int, Request] = {}
        self._shut_down = False

    def add_request(
        self,
        request_id: str,
        prompt: str | SequenceOf[int],
        sampling_params: SamplingParams,
        *,
        add_special_tokens: bool = True,
    ) -> None:
        """See :meth:`Engine.add_request`."""
        if self._shut_down:
            raise EngineError("the engine was shut down and takes no more requests; start another one")
        if request_id in self._requests:
            raise UsageError(f"request id '{request_id}' is in use by an unfinished request")
        token_ids = self._prompt_token_ids(prompt, add_special_tokens=add_special_tokens)
        metrics = RequestMetrics(arrival_time=time.monotonic())
        sequences = [self._sequence(index, token_ids, sampling_params) for index in range(sampling_params.n)]
        text = prompt if isinstance(prompt, str) else None
        opened = self._ends_in_reasoning(token_ids)
        request = Request(request_id, text, token_ids, sampling_params, sequences, metrics, opened)
        self._requests[request_id] = request
        for sequence in sequences:
            self._owner[sequence.number] = request
            self.scheduler.add(sequence)

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """See :meth:`Engine.abort_request`."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        # A step that was interrupted may have finished a sequence without retiring it.
        for sequence in request.sequences:
            if sequence.number in self._owner:
                if not sequence.finished:
                    sequence.finish("abort")
                    self._flush_text(sequence)
                self._retire(sequence)
        return self._report(request)

    def has_unfinished_requests(self) -> bool:
        """See :meth:`Engine.has_unfinished_requests`."""
        return self.scheduler.has_work()

    def step(self) -> list[RequestOutput]:
        """See :meth:`Engine.step`."""
        rows = self.scheduler.schedule()
        if not rows:
            if self.scheduler.has_work():
                raise EngineError("the scheduler found nothing to run while requests wait")
            return []
        step = step_rows(rows)
        logits, prompts = self.runner.execute(step)
        for row, hidden in zip((r for r, s in zip(rows, step, strict=True) if s.wants_prompt), prompts, strict=True):
            self._add_prompt_logprobs(row, hidden)
        self.kv.settle()
        sampling = [row.sequence for row in rows if row.samples]
        for row in rows:
            # A sequence that got no token yet must find one to compute, should the step be interrupted before it does.
            row.sequence.num_computed_tokens = row.start + row.num_tokens - row.samples
        return self._sample(logits, sampling) if sampling else []

    def render_chat(self, messages: SequenceOf[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """See :meth:`Engine.render_chat`."""
        tokenizer = self._need_tokenizer("chat")
        if self.config.reasoning:
            messages = [dict(m) for m in self.config.reasoning.without_reasoning(checked_messages(messages))]
        return tokenizer.encode_chat(messages, add_generation_prompt=add_generation_prompt)

    def render_fim(self, prefix: str, suffix: str) -> list[int]:
        """See :meth:`Engine.render_fim`."""
        if self.config.fim is None:
            raise PromptError(f"{self.config.family} has no fill-in-the-middle format")
        return self._need_tokenizer("fill in the middle").fim_prompt(prefix, suffix, self.config.fim)

    def explain(self) -> dict[str, Any]:
        """See :meth:`Engine.explain`."""
        cache, attention = self.runner.cache, self.config.attention_choice
        activations = self.runner.activations
        return {
            "engine": self.config.engine,
            "device": str(self.runner.device),
            "attention": {"backend": attention.backend, "block_size": attention.block_size, "reason": attention.reason},
            "kernels": {choice.operation: choice.kernel for choice in self.config.kernels},
            "parameter_bytes": self.runner.parameter_bytes,
            "activation_bytes": activations.allocated if activations else None,
            "reserved_bytes": activations.reserved if activations else None,
            "kv_cache_bytes": cache.num_bytes,
            "kv_cache_tokens": cache.num_tokens * self.config.data_parallel_size,
            "max_model_len": cache.max_model_len,
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

    def _sample(self, logits: Tensor, sequences: list[Sequence]) -> list[RequestOutput]:
        """Draw the next token of each sequence, and report the requests that they belong to."""
        held_back = [self._held_back(sequence) for sequence in sequences]
        sampled = self.sampler.sample(logits, sequences, held_back)
        touched = {id(owner): owner for owner in (self._owner[s.number] for s in sequences)}
        for sequence, token_id, logprobs in zip(sequences, sampled.token_ids, sampled.logprobs, strict=True):
            self._append(sequence, token_id, logprobs)
            if sequence.finished:
                self._retire(sequence)
        return [self._report(request) for request in touched.values()]

    def _ends_in_reasoning(self, prompt: list[int]) -> bool:
        if self.tokenizer is None or self.config.reasoning is None:
            return False
        tail = self.tokenizer.decode(prompt[-_REASONING_TAIL:], skip_special_tokens=False)
        return tail.rstrip().endswith(self.config.reasoning.start)

    def _need_tokenizer(self, purpose: str) -> Tokenizer:
        if self.tokenizer is None:
            raise PromptError(f"{purpose} needs the tokenizer, and skip_tokenizer_init is set; give token ids")
        return self.tokenizer

    def _prompt_token_ids(self, prompt: str | SequenceOf[int], *, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            tokenizer = self._need_tokenizer("a text prompt")
            token_ids = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        else:
            token_ids = _as_ids(prompt)
        if not token_ids:
            raise PromptError("the prompt is empty; give at least one token")
        size = self.config.model_config.vocab_size
        strange = [t for t in token_ids if not 0 <= t < size]
        if strange:
            raise PromptError(f"the prompt holds {strange[0]!r}, which is no token id; ids are 0 to {size - 1}")
        if len(token_ids) >= self.max_model_len:
            raise PromptError(
                f"the prompt has {len(token_ids)} tokens, and max_model_len={self.max_model_len} leaves room for "
                f"{self.max_model_len - 1} and one of output; {self._how_to_fit()}"
            )
        return token_ids

    def _how_to_fit(self) -> str:
        longest = self.config.model_config.context_length
        if self.max_model_len >= longest:
            return f"shorten it: {longest} is the model's own limit"
        return f"shorten it, or raise --max-model-len (the model's own limit is {longest})"

    def _sequence(self, index: int, token_ids: list[int], params: SamplingParams) -> Sequence:
        room = self.max_model_len - len(token_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        wants_logprobs = params.logprobs is not None
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
            output=output,
            detokenizer=self._detokenizer(params),
            prompt_logprobs=[] if params.prompt_logprobs is not None and index == 0 else None,
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

    def _held_back(self, sequence: Sequence) -> tuple[int, ...]:
        """Ids that must not be drawn while ``min_tokens`` is not reached."""
        params = sequence.params
        if sequence.num_output_tokens >= params.min_tokens:
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
        request = self._owner[sequence.number]
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = time.monotonic()
            request.metrics.cached_tokens = sequence.num_cached_tokens

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

    def _report(self, request: Request) -> RequestOutput:
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[sequence.output for sequence in request.sequences],
            finished=request.finished,
            metrics=request.metrics,
            prompt_logprobs=request.sequences[0].prompt_logprobs,
            reasoning_open=request.reasoning_open,
        )

    def _describe(self, logprobs: TokenLogprobs) -> dict[int, Logprob]:
        token_id, logprob, rank = logprobs.chosen
        entries = {token_id: Logprob(logprob, rank, self._token_text(token_id))}
        for place, (top_id, top_logprob) in enumerate(logprobs.top, start=1):
            entries.setdefault(top_id, Logprob(top_logprob, place, self._token_text(top_id)))
        return entries

    def _token_text(self, token_id: int) -> str:
        return self.tokenizer.token_text(token_id) if self.tokenizer else ""

    def _add_prompt_logprobs(self, row: ScheduledRow, hidden: Tensor) -> None:
        """Append the log-probabilities of the prompt tokens that a row's positions predict."""
        sequence = row.sequence
        found = sequence.prompt_logprobs
        if found is None:
            return
        if not found:
            found.append(None)
        # A row that is computed again, after preemption or an interrupted step, has given some of them already.
        hidden = hidden[len(found) - 1 - row.start :]
        targets = sequence.token_ids[len(found) : min(row.start + row.num_tokens + 1, sequence.num_prompt_tokens)]
        wanted = sequence.params.prompt_logprobs or 0
        for first in range(0, len(targets), _PROMPT_LOGPROB_ROWS):
            chosen = targets[first : first + _PROMPT_LOGPROB_ROWS]
            logits = self.runner.compute_logits(hidden[first : first + len(chosen)])
            found.extend(self._describe(entry) for entry in top_logprobs(logits, chosen, [wanted] * len(chosen)))


def _as_ids(prompt: SequenceOf[int]) -> list[int]:
    """Token ids as plain integers, from whatever counts as one (NumPy's and torch's do)."""
    if isinstance(prompt, (bytes, bytearray)):
        raise PromptError("the prompt is of bytes; give text, or a list of token ids")
    ids: list[int] = []
    for token_id in prompt:
        if isinstance(token_id, bool) or not hasattr(token_id, "__index__"):
            raise PromptError(f"the prompt holds {token_id!r}, which is no token id; give text, or whole numbers")
        ids.append(operator.index(token_id))
    return ids


def load_tokenizer(config: EngineConfig) -> Tokenizer:
    """The tokenizer of a run's checkpoint, with the family's chat template as the fallback."""
    return Tokenizer(
        Path(config.weights),
        trust_remote_code=config.trust_remote_code,
        chat_template=config.prompt.chat_template if config.prompt else None,
        chat_template_adds_bos=bool(config.prompt and config.prompt.adds_bos),
    )


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
