"""The two figures of a demo checkpoint: held-out perplexity and the share of completions that parse.

Both take plain callables, so that any engine can be measured with the same definition.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

Encode = Callable[[str], list[int]]
"""Text to token ids, no token added."""

Decode = Callable[[list[int]], str]
"""Token ids to text."""

Logits = Callable[[list[int]], torch.Tensor]
"""Token ids to logits of shape ``(len(ids), vocabulary)``."""

PERPLEXITY_DEFINITION = (
    "For each held-out file in the sorted order of the names, text tokens are encode(text). They are cut to "
    "consecutive windows of {window} tokens: bos and {text} text tokens (the last window of a file may be shorter). "
    "The figure is exp of the mean negative log-likelihood over all text tokens of all windows, each predicted from "
    "bos and the text tokens before it in its window, computed in float32 with the stored bfloat16 weights upcast "
    "to float32. Bits per byte are the summed negative log-likelihood in bits over the UTF-8 bytes of the files."
)

PARSE_DEFINITION = (
    "For each prompt of prompts.json, bos + encode(prompt) is continued greedily (float32, stored bfloat16 weights "
    "upcast) by at most {max_new_tokens} tokens, stopping before an end token. Prompt and completion together are "
    "kept whole when an end token stopped the completion, and cut behind the last line break otherwise. A prompt "
    "counts when the kept text parses with ast.parse and holds at least one character of the completion that is "
    "not whitespace."
)


@dataclass(frozen=True)
class Perplexity:
    """Summed negative log-likelihood (in nats) with the counts that the figures are made from."""

    nll: float
    tokens: int
    byte_count: int

    @property
    def per_token(self) -> float:
        """Perplexity per token."""
        return math.exp(self.nll / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the held-out text."""
        return self.nll / math.log(2) / self.byte_count


@dataclass(frozen=True)
class Completion:
    """A greedy continuation; ``stopped`` tells that the model ended it with an end token."""

    prompt: str
    text: str
    stopped: bool


def heldout_perplexity(
    texts: Mapping[str, str], encode: Encode, bos: int, logits: Logits, window: int = 512
) -> Perplexity:
    """Measure ``texts`` (file name to text) as ``PERPLEXITY_DEFINITION`` says."""
    total, count, size = 0.0, 0, 0
    for name in sorted(texts):
        ids = encode(texts[name])
        size += len(texts[name].encode())
        for start in range(0, len(ids), window - 1):
            targets = ids[start : start + window - 1]
            scores = logits([bos, *targets])[:-1].float()
            total += float(torch.nn.functional.cross_entropy(scores, torch.tensor(targets), reduction="sum"))
            count += len(targets)
    return Perplexity(total, count, size)


def greedy(ids: list[int], logits: Logits, stop: Collection[int], max_new_tokens: int) -> tuple[list[int], bool]:
    """Continue ``ids`` greedily; the new tokens without the end token, and whether one was met."""
    new: list[int] = []
    for _ in range(max_new_tokens):
        best = int(logits([*ids, *new])[-1].argmax())
        if best in stop:
            return new, True
        new.append(best)
    return new, False


def complete_prompts(
    prompts: Sequence[str],
    encode: Encode,
    decode: Decode,
    bos: int,
    logits: Logits,
    stop: Collection[int],
    max_new_tokens: int = 64,
) -> list[Completion]:
    """Greedy completions of plain prompts."""
    found = []
    for prompt in prompts:
        new, stopped = greedy([bos, *encode(prompt)], logits, stop, max_new_tokens)
        found.append(Completion(prompt, decode(new), stopped))
    return found


def parses(completion: Completion) -> bool:
    """Whether a completion counts, as ``PARSE_DEFINITION`` says."""
    text = completion.prompt + completion.text
    if not completion.stopped:
        text = text[: text.rfind("\n") + 1]
    if not text[len(completion.prompt) :].strip():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except (SyntaxError, ValueError):
            return False
    return True


def parse_share(completions: Sequence[Completion]) -> tuple[int, int]:
    """How many completions count, and of how many."""
    return sum(parses(completion) for completion in completions), len(completions)
