"""What is asked: prompts of random lengths, or those of a file."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from npu_zoo.core.errors import UsageError

Endpoint = Literal["completions", "chat"]
Message = Mapping[str, Any]

ROUTES: Mapping[Endpoint, str] = {"completions": "/completions", "chat": "/chat/completions"}

WORDS = tuple(
    """
    time year people way day man thing woman life child world school state family student group country problem hand
    part place case week company system program question work number night point home water room mother area money
    story fact month lot right study book eye job word business issue side kind head house service friend father
    power hour game line end member law car city name team minute idea kid body back parent face level office door
    health person art war history party result change morning reason girl guy moment air teacher force
    """.split()  # noqa: SIM905
)
"""Common words, of which tokenizers make about one token each."""


class LengthRange(NamedTuple):
    """Lengths in tokens, both ends included."""

    low: int
    high: int

    def draw(self, source: random.Random) -> int:
        """One of them, each as likely."""
        return source.randint(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low}..{self.high}"


@dataclass(frozen=True)
class Ask:
    """One request's work.

    Attributes:
        prompt: a text or token ids, or a conversation's messages.
        max_tokens: longest answer; None leaves it to the server.
        asked_prompt_tokens: length that the prompt was made for; None where it was given.
        answer: what a data set has as the answer; its length becomes ``max_tokens``.
    """

    prompt: str | Sequence[int] | Sequence[Message]
    max_tokens: int | None = None
    asked_prompt_tokens: int | None = None
    answer: str | None = None

    @property
    def is_conversation(self) -> bool:
        """Whether the prompt is messages."""
        return not isinstance(self.prompt, str) and bool(self.prompt) and not isinstance(self.prompt[0], int)

    @property
    def is_ids(self) -> bool:
        """Whether the prompt is token ids."""
        return not isinstance(self.prompt, str) and not self.is_conversation

    def body(self, endpoint: Endpoint) -> dict[str, Any]:
        """The members of a request that say what is asked.

        Raises:
            UsageError: the route does not take such a prompt.
        """
        body: dict[str, Any] = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        if endpoint == "completions":
            if self.is_conversation:
                raise UsageError("messages go to /v1/chat/completions; give --endpoint chat")
            return {"prompt": self.prompt, **body}
        if self.is_ids:
            raise UsageError("token ids go to /v1/completions; give --endpoint completions, or texts")
        return {"messages": self.prompt if self.is_conversation else self._turn(), **body}

    def _turn(self) -> list[Message]:
        return [{"role": "user", "content": self.prompt}]


class Workload(Protocol):
    """Gives requests their work."""

    def asks(self, source: random.Random) -> Iterator[Ask]:
        """Work without end, the same for the same source."""
        ...


@dataclass(frozen=True)
class RandomIds:
    """Prompts of token ids drawn from given ones, whose length is exact.

    Attributes:
        ids: ordinary tokens of the model's vocabulary.
    """

    input_lengths: LengthRange
    output_lengths: LengthRange
    ids: Sequence[int]

    def asks(self, source: random.Random) -> Iterator[Ask]:
        """See :meth:`Workload.asks`."""
        while True:
            length = self.input_lengths.draw(source)
            yield Ask(source.choices(self.ids, k=length), self.output_lengths.draw(source), length)


class TextLength(NamedTuple):
    """How many tokens a server makes of a number of random words, as it counted those of two prompts.

    Attributes:
        per_word: tokens per word.
        beside: tokens that it adds, such as those of a chat template.
    """

    per_word: float = 1.0
    beside: float = 0.0

    @classmethod
    def fitted(cls, few: tuple[int, int], many: tuple[int, int]) -> TextLength:
        """From two pairs of words and tokens."""
        per_word = max((many[1] - few[1]) / (many[0] - few[0]), 0.1)
        return cls(per_word, few[1] - per_word * few[0])

    @property
    def shortest(self) -> int:
        """Tokens of a prompt of one word."""
        return round(self.per_word + self.beside)

    def words(self, tokens: int) -> int:
        """Words for a number of tokens, one at least."""
        return max(1, round((tokens - self.beside) / self.per_word))


@dataclass(frozen=True)
class RandomWords:
    """Prompts of random words, whose length is right on average; what the server counted stands in the figures."""

    input_lengths: LengthRange
    output_lengths: LengthRange
    text_length: TextLength

    def asks(self, source: random.Random) -> Iterator[Ask]:
        """See :meth:`Workload.asks`."""
        while True:
            length = self.input_lengths.draw(source)
            text = random_words(self.text_length.words(length), source)
            yield Ask(text, self.output_lengths.draw(source), length)


class GivenAsks:
    """Those of a file, in an order of the first source's; from the beginning again once all have been given.

    Later levels go on where an earlier one ended, so that a server's prefix cache knows no prompt sooner than needed.

    Attributes:
        given: how many requests have been given work.
    """

    def __init__(self, asks: Sequence[Ask]) -> None:
        self.given = 0
        self._asks = list(asks)
        self._shuffled = False

    def __len__(self) -> int:
        return len(self._asks)

    def asks(self, source: random.Random) -> Iterator[Ask]:
        """See :meth:`Workload.asks`."""
        if not self._shuffled:
            source.shuffle(self._asks)
            self._shuffled = True
        for place in itertools.count(self.given):
            self.given = place + 1
            yield self._asks[place % len(self._asks)]


def random_words(count: int, source: random.Random) -> str:
    """So many words, with spaces between them."""
    return " ".join(source.choices(WORDS, k=count))
