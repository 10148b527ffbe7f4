"""The Python API: :class:`LLM`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, cast

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import Engine, Progress, RequestOutput
from npu_zoo.core.errors import EngineError, PromptError, UsageError
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.dispatch import create_engine, resolve
from npu_zoo.settings import engine_args

Prompt = str | Sequence[int]
Messages = Sequence[dict[str, Any]]
OnOutput = Callable[[RequestOutput], None]


class LLM:
    """A model that is loaded and ready.

    Args:
        model: ``family`` or ``family:variant``.
        weights: a checkpoint directory; unset runs the bundled demo checkpoint.
        options: any further field of :class:`npu_zoo.core.config.EngineArgs`.

    Raises:
        NpuZooError: a subclass that says which part of the request cannot be met, and why.
    """

    def __init__(self, model: str, weights: str | None = None, **options: Any) -> None:
        self._start(resolve(engine_args({"model": model, "weights": weights, **options})), None)

    @classmethod
    def from_config(cls, config: EngineConfig, progress: Progress | None = None) -> LLM:
        """Start from a checked request; ``progress`` hears of the loading."""
        llm = cls.__new__(cls)
        llm._start(config, progress)
        return llm

    def _start(self, config: EngineConfig, progress: Progress | None) -> None:
        self.engine: Engine = create_engine(config, progress)
        self.partial_outputs: list[RequestOutput] = []
        self._numbers = itertools.count()
        self._mail: dict[str, RequestOutput] = {}

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_output: OnOutput | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, all of them in one continuous batch.

        Args:
            prompts: texts, or lists of token ids that are taken as they are; one alone is a list of one.
            sampling_params: one for all, or one per prompt.
            on_output: called with the state of every request that a step has moved on.

        Returns:
            One output per prompt, in their order.

        Raises:
            PromptError: a prompt is empty or too long; nothing is run then.
            KeyboardInterrupt: after aborting; ``partial_outputs`` holds what there is.
        """
        listed = _as_list(prompts)
        return self._run([(prompt, True) for prompt in listed], _per_prompt(sampling_params, len(listed)), on_output)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_output: OnOutput | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations: lists of ``{"role": …, "content": …}``; one alone is a list of one."""
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = [(self.engine.render_chat(cast("Messages", c)), False) for c in conversations]
        return self._run(prompts, _per_prompt(sampling_params, len(prompts)), on_output)

    def infill(
        self,
        prefix: str | Sequence[str],
        suffix: str | Sequence[str],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_output: OnOutput | None = None,
    ) -> list[RequestOutput]:
        """Fill in the middle between prefixes and suffixes.

        Raises:
            PromptError: the family has no fill-in-the-middle format, or the checkpoint lacks its tokens.
        """
        prefixes = [prefix] if isinstance(prefix, str) else list(prefix)
        suffixes = [suffix] if isinstance(suffix, str) else list(suffix)
        if len(prefixes) != len(suffixes):
            raise PromptError(f"{len(prefixes)} prefixes and {len(suffixes)} suffixes; one of each is due per prompt")
        prompts = [(self.fim_prompt(p, s), False) for p, s in zip(prefixes, suffixes, strict=True)]
        return self._run(prompts, _per_prompt(sampling_params, len(prompts)), on_output)

    def fim_prompt(self, prefix: str, suffix: str) -> list[int]:
        """The token ids that ask for the text between a prefix and a suffix."""
        return self.engine.render_fim(prefix, suffix)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt and yield its state after every token; closing the iterator aborts the request.

        The outputs inside are the running ones, brought up to date in place from step to step.
        """
        return self._stream(prompt, sampling_params or SamplingParams(), add_special_tokens=True)

    def stream_chat(self, messages: Messages, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Answer one conversation as :meth:`stream` does."""
        prompt = self.engine.render_chat(messages)
        return self._stream(prompt, sampling_params or SamplingParams(), add_special_tokens=False)

    def shutdown(self) -> None:
        """Free the model and its cache."""
        self.engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    def _run(
        self, prompts: Sequence[tuple[Prompt, bool]], params: list[SamplingParams], on_output: OnOutput | None
    ) -> list[RequestOutput]:
        request_ids: list[str] = []
        latest: dict[str, RequestOutput] = {}
        self.partial_outputs = []
        try:
            for (prompt, special), sampling in zip(prompts, params, strict=True):
                request_ids.append(str(next(self._numbers)))
                with _naming(len(request_ids), len(prompts)):
                    self.engine.add_request(request_ids[-1], prompt, sampling, add_special_tokens=special)
            waiting = set(request_ids)
            while waiting:
                outputs = self._advance(waiting)
                # All of a step's outputs are kept before a callback can raise.
                latest.update({output.request_id: output for output in outputs})
                waiting.difference_update([output.request_id for output in outputs if output.finished])
                if on_output is not None:
                    for output in outputs:
                        on_output(output)
        except BaseException:
            aborted = {i: self.engine.abort_request(i) for i in request_ids}
            kept = (aborted[i] or latest.get(i) for i in request_ids)
            self.partial_outputs = [output for output in kept if output is not None]
            raise
        return [latest[request_id] for request_id in request_ids]

    def _advance(self, mine: Collection[str]) -> list[RequestOutput]:
        """One step; what belongs to other callers, such as an open stream, is kept for them."""
        # Over the mail, which is hardly ever any, and not over all requests, of which most may wait.
        ready = [self._mail.pop(request_id) for request_id in list(self._mail) if request_id in mine]
        if ready:
            return ready
        if not self.engine.has_unfinished_requests():
            raise EngineError("the request was aborted elsewhere, or the engine was shut down, before it finished")
        outputs = self.engine.step()
        self._mail.update({o.request_id: o for o in outputs if o.request_id not in mine})
        return [output for output in outputs if output.request_id in mine]

    def _stream(self, prompt: Prompt, params: SamplingParams, *, add_special_tokens: bool) -> Iterator[RequestOutput]:
        request_id = str(next(self._numbers))
        finished = False
        try:
            self.engine.add_request(request_id, prompt, params, add_special_tokens=add_special_tokens)
            while not finished:
                for output in self._advance((request_id,)):
                    yield output
                    finished = output.finished
        finally:
            self.engine.abort_request(request_id)
            self._mail.pop(request_id, None)


@contextlib.contextmanager
def _naming(number: int, count: int) -> Iterator[None]:
    """Say which of several prompts an error speaks of."""
    try:
        yield
    except PromptError as error:
        if count == 1:
            raise
        raise PromptError(f"prompt {number} of {count}: {error}") from error


def _as_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, bytes)):
        return [cast("Prompt", prompts)]
    if not isinstance(prompts, Iterable):
        raise UsageError(f"prompts are {type(prompts).__name__}; give texts, or lists of token ids")
    listed = list(prompts)
    one = bool(listed) and not isinstance(listed[0], str) and hasattr(listed[0], "__index__")
    return [cast("Prompt", listed)] if one else cast("list[Prompt]", listed)


def _per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
        raise UsageError(f"sampling parameters are {type(params).__name__}; give SamplingParams, one or one per prompt")
    if len(params) != count:
        raise UsageError(f"{len(params)} sampling parameters for {count} prompts; give one, or one per prompt")
    return list(params)
