"""Files of prompts: JSON lines, or conversations in ShareGPT's form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.serving.work import Ask

_JSONL = 'an object with "prompt" or "messages"'
_NO_FIRST_TURN = "they do not begin with a human's turn and an answer to it"
_HUMAN, _ANSWERS = ("human", "user"), ("gpt", "assistant", "chatgpt", "bard")

CHARACTERS_PER_TOKEN = 4.0
"""Of English text, about, where a server does not tell its own."""


class Dataset(NamedTuple):
    """What a file holds.

    Attributes:
        left_out: what of it is not sent, in a sentence; None where all is.
    """

    asks: list[Ask]
    left_out: str | None = None


def read_dataset(path: Path) -> Dataset:
    """The requests of a file: a JSON list is read as conversations, anything else as JSON lines.

    Raises:
        UsageError: the file cannot be read, or holds something else; says the line or the entry.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 at byte {error.start}") from None
    is_list = text.lstrip().startswith("[")
    found = _conversations(path, text) if is_list else Dataset(list(_lines(path, text)))
    if not found.asks:
        why = f"; {found.left_out}" if found.left_out else ""
        raise UsageError(f"{path} holds no prompt; a line is {_JSONL}, or the file a ShareGPT-style list{why}")
    return found


def with_answer_lengths(asks: Sequence[Ask], characters_per_token: float = CHARACTERS_PER_TOKEN) -> list[Ask]:
    """Requests of conversations, asking for about as many new tokens as their answers have; others as they are."""
    return [
        ask if ask.answer is None else replace(ask, max_tokens=max(1, round(len(ask.answer) / characters_per_token)))
        for ask in asks
    ]


def _lines(path: Path, text: str) -> Iterator[Ask]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _ask_of_line(line, f"{path}:{number}")


def _ask_of_line(line: str, where: str) -> Ask:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: no JSON: {error}; a line is {_JSONL}") from None
    if not isinstance(data, dict) or ("prompt" in data) == ("messages" in data):
        raise UsageError(f"{where}: a line is {_JSONL}, one of them")
    prompt = _checked_prompt(data["prompt"], where) if "prompt" in data else _checked_messages(data["messages"], where)
    return Ask(prompt, _checked_max_tokens(data.get("max_tokens"), where))


def _checked_prompt(prompt: Any, where: str) -> Any:
    ids = isinstance(prompt, list) and all(_is_count(part, 0) for part in prompt)
    if not prompt or not (isinstance(prompt, str) or ids):
        raise UsageError(f"{where}: prompt is a text or token ids, and not empty")
    return prompt


def _checked_messages(messages: Any, where: str) -> Any:
    sound = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m for m in messages)
    if not messages or not sound:
        raise UsageError(f'{where}: messages is a list of objects such as {{"role": "user", "content": "…"}}')
    return messages


def _checked_max_tokens(value: Any, where: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or not _is_count(value, 1):
        raise UsageError(f"{where}: max_tokens is a whole number from 1 on, not {json.dumps(value)}")
    return value


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _conversations(path: Path, text: str) -> Dataset:
    """First turns with the lengths of their answers; conversations that do not begin so are left out, as is usual."""
    asks = list(_first_turns(path, text))
    kept = [ask for ask in asks if ask is not None]
    left_out = f"{len(asks) - len(kept):,} of {len(asks):,} conversations were left out: {_NO_FIRST_TURN}"
    return Dataset(kept, left_out if len(kept) < len(asks) else None)


def _first_turns(path: Path, text: str) -> Iterator[Ask | None]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: no JSON: {error}") from None
    for number, entry in enumerate(entries, 1):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
            raise UsageError(f'{path}, entry {number}: it is {{"conversations": [{{"from": …, "value": …}}, …]}}')
        if len(turns) >= 2 and turns[0]["from"] in _HUMAN and turns[1]["from"] in _ANSWERS and turns[0]["value"]:
            yield Ask(turns[0]["value"], answer=turns[1]["value"])
        else:
            yield None


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(name), str) for name in ("from", "value"))
