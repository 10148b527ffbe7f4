"""One batch after another through an engine, with the time of every step."""

from __future__ import annotations

import random
import textwrap
import time
from collections.abc import Callable, Sequence

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import Engine, RequestOutput
from npu_zoo.core.errors import EngineError, NpuZooError, UsageError
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.evaluation.offline.cases import Case
from npu_zoo.evaluation.offline.results import Sample

OnStep = Callable[[int, int], None]
"""Called after a step with how many first tokens and how many tokens in all came of it."""


_SHORTAGES = ("out of memory", "allocate memory", "not enough memory")
_LETTERS = 160
"""Of an allocator's message that are shown."""


class CaseError(NpuZooError):
    """A case ran, and not as it was to run, so that its times are not those of the case."""


class PreemptedError(CaseError):
    """Room for keys and values did not last for the whole batch at once."""


class MemoryExhaustedError(CaseError):
    """There was no memory for what a step computes."""


class RandomPrompts:
    """Prompts of random ids, other ones for every case and round.

    Args:
        ids: that are drawn from.
        seed: the same seed gives the same prompts, whatever other cases there are.
    """

    def __init__(self, ids: Sequence[int], seed: int) -> None:
        self._ids, self._seed = ids, seed

    def draw(self, case: Case, number: int) -> list[list[int]]:
        """A batch of them, of which the warm-up has number 0."""
        generator = random.Random(f"{self._seed}/{tuple(case)}/{number}")
        return [generator.choices(self._ids, k=case.input) for _ in range(case.batch)]


def ordinary_ids(config: EngineConfig) -> list[int]:
    """Ids of a model's vocabulary that end no text and are no special tokens.

    Raises:
        UsageError: there is none.
    """
    encoder = PromptEncoder(config)
    tokenizer, size = encoder.tokenizer, config.model_config.vocab_size
    ids = range(size if tokenizer is None else min(size, tokenizer.vocab_size))
    found = [i for i in ids if i not in encoder.stop_token_ids and not (tokenizer and tokenizer.is_special(i))]
    if not found:
        raise UsageError(f"the vocabulary of {config.model} has special tokens alone, and prompts need others")
    return found


def run_batch(engine: Engine, prompts: Sequence[Sequence[int]], output: int, on_step: OnStep) -> Sample:
    """Generate so many tokens for each prompt, all prompts at once; what an exception leaves is aborted.

    Raises:
        CaseError: they did not run together, there was no memory for a step, or a cache had part of them.
        EngineError: an output has another length.
    """
    batch = _Batch(engine, len(prompts))
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    try:
        for request_id, prompt in zip(batch.request_ids, prompts, strict=True):
            engine.add_request(request_id, list(prompt), params)
        while engine.has_unfinished_requests():
            on_step(*batch.step())
    except BaseException as error:
        for request_id in batch.request_ids:
            engine.abort_request(request_id)
        if _is_out_of_memory(error):
            raise _exhausted(error) from None
        raise
    return batch.sample(output)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; devices' and the CPU's allocators of torch say so in a RuntimeError."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(s in text for s in _SHORTAGES))


def _exhausted(error: BaseException) -> MemoryExhaustedError:
    told = textwrap.shorten(str(error), _LETTERS, placeholder=" …") or type(error).__name__
    return MemoryExhaustedError(
        f"a step ran out of memory ({told}); take a smaller batch, or give a smaller --max-num-batched-tokens or "
        "--kv-cache-memory"
    )


class _Batch:
    """What has come of a batch so far; its time starts with it."""

    def __init__(self, engine: Engine, size: int) -> None:
        self.request_ids = [f"bench-{number}" for number in range(size)]
        self._engine = engine
        self._latest: dict[str, RequestOutput] = {}
        self._counts = dict.fromkeys(self.request_ids, 0)
        self._first_tokens: dict[str, float] = {}
        self._steps: list[float] = []
        self._tokens: list[int] = []
        self._start = time.perf_counter()

    def step(self) -> tuple[int, int]:
        """Run one, and count its first tokens and all of its tokens."""
        outputs = self._engine.step()
        moment = time.perf_counter() - self._start
        started, tokens = len(self._first_tokens), 0
        for output in outputs:
            self._latest[output.request_id] = output
            count = len(output.outputs[0].token_ids)
            if count:
                self._first_tokens.setdefault(output.request_id, moment)
            tokens += count - self._counts[output.request_id]
            self._counts[output.request_id] = count
        self._steps.append(moment)
        self._tokens.append(tokens)
        return len(self._first_tokens) - started, tokens

    def sample(self, output: int) -> Sample:
        """The times, once all requests have finished as they were to."""
        wrong = [count for count in self._counts.values() if count != output]
        if wrong:
            raise EngineError(f"the engine gave {wrong[0]} tokens where {output} were asked for with ignore_eos")
        metrics = [self._latest[request_id].metrics for request_id in self.request_ids]
        _require_together(sum(m.preemptions for m in metrics), sum(m.cached_tokens for m in metrics))
        first_tokens = tuple(self._first_tokens[request_id] for request_id in self.request_ids)
        return Sample(
            first_tokens=first_tokens,
            steps=tuple(self._steps),
            tokens=tuple(self._tokens),
            drafts=sum(m.drafts for m in metrics),
            draft_tokens=sum(m.draft_tokens for m in metrics),
            accepted_tokens=sum(m.accepted_tokens for m in metrics),
        )


def _require_together(preemptions: int, cached_tokens: int) -> None:
    if preemptions:
        raise PreemptedError(
            f"{preemptions} sequence(s) lost their room and were recomputed, so that the batch did not run at once; "
            "take a smaller batch, or give --kv-cache-memory"
        )
    if cached_tokens:
        raise CaseError(
            f"{cached_tokens} prompt tokens came from the prefix cache and were not computed; give "
            "--no-enable-prefix-caching, or a larger --block-size"
        )
