"""Log-probabilities in the two forms of OpenAI's API, and where each token's text lies."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

from npu_zoo.core.engine import Logprob, RequestOutput
from npu_zoo.engine.tokenizer import Tokenizer

LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI's API has the same number."""

Entries = Mapping[int, Logprob]


class TokenPlaces:
    """Where tokens that come one after another lie in their text.

    Args:
        tokenizer: None where there is none; all places are the beginning then.
        start: of the first token, in characters.
        begins: whether the text begins with them, so that SentencePiece's leading space is no part of it.

    Attributes:
        starts, ends: of each token in characters; a token that ends inside a character ends behind it.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, skip_special_tokens: bool, start: int = 0, *, begins: bool = False
    ) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._space_due = begins and tokenizer is not None and tokenizer.strips_leading_space
        self._length = start

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take all of a sequence's tokens so far; those that are known already are passed over."""
        for token_id in token_ids[len(self.starts) :]:
            self.starts.append(self._length)
            self._length += len(self._decoder.decode(self._bytes(token_id)))
            inside, _ = self._decoder.getstate()
            self.ends.append(self._length + bool(inside))

    def _bytes(self, token_id: int) -> bytes:
        data = self._tokenizer.token_bytes(token_id, self._skip_special_tokens) if self._tokenizer else b""
        if data and self._space_due:
            data, self._space_due = data.removeprefix(b" "), False
        return data


def chat_logprobs(
    tokenizer: Tokenizer | None, token_ids: Sequence[int], logprobs: Sequence[Entries], top: int
) -> list[dict[str, Any]]:
    """An entry for each token, as in chat completions.

    Args:
        top: how many of the most likely tokens stand beside each.
    """
    found = []
    for token_id, entries in zip(token_ids, logprobs, strict=False):
        best = [_chat_entry(tokenizer, id_, entry) for id_, entry in _ranked(entries) if entry.rank <= top]
        found.append({**_chat_entry(tokenizer, token_id, entries[token_id]), "top_logprobs": best[:top]})
    return found


def completion_logprobs(
    tokenizer: Tokenizer | None,
    token_ids: Sequence[int],
    logprobs: Sequence[Entries | None],
    offsets: Sequence[int],
    top: int,
) -> dict[str, Any]:
    """The four lists of completions; the chosen token is always among the most likely ones.

    Args:
        logprobs: None for a prompt's first token, which nothing predicts.
        offsets: where each token begins in the text.
        top: how many of the most likely tokens stand at each position.
    """
    pairs = [(id_, _kept(entries, id_, top)) for id_, entries in zip(token_ids, logprobs, strict=False)]
    return {
        "tokens": [token_text(tokenizer, id_, entries) for id_, entries in pairs],
        "token_logprobs": [None if entries is None else finite(entries[id_].logprob) for id_, entries in pairs],
        "top_logprobs": [None if entries is None else _by_text(tokenizer, entries) for _, entries in pairs],
        "text_offset": list(offsets[: len(pairs)]),
    }


def prompt_logprobs(output: RequestOutput, top: int) -> list[dict[str, Any] | None]:
    """In vLLM's form: at each position of the prompt, ids with their log-probabilities, ranks and texts."""
    pairs = zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=False)
    kept = [_kept(entries, id_, top) for id_, entries in pairs]
    return [None if row is None else {str(id_): _plain(entry) for id_, entry in row.items()} for row in kept]


def token_text(tokenizer: Tokenizer | None, token_id: int, entries: Entries | None = None) -> str:
    """One token as text; without a tokenizer, its id."""
    said = entries[token_id].decoded_token if entries is not None and token_id in entries else ""
    return said or (tokenizer.token_text(token_id) if tokenizer else f"token_id:{token_id}")


def finite(logprob: float) -> float:
    """A log-probability that JSON can say."""
    return logprob + 0.0 if logprob > LEAST else LEAST  # minus zero reads badly


def _chat_entry(tokenizer: Tokenizer | None, token_id: int, entry: Logprob) -> dict[str, Any]:
    return {
        "token": entry.decoded_token or token_text(tokenizer, token_id),
        "logprob": finite(entry.logprob),
        "bytes": list(tokenizer.token_bytes(token_id)) if tokenizer else None,
    }


def _kept(entries: Entries | None, chosen: int, top: int) -> dict[int, Logprob] | None:
    """The most likely tokens and the chosen one; an engine may have been asked for more on another account."""
    if entries is None:
        return None
    return {id_: entry for id_, entry in entries.items() if entry.rank <= top or id_ == chosen}


def _ranked(entries: Entries) -> list[tuple[int, Logprob]]:
    return sorted(entries.items(), key=lambda pair: pair[1].rank)


def _by_text(tokenizer: Tokenizer | None, entries: Entries) -> dict[str, float]:
    """Of tokens with the same text, such as halves of characters, the most likely one counts."""
    found: dict[str, float] = {}
    for token_id, entry in _ranked(entries):
        found.setdefault(token_text(tokenizer, token_id, entries), finite(entry.logprob))
    return found


def _plain(entry: Logprob) -> dict[str, Any]:
    return {"logprob": finite(entry.logprob), "rank": entry.rank, "decoded_token": entry.decoded_token}
