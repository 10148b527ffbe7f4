"""What a server is, and which requests it takes: found by asking it before anything is measured."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import aiohttp
from pydantic import BaseModel, ConfigDict

from npu_zoo.core.errors import NpuZooError, UsageError
from npu_zoo.evaluation.serving.client import Client, Exchange, failure_of
from npu_zoo.evaluation.serving.load import observe, read_slowly
from npu_zoo.evaluation.serving.observation import Observation
from npu_zoo.evaluation.serving.requests import RequestForm
from npu_zoo.evaluation.serving.stream import shown
from npu_zoo.evaluation.serving.work import WORDS, Ask, TextLength, random_words
from npu_zoo.protocol.errors import error_text

Tokens = Literal["auto", "ids", "text"]

_KEY_HINT = "; put your key into NPU_ZOO_API_KEY or OPENAI_API_KEY"
_UNFIT = (400, 404, 415, 422, 501)
_FAILING = 500
"""What some servers say to members that they do not know; one that says it to every form is measured as it is."""
_NO_ANSWER = (aiohttp.ClientError, asyncio.TimeoutError, OSError)
_FEW_WORDS, _MANY_WORDS = 8, 72
_SAMPLED_ANSWERS = 16


class ServerError(NpuZooError):
    """A server cannot be reached, or refuses what is needed to measure it."""


class ServerIdentity(BaseModel):
    """What a server says of itself.

    Attributes:
        url: where it is.
        model: the name that requests give.
        owned_by: what /v1/models says of the model; ``npu-zoo``, ``vllm``, ``llamacpp``.
        version: of /version; None where there is none.
        max_model_len: longest prompt and output; None where it does not say.
    """

    model_config = ConfigDict(frozen=True)

    url: str
    model: str
    owned_by: str | None = None
    version: str | None = None
    max_model_len: int | None = None


@dataclasses.dataclass(frozen=True)
class Accepted:
    """What a server takes.

    Attributes:
        form: of its requests.
        ids: token ids that prompts are drawn from; None where prompts are words.
        notes: what was found, in sentences.
    """

    form: RequestForm
    ids: Sequence[int] | None
    notes: tuple[str, ...]


async def identify(client: Client, model: str | None) -> ServerIdentity:
    """What is served, and by whom.

    Args:
        model: its name; None for the first that the server lists.

    Raises:
        ServerError: it cannot be reached or takes no such key.
        UsageError: no model was named, and the server lists none.
    """
    status, data = await _read(client, "/v1/models")
    if status in (401, 403):
        raise ServerError(f"{client.address.host} answers {status}: {shown(error_text(data))}{_KEY_HINT}")
    entries = _entries(data)
    entry = next((one for one in entries if model in (None, one["id"])), {})
    name = model or entry.get("id")
    if name is None:
        raise UsageError(f"{client.address.host} lists no models at /v1/models (HTTP {status}); name one with --model")
    return ServerIdentity(
        url=client.address.url,
        model=name,
        owned_by=_text(entry.get("owned_by")),
        version=await _version(client),
        max_model_len=_count(entry.get("max_model_len")),
    )


async def find_token_ids(client: Client, model: str) -> list[int] | None:
    """Ids of ordinary tokens: those that the server's /tokenize makes of common words; None where it has none."""
    tokens = await _tokenize(client, model, " ".join(WORDS))
    return sorted(set(tokens)) if tokens else None


async def characters_per_token(client: Client, model: str, texts: Sequence[str]) -> float | None:
    """Of a sample of texts, none of them empty, as the server's /tokenize counts; None where it has none."""
    sample = sorted(texts, key=len)[:: max(1, len(texts) // _SAMPLED_ANSWERS)]
    tokens = 0
    for text in sample:
        if (ids := await _tokenize(client, model, text)) is None:
            return None
        tokens += len(ids)
    return sum(map(len, sample)) / tokens if tokens else None


async def find_accepted(
    client: Client, form: RequestForm, *, ids: Sequence[int] | None, ignore_eos: bool | None, texts_too: bool
) -> Accepted:
    """What the server takes, by single requests: token ids or text, with ignore_eos and stream_options or without.

    Args:
        ids: to try prompts of; None for words.
        ignore_eos: None takes it where the server does.
        texts_too: whether words may stand in for ids, and ignoring the end is wanted where it is not asked for.

    Raises:
        ServerError: it refuses every form, or cannot be reached.
    """
    refused: list[str] = []
    failing: Accepted | None = None
    for with_ids, eos, usage in _forms(ids is not None, ignore_eos, texts_too):
        tried = dataclasses.replace(form, ignore_eos=eos, include_usage=usage)
        kept = ids if with_ids else None
        exchange, seen = await _try(client, tried, _few_words() if kept is None else _few_ids(kept))
        said = seen.failure.message if seen.failure else ""
        if exchange.status not in _UNFIT:
            _require_open(client, exchange)
            notes = [f"the warm-up request failed ({said})"] if said else []
            given_up = ids is not None and kept is None, ignore_eos is None and not eos, not usage
            found = Accepted(tried, kept, (*notes, *_given_up(*given_up, refused)))
            if exchange.status != _FAILING:
                return found
            failing = failing or found
        refused.append(said)
    if failing:
        return failing
    raise ServerError(f"{client.address.host} refuses the requests: {refused[0]}")


async def find_text_length(client: Client, form: RequestForm) -> TextLength | None:
    """Tokens of words, from two prompts; None where the server does not count them."""
    counts = []
    for words in (_FEW_WORDS, _MANY_WORDS):
        _, seen = await _try(client, form, _few_words(words))
        if seen.prompt_tokens is None:
            return None
        counts.append((words, seen.prompt_tokens))
    return TextLength.fitted(*counts)


def _forms(ids: bool, ignore_eos: bool | None, texts_too: bool) -> Iterator[tuple[bool, bool, bool]]:
    """Forms to try: with token ids, with ignore_eos, with usage; the richest first."""
    prompts = [True, False] if ids and texts_too else [ids]
    ends = [True, False] if ignore_eos is None else [ignore_eos]
    return itertools.product(prompts, ends, [True, False])


def _given_up(ids: bool, ignore_eos: bool, usage: bool, refused: Sequence[str]) -> Iterator[str]:
    """What had to be left out, in sentences with the server's words on the first request that it refused."""
    why = f" (it says: {refused[0]})" if refused else ""
    if ids:
        yield f"the server takes no token ids as a prompt, so prompts are words{why}"
    if ignore_eos:
        yield f"the server takes no ignore_eos, so answers may end early{why}"
    if usage:
        yield f"the server takes no stream_options, so events are counted in place of tokens{why}"


def _few_ids(ids: Sequence[int]) -> list[int]:
    return list(itertools.islice(itertools.cycle(ids), _FEW_WORDS))


def _few_words(count: int = _FEW_WORDS) -> str:
    return random_words(count, random.Random(count))


async def _try(client: Client, form: RequestForm, prompt: Any) -> tuple[Exchange, Observation]:
    ask = Ask(prompt, max_tokens=1)
    exchange = await client.exchange(form.route, form.encode(ask), lambda: 0.0)
    return exchange, observe(exchange, await read_slowly(exchange), ask, 0)


def _require_open(client: Client, exchange: Exchange) -> None:
    """Stop where no request can succeed; a server that is busy or fails is measured as it is."""
    failure = exchange.failure
    if exchange.status in (401, 403):
        raise ServerError(f"{client.address.host} answers {failure.message if failure else ''}{_KEY_HINT}")
    if failure and failure.kind in ("refused", "unreachable"):
        raise ServerError(f"{client.address.host} cannot be reached: {failure.message}; does the server run there?")


async def _tokenize(client: Client, model: str, text: str) -> list[int] | None:
    """Ids of a text, from vLLM's route of that name or llama.cpp's, which names its members otherwise."""
    bodies: tuple[Mapping[str, Any], ...] = (
        {"model": model, "prompt": text, "add_special_tokens": False},
        {"content": text},
    )
    for body in bodies:
        status, data = await _read_optional(client, "/tokenize", body)
        if status is None:
            return None
        tokens = data.get("tokens") if isinstance(data, dict) and status == 200 else None
        if isinstance(tokens, list) and tokens and all(isinstance(token, int) for token in tokens):
            return tokens
    return None


async def _version(client: Client) -> str | None:
    status, data = await _read_optional(client, "/version")
    return _text(data.get("version")) if status == 200 and isinstance(data, dict) else None


async def _read_optional(client: Client, path: str, body: Mapping[str, Any] | None = None) -> tuple[int | None, Any]:
    """As :func:`_read`, of a route that a server need not have; no status where it gives no answer there."""
    try:
        return await client.read(path, body)
    except _NO_ANSWER:
        return None, None


async def _read(client: Client, path: str) -> tuple[int, Any]:
    try:
        return await client.read(path)
    except _NO_ANSWER as error:
        said = failure_of(error, answered=False).message
        raise ServerError(
            f"{client.address.host} gives no answer at {path}: {said}; does the server run there?"
        ) from None


def _entries(data: Any) -> list[Mapping[str, Any]]:
    entries = data.get("data") if isinstance(data, dict) else None
    found = entries if isinstance(entries, list) else []
    return [entry for entry in found if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None
