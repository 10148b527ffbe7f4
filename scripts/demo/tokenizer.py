"""A byte-level BPE tokenizer trained on the corpus, and the chat template's rendering."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .recipe import Recipe


def train_tokenizer(texts: Iterable[str], recipe: Recipe) -> Tokenizer:
    """Train the BPE on ``texts`` and append the family's special tokens behind its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    # A line break and the indentation behind it are tokens of their own: a prompt that ends after either of them
    # is then cut at a place where training data are cut too.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[\r\n]"), "isolated"),
            pre_tokenizers.Split(Regex("^[ \t]+"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=int(recipe.tokenizer["bpe_size"]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    for entry in recipe.tokenizer["special_tokens"]:
        token = AddedToken(entry["content"], special=entry["special"], normalized=False)
        (tokenizer.add_special_tokens if entry["special"] else tokenizer.add_tokens)([token])
    rows = int(recipe.config["vocab_size"])
    if not tokenizer.get_vocab_size() <= rows:
        raise ValueError(f"tokenizer has {tokenizer.get_vocab_size()} tokens, config.json only {rows} rows")
    return tokenizer


def role_ids(tokenizer: Tokenizer, recipe: Recipe) -> dict[str, int]:
    """Ids of the tokens that play a role (``bos``, ``eos``, ``pad``, ``document_end``)."""
    return {role: token_id(tokenizer, name) for role, name in recipe.token_names.items()}


def token_id(tokenizer: Tokenizer, name: str) -> int:
    """Id of a token that must exist."""
    found = tokenizer.token_to_id(name)
    if found is None:
        raise ValueError(f"the tokenizer has no token {name!r}")
    return found


class ChatRenderer:
    """Renders conversations the way model hubs' tools render a ``chat_template``."""

    def __init__(self, template: str, bos: str, eos: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(template)
        self._tokens = {"bos_token": bos, "eos_token": eos}

    def __call__(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        """Text of the conversation."""
        values: dict[str, Any] = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return self._template.render(**values, **self._tokens)
