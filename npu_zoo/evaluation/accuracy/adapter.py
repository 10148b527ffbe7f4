"""The harness's language model on our engine."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from npu_zoo.core.engine import Progress
from npu_zoo.core.errors import PromptLengthError, UsageError
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.evaluation.accuracy.generation import MAX_GEN_TOKS, generation_params
from npu_zoo.evaluation.accuracy.questions import Question, ask_all
from npu_zoo.evaluation.accuracy.scoring import Completion, LogitSink, Score
from npu_zoo.evaluation.accuracy.tasks import Logits, Responses

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from npu_zoo.engine.llm import LLM


class Window(NamedTuple):
    """A part of a text: the log-probability of its tokens, and how many these are."""

    logprob: float
    tokens: int


class EngineLM(TemplateLM):  # type: ignore[misc]
    """Answers the harness's requests; all of a call run in one continuous batch.

    Attributes:
        truncated: how many prompts lost their beginning, since they were longer than the model takes.

    Args:
        llm: the model; its engine serves nobody else meanwhile.
        progress: told how many requests of a call are done.
        responses: keeps answers, so that an interrupted run goes on.
        logits: where the logits of scored positions go.
        seed: of draws, for requests that bring none; repeats of a request count on from it.
    """

    backend = "causal"

    def __init__(
        self,
        llm: LLM,
        *,
        progress: Progress = lambda stage, done, total: None,
        responses: Responses | None = None,
        logits: Logits | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.llm = llm
        self.truncated = 0
        self._encoder = PromptEncoder(llm.engine.config, llm.engine.explain().get("max_model_len"))
        self._encode = self._encoder.need_tokenizer("eval")
        self._progress, self._responses, self._logits, self._seed = progress, responses, logits, seed
        self._sinks: list[LogitSink | None] = []

    @functools.cached_property
    def eot_token_id(self) -> int:
        """What ends a text.

        Raises:
            UsageError: the checkpoint names nothing that does.
        """
        own = self._encode.eos_token_ids or tuple(sorted(self._encoder.stop_token_ids))
        if not own:
            raise UsageError("the checkpoint names no token that ends a text (eos_token), which tasks need")
        return own[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: bos, or eos where there is none."""
        bos = self._encode.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """The most tokens that a scored one can follow: the engine's limit, less the last one and one that is drawn."""
        return self._encoder.max_model_len - 2

    @property
    def max_gen_toks(self) -> int:
        """The most tokens of an answer where a task does not say."""
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """The checkpoint, which has the tokenizer and the chat template."""
        return Path(self.llm.engine.config.weights).resolve().as_posix().replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; unless told otherwise, with bos once where the checkpoint asks for it."""
        return self._encode.encode(string, add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Whose chat template :meth:`apply_chat_template` uses."""
        return self._encode.chat_template_source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a generation prompt, its last message is left open."""
        rendered = self._encode.render_chat(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return rendered
        last = chat_history[-1]["content"].strip()
        return rendered[: rendered.rindex(last) + len(last)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probabilities of continuations, and whether they are greedy; see the base class."""
        self._sinks = [self._sink(request) for request in requests]
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in windows that do not overlap in what they predict."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        scored = self.score_texts(texts, [self._sink(request) for request in requests])
        return [sum((window.logprob for window in windows), 0.0) for windows in scored]

    def score_texts(
        self, texts: Sequence[Sequence[int]], sinks: Sequence[LogitSink | None] | None = None
    ) -> list[list[Window]]:
        """The log-probabilities of texts as token ids, each after the prefix token, window by window.

        Args:
            sinks: where the logits of each text's first window go.
        """
        windows = [self._windows(text) for text in texts]
        questions = [
            Score(context, predicted, sink if number == 0 else None, greedy=False)
            for text, sink in zip(windows, sinks or [None] * len(texts), strict=True)
            for number, (context, predicted) in enumerate(text)
        ]
        scores = iter(cast("list[list[float]]", self._ask("rolling loglikelihood", questions)))
        return [[Window(next(scores)[0], len(predicted)) for _, predicted in text] for text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that follow prompts, up to stop strings.

        Raises:
            UsageError: a task gives an argument of generation that is unknown here; names it.
        """
        seen: collections.Counter[str] = collections.Counter()
        questions = [self._completion(request, seen) for request in requests]
        return cast("list[str]", self._ask("generate", questions))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        questions = [
            self._score(context, continuation, sink)
            for (_, context, continuation), sink in zip(requests, self._sinks, strict=True)
        ]
        # Neighbours share the longest beginning, so that all but the first of them find it in the prefix cache.
        asked = sorted((question for question in questions if question), key=lambda question: question.tokens)
        answers = dict(zip([question.key for question in asked], self._ask("loglikelihood", asked), strict=True))
        scores = [answers[question.key] if question else (0.0, True) for question in questions]
        return [(score, bool(is_greedy)) for score, is_greedy in scores]

    def _score(self, context: list[int], continuation: list[int], sink: LogitSink | None) -> Score | None:
        """The question for a continuation; None for one without tokens, which is certain."""
        if not continuation:
            return None
        if len(continuation) > self.max_length:
            raise PromptLengthError(
                f"a continuation of {len(continuation)} tokens is to be scored, and the model takes "
                f"{self.max_length}; raise --max-model-len"
            )
        excess = max(0, len(context) + len(continuation) - (self.max_length + 1))
        self.truncated += excess > 0
        return Score(context[excess:], continuation, sink)

    def _windows(self, tokens: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(list(tokens), self.prefix_token_id, self.max_length, context_len=1)
        return [make_disjoint_window(window) for window in windows]

    def _completion(self, request: Instance, seen: collections.Counter[str]) -> Completion:
        context, gen_kwargs = request.args
        params, until = generation_params(gen_kwargs)
        prompt = self._fitting(self.tok_encode(context), params.max_tokens or MAX_GEN_TOKS)
        stop = () if self._encoder.ends_in_reasoning(prompt) else tuple(text for text in until if text)
        occurrence = 0 if params.greedy else seen[repr(request.args)]
        seen[repr(request.args)] += 1
        seed = (self._seed if params.seed is None else params.seed) + occurrence
        params = dataclasses.replace(params, stop=stop, seed=seed)
        return Completion(prompt, params, self._finisher(until), self._sink(request), until)

    def _finisher(self, until: list[str]) -> Callable[[str], str]:
        """What the harness does with a text: it ends before the first stop, and reasoning is no part of it."""
        reasoning = self._encoder.config.reasoning
        stop = handle_stop_sequences(list(until), eos=self._encode.token_text(self.eot_token_id))
        think_end = reasoning.end if reasoning else None
        return functools.partial(postprocess_generated_text, stop=stop, think_end_token=think_end)

    def _fitting(self, prompt: list[int], max_tokens: int) -> list[int]:
        """The end of a prompt that leaves room for an answer."""
        room = self.max_length - max_tokens
        if room < 1:
            raise PromptLengthError(
                f"a task asks for answers of {max_tokens} tokens, and prompt and answer together may have "
                f"{self.max_length}; raise --max-model-len"
            )
        self.truncated += len(prompt) > room
        return prompt[-room:]

    def _sink(self, request: Instance) -> LogitSink | None:
        if self._logits is None:
            return None
        return LogitSink(self._logits, str(request.task_name), str(request.doc_id), request.idx)

    def _ask(self, stage: str, questions: Sequence[Question]) -> list[Any]:
        return ask_all(self.llm.engine, questions, stage=stage, progress=self._progress, responses=self._responses)
