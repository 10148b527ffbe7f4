"""The engine's interface and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]
Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done and what there is to do."""


@dataclass(frozen=True)
class Logprob:
    """A token's natural-log probability before sampling parameters, its rank (1 is the most likely), and its text."""

    logprob: float
    rank: int
    decoded_token: str = ""


@dataclass
class CompletionOutput:
    """One of a request's ``n`` completions, as far as it has come.

    Attributes:
        text: decoded output without stop string; never ends inside a character.
        logprobs: per output token, the most likely tokens and the chosen one; None unless asked for.
        finish_reason: ``stop`` at end of text or a stop, ``length`` at a limit, ``abort`` where it was called off,
            ``error`` where it could not go on, for the reason in ``stop_reason``.
        stop_reason: the stop string or token id that ended it, ``max_time`` where that limit did; None for end of text
            or the limit of tokens.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestMetrics:
    """Times in seconds on the monotonic clock, and what was saved.

    Attributes:
        cached_tokens: prompt tokens taken from the prefix cache by the first completion.
        preemptions: how often the request lost its blocks and was recomputed.
        drafts: how often guesses of next tokens were verified.
        draft_tokens, accepted_tokens: guesses in all, and how many of them were right.
        scheduled_time: when the first of it was computed; None where it still waits, or the engine does not tell.
    """

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    scheduled_time: float | None = None
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass
class RequestOutput:
    """A request's state after a step; ``finished`` once all completions are.

    Attributes:
        reasoning_open: whether the prompt ends inside the model's reasoning, so that the completions begin there; see
            :class:`~npu_zoo.core.model_config.ReasoningFormat`.
        prompt_logits: with ``SamplingParams.prompt_logits``, once the request has finished: a float32 array of
            [positions, vocab_size] for those from ``prompt_logprobs_start`` (1 at least) to the prompt's end, and one
            more that predicts the first output token. They are not sent to clients of a server.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    reasoning_open: bool = False
    prompt_logits: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class GenerationRequest:
    """A request as an engine takes it, with its prompt in token ids.

    Attributes:
        prompt: the text that the ids were made of, where there is one.
        priority: lower ones are admitted first and give their room up last (as in vLLM).
        max_time: seconds from arrival after which the output ends as it is; None for no limit.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling_params: SamplingParams
    prompt: str | None = None
    priority: int = 0
    max_time: float | None = None


@dataclass(frozen=True)
class EngineStats:
    """How an engine stands; counts are since its start.

    Attributes:
        num_running, num_waiting: sequences, one for each of a request's ``n`` completions.
        kv_cache_usage: share of the room for keys and values that is held by sequences, 0 to 1.
        prefix_cache_queries, prefix_cache_hits: tokens of admitted prompts, and how many of them the cache had.
        num_preemptions: sequences that lost their room and were recomputed.
        num_drafts: rows of steps that had drafts; each gave one token more than were accepted of them.
        num_draft_tokens, num_accepted_tokens: drafts that were verified, and how many of them were right.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class Engine(ABC):
    """Runs requests. Not thread-safe: one thread calls it.

    Its constructor takes ``(config: EngineConfig, progress: Progress | None)``; an EngineConfig is a request that was
    checked, so an engine never sees another.
    """

    config: EngineConfig

    @abstractmethod
    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams,
        *,
        add_special_tokens: bool = True,
        priority: int = 0,
        max_time: float | None = None,
    ) -> None:
        """Queue a request.

        Args:
            request_id: unique among unfinished requests.
            prompt: text, or token ids which are taken as they are.
            add_special_tokens: whether the tokenizer adds bos to a text; a rendered chat brings its own.
            priority, max_time: see :class:`GenerationRequest`.

        Raises:
            PromptError: empty, longer than ``max_model_len`` allows, or holding ids outside the vocabulary.
            UsageError: the id is in use.
        """

    @abstractmethod
    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request at once and free what it holds; None where no such request is unfinished."""

    @abstractmethod
    def step(self) -> list[RequestOutput]:
        """Run one step and return every request that got a token or ended in it."""

    @abstractmethod
    def has_unfinished_requests(self) -> bool:
        """Whether :meth:`step` has anything to do."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """How it stands now; cheap enough to be asked for after every step."""

    @abstractmethod
    def render_chat(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """The token ids of a conversation under the checkpoint's (or else the family's) chat template.

        Earlier answers go in without their reasoning, where the config has markers of it.

        Raises:
            PromptError: a message lacks role or content, or the template refuses the conversation.
        """

    @abstractmethod
    def render_fim(self, prefix: str, suffix: str) -> list[int]:
        """The token ids that ask for the text between a prefix and a suffix.

        Raises:
            PromptError: the family has no such format, or the checkpoint's tokenizer lacks its tokens.
        """

    @abstractmethod
    def explain(self) -> dict[str, Any]:
        """What was chosen at start and why: backend, kernels, blocks, memory. Plain data."""

    @abstractmethod
    def shutdown(self) -> None:
        """Release the device; the engine takes no more requests."""
