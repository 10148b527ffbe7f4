"""From texts, conversations and holes to fill to the token ids that an engine runs. Needs no torch."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.errors import PromptError, PromptLengthError
from npu_zoo.core.model_config import ToolFormat
from npu_zoo.core.sampling import StructuredOutputs
from npu_zoo.engine.guidance import GuideMaker
from npu_zoo.engine.tokenizer import Tokenizer, checked_messages
from npu_zoo.engine.tool_instructions import with_instructions

_REASONING_TAIL = 16  # tokens of a prompt in which a marker and white space behind it are looked for


class PromptEncoder:
    """Makes and checks the prompts of one run.

    Args:
        config: the run's.
        max_model_len: the engine's limit, which may be below the config's.

    Attributes:
        tokenizer: None where the run takes token ids only.
        stop_token_ids: every id that ends a text.
    """

    def __init__(self, config: EngineConfig, max_model_len: int | None = None) -> None:
        self.config = config
        self.max_model_len = max_model_len or config.max_model_len
        self.tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config)
        own = self.tokenizer.eos_token_ids if self.tokenizer else ()
        self.stop_token_ids = frozenset(config.stop_token_ids) | frozenset(own)

    @functools.cached_property
    def guides(self) -> GuideMaker:
        """What checks forms of outputs, and leads sequences along them."""
        tokenizer = self.need_tokenizer("an output of a given form")
        return GuideMaker(tokenizer, self.config.model_config.vocab_size, self.stop_token_ids)

    def check_form(self, form: StructuredOutputs) -> None:
        """Make sure that outputs can be led along a form.

        Raises:
            UsageError: they cannot.
        """
        self.guides.make(form)

    def encode(self, prompt: str | Sequence[int], *, add_special_tokens: bool = True) -> list[int]:
        """A prompt's token ids; ids that are given are checked and taken as they are.

        Raises:
            PromptError: empty, longer than ``max_model_len`` allows, or holding ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            tokenizer = self.need_tokenizer("a text prompt")
            self._check_length(prompt)
            ids = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        else:
            ids = _as_ids(prompt)
        return self.check(ids)

    def check(self, token_ids: list[int]) -> list[int]:
        """The ids, if the model can take them; raises as :meth:`encode`."""
        if not token_ids:
            raise PromptError("the prompt is empty; give at least one token")
        size = self.config.model_config.vocab_size
        strange = [t for t in token_ids if not 0 <= t < size]
        if strange:
            raise PromptError(f"the prompt holds {strange[0]!r}, which is no token id; ids are 0 to {size - 1}")
        if len(token_ids) >= self.max_model_len:
            raise self._too_long(str(len(token_ids)))
        return token_ids

    def _check_length(self, text: str) -> None:
        """Refuse a text that is too long however it is cut into tokens, which would take its time."""
        if not isinstance(text, str) or len(text) < self.max_model_len:
            return
        least = self.need_tokenizer("a text prompt").least_tokens(text)
        if least >= self.max_model_len:
            raise self._too_long(f"at least {least}")

    def _too_long(self, length: str) -> PromptLengthError:
        return PromptLengthError(
            f"the prompt has {length} tokens, and max_model_len={self.max_model_len} leaves room for "
            f"{self.max_model_len - 1} and one of output; {self._how_to_fit()}"
        )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a conversation; earlier answers go in without their reasoning.

        Args:
            tools: what the model may call, as in OpenAI's API. Where the chat template does not read them, the
                format's instructions tell the model of them.
            template_kwargs: further variables of the chat template's own.

        Raises:
            PromptError: a message lacks role or content, the template refuses the conversation, or the model has no
                format of tool calls.
        """
        tokenizer = self.need_tokenizer("chat")
        if self.config.reasoning:
            messages = self.config.reasoning.without_reasoning(checked_messages(messages))
        if tools and "tools" not in tokenizer.template_variables:
            messages, tools = with_instructions(messages, tools, self._need_tools()), ()
        return tokenizer.encode_chat(messages, add_generation_prompt, tools, template_kwargs)

    def render_fim(self, prefix: str, suffix: str) -> list[int]:
        """The token ids that ask for the text between a prefix and a suffix.

        Raises:
            PromptError: the family has no such format, or the checkpoint's tokenizer lacks its tokens.
        """
        if self.config.fim is None:
            raise PromptError(f"{self.config.family} has no fill-in-the-middle format")
        return self.need_tokenizer("fill in the middle").fim_prompt(prefix, suffix, self.config.fim)

    def ends_in_reasoning(self, token_ids: Sequence[int]) -> bool:
        """Whether a prompt ends inside the model's reasoning, so that what it generates begins there."""
        if self.tokenizer is None or self.config.reasoning is None:
            return False
        tail = self.tokenizer.decode(token_ids[-_REASONING_TAIL:], skip_special_tokens=False)
        return tail.rstrip().endswith(self.config.reasoning.start)

    def need_tokenizer(self, purpose: str) -> Tokenizer:
        """The tokenizer; a PromptError that says what for where there is none."""
        if self.tokenizer is None:
            raise PromptError(f"{purpose} needs the tokenizer, and skip_tokenizer_init is set; give token ids")
        return self.tokenizer

    def _need_tools(self) -> ToolFormat:
        if self.config.tools is None:
            raise PromptError(f"{self.config.model} has no format of tool calls; leave the tools out")
        return self.config.tools

    def _how_to_fit(self) -> str:
        longest = self.config.model_config.context_length
        if self.max_model_len >= longest:
            return f"shorten it: {longest} is the model's own limit"
        return f"shorten it, or raise --max-model-len (the model's own limit is {longest})"


def _as_ids(prompt: Sequence[int]) -> list[int]:
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
