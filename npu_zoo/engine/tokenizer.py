"""Text to token ids and back."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from npu_zoo.core.errors import PromptError, TokenizerError
from npu_zoo.engine.tokenizer_files import read_tokenizer_files

if TYPE_CHECKING:
    from npu_zoo.core.model_config import FimFormat

CHECK_TEXT = (
    "def f(x: int) -> str:\n    if x  !=  1:\n\t\treturn f'{x}'\r\n\n\n  # ünïcode: é è ñ ç ß Ω ж\n"
    "数据结构 データ 한국어 — 🚀👩‍💻 1234567 + 3.14e-5;\n"
)
"""What a tokenizer must bring back unchanged to be accepted."""

_METASPACE = "\u2581"
_RENDERED = {"messages", "tools", "documents", "add_generation_prompt"}
_FUNCTIONS = {"raise_exception", "strftime_now", "namespace", "range", "dict"}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """Text to token ids and back, for one checkpoint directory.

    A tokenizer.json is loaded as it is written, whatever class tokenizer_config.json names: transformers before 5.23
    would rebuild a ByteLevel one as SentencePiece's and drop its spaces. Other files go through AutoTokenizer.
    transformers is imported for those files and for chat templates only.

    Attributes:
        bos_token_id: what :meth:`encode` puts first where the checkpoint asks for it.
        eos_token_ids: the tokenizer's own; config.json and generation_config.json may name more.
        chat_template_source: whose template :meth:`render_chat` uses; None where there is none.
        strips_leading_space: whether a text's first token carries a space that is not part of the text.

    Args:
        directory: the checkpoint.
        trust_remote_code: lets a checkpoint without tokenizer.json run its own Python code.
        chat_template: a Jinja template for checkpoints that bring none.
        chat_template_adds_bos: whether that template's output begins with the bos token.

    Raises:
        TokenizerError: there is no tokenizer, it is of a kind that cannot be decoded token by token, or it does not
            bring :data:`CHECK_TEXT` back; says what came back and what to do.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        chat_template_adds_bos: bool = False,
    ) -> None:
        self.directory = Path(directory)
        files = read_tokenizer_files(self.directory, trust_remote_code)
        self._backend = files.backend
        # A tokenizer.json may have truncation and padding baked in, which would cut prompts silently.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special_tokens = files.special_tokens
        added = self._backend.get_added_tokens_decoder()
        self._added = {id_: token.content for id_, token in added.items()}
        named = map(self._backend.token_to_id, (*files.special_tokens.values(), *files.additional))
        self._special = frozenset(named) | {id_ for id_, token in added.items() if token.special}
        self._alphabet, self.strips_leading_space = _decoding(self._backend, self.directory)
        self._bytes: dict[int, bytes] = {}
        self.bos_token_id = self._id_of("bos_token")
        eos = self._id_of("eos_token")
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)
        self._prefix, self._suffix = self._added_around(files.add_bos_token)
        self._template, self._template_adds_bos = files.chat_template or chat_template, chat_template_adds_bos
        self.chat_template_source: Literal["checkpoint", "family"] | None = (
            "checkpoint" if files.chat_template else "family" if chat_template else None
        )
        self._check()

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id; the embedding may have more rows."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def least_tokens(self, text: str) -> int:
        """A number of tokens that a text has at least, told by its length."""
        if self._backend.normalizer is not None:  # which may drop characters
            return 0
        return len(text.encode("utf-8", "replace")) // max(1, self._longest_token)

    @functools.cached_property
    def _longest_token(self) -> int:
        return max(len(self.token_bytes(id_)) for id_ in range(self.vocab_size))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text; the bos token is added where the checkpoint asks for it, and never twice.

        Raises:
            PromptError: the text is no string, or holds half a surrogate pair, which is no character.
        """
        if not isinstance(text, str):
            raise PromptError(f"a prompt is a string or a list of token ids, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the prompt holds {text[error.start]!a} at {error.start}, which is no character"
            ) from error
        # As a batch of one: it is faster without offsets, and other threads run meanwhile.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if not add_special_tokens:
            return ids
        begins = ids[: len(self._prefix)] == self._prefix
        return [*([] if begins else self._prefix), *ids, *self._suffix]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True, *, continues: bool = False) -> str:
        """The text of token ids, for any ids: added tokens give their literal text, ids beyond the vocabulary nothing.

        Bytes that are no UTF-8 become U+FFFD.

        Args:
            continues: the ids go on from a text, so that SentencePiece's leading space belongs to them.
        """
        data = b"".join(self.token_bytes(id_, skip_special_tokens) for id_ in ids)
        if self.strips_leading_space and not continues:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int, skip_special_tokens: bool = False) -> bytes:
        """What one token adds to the text, in UTF-8; it may begin or end inside a character."""
        if skip_special_tokens and token_id in self._special:
            return b""
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._read_bytes(token_id)
        return data

    def token_text(self, token_id: int) -> str:
        """One token's text for display; U+FFFD stands for parts of characters, and special tokens are literal."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        """Whether decoding can skip the token."""
        return token_id in self._special

    @functools.cached_property
    def template_variables(self) -> frozenset[str]:
        """Names that the chat template reads and does not set itself."""
        import jinja2
        import jinja2.meta

        template = self._template or ""
        try:
            parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True).parse(template)
        except jinja2.TemplateSyntaxError:  # a tag of transformers' own
            return frozenset(re.findall(r"[A-Za-z_]\w*", template))
        return frozenset(jinja2.meta.find_undeclared_variables(parsed))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as text, under the checkpoint's chat template or else the given one, in Jinja's sandbox.

        Args:
            tools: as in OpenAI's API, for a template that reads them.
            template_kwargs: further variables of the template's own, such as one that turns reasoning on.

        Raises:
            PromptError: there is no template, it does not read a variable, a message lacks role or content, or the
                template refuses.
        """
        if self.chat_template_source is None:
            raise PromptError(
                "the checkpoint has no chat template and its family has none either; send a plain prompt (--no-chat)"
            )
        conversation = checked_messages(messages)
        # Only here, for transformers takes longer to import than everything else takes to load.
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = {**self._special_tokens, **self._checked_kwargs(template_kwargs or {})}
        try:
            result: Any = render_jinja_template(
                conversations=[conversation],
                tools=[dict(tool) for tool in tools] if tools else None,
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        # The template is the checkpoint's code and may raise anything.
        except Exception as error:
            raise PromptError(f"the chat template refuses the conversation: {type(error).__name__}: {error}") from error
        rendered, _ = result
        return str(rendered[0])

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a conversation, with the bos token once where the template or the tokenizer wants it.

        A checkpoint's own template is taken to emit every token that is due, as transformers has it.
        """
        text = self.render_chat(messages, add_generation_prompt, tools, template_kwargs)
        return self.encode(text, self.chat_template_source == "family" and not self._template_adds_bos)

    def _checked_kwargs(self, template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        own = self.template_variables - _RENDERED - _FUNCTIONS - self._special_tokens.keys()
        unread = next((name for name in template_kwargs if name not in own), None)
        if unread is not None:
            known = f"it reads {', '.join(sorted(own))}" if own else "it reads none"
            raise PromptError(f"the chat template reads no variable {unread!r} that could be given; {known}")
        return dict(template_kwargs)

    def fim_prompt(self, prefix: str, suffix: str, fim_format: FimFormat) -> list[int]:
        """The token ids that ask for what stands between prefix and suffix.

        Where the prefix or suffix itself spells one of the three tokens, it stays text.

        Raises:
            PromptError: the tokenizer has no such tokens, so that the model was not trained to fill in.
        """
        literals = (fim_format.begin, fim_format.hole, fim_format.end)
        ids = {content: id_ for id_, content in self._added.items()}
        lacking = [literal for literal in literals if literal not in ids]
        if lacking:
            raise PromptError(
                f"the tokenizer lacks {', '.join(lacking)}: this checkpoint cannot fill in the middle; "
                "take one of the family that can"
            )
        begin, hole, end = (ids[literal] for literal in literals)
        before, after = self._encode_without(prefix, literals), self._encode_without(suffix, literals)
        return [*self._prefix, begin, *before, hole, *after, end]

    def _encode_without(self, text: str, literals: Sequence[str]) -> list[int]:
        """Token ids that hold none of the literals' own: each occurrence is cut after its first character."""
        matches = re.finditer("|".join(map(re.escape, literals)), text)
        cuts = [0, *(match.start() + 1 for match in matches), len(text)]
        return [id_ for start, stop in itertools.pairwise(cuts) for id_ in self.encode(text[start:stop], False)]

    def _id_of(self, name: str) -> int | None:
        text = self._special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _added_around(self, add_bos_token: bool | None) -> tuple[list[int], list[int]]:
        """What encoding puts before and after a text."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
        start = starts[0] if starts else 0
        prefix, suffix = full[:start], full[start + len(bare) :]
        bos = self.bos_token_id
        if add_bos_token and bos is not None and bos not in prefix:
            prefix = [bos, *prefix]
        if add_bos_token is False and prefix == [bos]:
            prefix = []
        return prefix, suffix

    def _read_bytes(self, token_id: int) -> bytes:
        literal = self._added.get(token_id)
        if literal is not None:
            return literal.encode()
        piece = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if piece is None:
            return b""
        if self._alphabet is None:
            byte = _BYTE_TOKEN.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else piece.replace(_METASPACE, " ").encode()
        values = [self._alphabet.get(character) for character in piece]
        known = [value for value in values if value is not None]
        return bytes(known) if len(known) == len(values) else piece.encode()

    def _check(self) -> None:
        came_back = self.decode(self.encode(CHECK_TEXT, add_special_tokens=False), skip_special_tokens=False)
        if came_back != CHECK_TEXT:
            at = next(i for i, (a, b) in enumerate(itertools.zip_longest(CHECK_TEXT, came_back)) if a != b)
            raise TokenizerError(
                f"the tokenizer in {self.directory} does not bring text back: {CHECK_TEXT[max(0, at - 8) : at + 24]!r} "
                f"became {came_back[max(0, at - 8) : at + 24]!r}; its files are damaged or were converted wrongly: "
                "download tokenizer.json and tokenizer_config.json again from the checkpoint's repository"
            )


def _decoding(backend: Any, directory: Path) -> tuple[dict[str, int] | None, bool]:
    """The byte of each character of a ByteLevel vocabulary, or None for SentencePiece's; whether a space leads."""
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "none"}
    steps = {step["type"]: step for step in state.get("decoders", [state])}
    if "ByteLevel" in steps:
        return _byte_alphabet(), False
    if "Metaspace" in steps:
        return None, steps["Metaspace"].get("prepend_scheme", "always") != "never"
    if steps.get("Replace", {}).get("pattern") == {"String": _METASPACE}:
        return None, "Strip" in steps
    raise TokenizerError(
        f"the tokenizer in {directory} decodes with {', '.join(steps)}; "
        "known are ByteLevel (as GPT-2's) and Metaspace (as SentencePiece's)"
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte, turned round: printable Latin-1 stands for itself, the rest lies from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation's messages, without the keys that hold None but the content of one that calls tools.

    Raises:
        PromptError: there is none, or one lacks role or content.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not messages:
        raise PromptError("a conversation is a list of messages, each with role and content, and holds at least one")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f"message {number} of the conversation lacks a role (system, user or assistant)")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise PromptError(f"message {number} of the conversation ({message['role']}) lacks a content string")
    # As transformers does: templates handle a missing key better than None, but look for calls where content is None.
    return [_without_nones(message) for message in messages]


def _without_nones(message: Mapping[str, Any]) -> dict[str, Any]:
    stated = {key: value for key, value in message.items() if value is not None}
    return {**stated, "content": message.get("content")} if message.get("tool_calls") else stated
