"""Tiny checkpoints with random weights, in Hugging Face's layout."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_zoo.core.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_TEXT = "def main(args):\n    for item in range(10):\n        print(item)\n    return args\n"
_MERGED = 288  # the 256 bytes and some longer tokens
_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}


def write_checkpoint(
    directory: Path,
    *,
    architecture: str = "LlamaForCausalLM",
    seed: int = 0,
    tokenizer: bool = True,
    bos_token: str = "<s>",
    eos_token: str = "</s>",
    added_tokens: Sequence[str] = (),
    chat_template: str | None = None,
    **hyperparameters: Any,
) -> Path:
    """Write a random model of transformers: config.json, model.safetensors and tokenizer files.

    The weights are drawn wide enough that logits are well apart: another order of additions, as in another batch,
    does not change which token is the most likely.

    Args:
        directory: is made where it does not exist.
        architecture: a class of transformers.
        seed: of the weights; torch's global generator is left as it was.
        tokenizer: whether to write a ByteLevel BPE of 288 tokens and the special ones. Without it any ``vocab_size``
            will do, and ids 1 and 2 are the beginning and the end of a text.
        bos_token, eos_token: the tokenizer puts the first before every text; the second ends one.
        added_tokens: further special tokens, such as those of fill in the middle.
        chat_template: a Jinja template for tokenizer_config.json.
        hyperparameters: of the class's config. By default two layers of hidden size 64, four heads of
            size 16 with two for keys and values, a vocabulary of 320 and 512 positions.

    Returns:
        The directory.

    Raises:
        UsageError: ``vocab_size`` is too small for the tokenizer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shape = {**_SHAPE, "initializer_range": 0.2, **copy.deepcopy(hyperparameters)}
    ids: dict[str, int | None] = {"bos_token_id": 1, "eos_token_id": 2}
    if tokenizer:
        backend = byte_level_tokenizer((bos_token, eos_token, *added_tokens))
        size = backend.get_vocab_size()
        if size > shape["vocab_size"]:
            raise UsageError(
                f"vocab_size={shape['vocab_size']} is below the tokenizer's {size}; raise it or take tokenizer=False"
            )
        ids = {"bos_token_id": backend.token_to_id(bos_token), "eos_token_id": backend.token_to_id(eos_token)}
        save_tokenizer(directory, backend, bos_token, eos_token, chat_template)
    _save_model(directory, architecture, seed, {**ids, **shape})
    return directory


def byte_level_tokenizer(special_tokens: Sequence[str]) -> Backend:
    """A ByteLevel BPE of 288 tokens with special ones behind them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=_MERGED, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([_TEXT], trainer)
    backend.add_special_tokens([AddedToken(text, special=True) for text in special_tokens])
    return backend


def save_tokenizer(directory: Path, backend: Backend, bos: str, eos: str, chat_template: str | None) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "add_bos_token": True}
    template = {} if chat_template is None else {"chat_template": chat_template}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, **template}), "utf-8")


def _save_model(directory: Path, architecture: str, seed: int, hyperparameters: dict[str, Any]) -> None:
    import torch
    import transformers

    model_class = getattr(transformers, architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**hyperparameters))
    model.save_pretrained(directory)
