"""Tiny checkpoints of any family: random weights of its own model class, with files as a hub has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from npu_zoo.core.errors import UsageError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.specs import FamilySpec, VariantSpec
from npu_zoo.registry import get_registry
from npu_zoo.testing.checkpoints import byte_level_tokenizer, save_tokenizer
from npu_zoo.testing.shapes import config_of, tiny_config, write_random_model

BOS, EOS = "<s>", "</s>"


def write_tiny_checkpoint(
    directory: Path, family: FamilySpec | str, variant: str | None = None, *, seed: int = 0, **changes: Any
) -> Path:
    """Write a tiny checkpoint of a family, in Hugging Face's layout.

    config.json, model.safetensors, tokenizer.json (a ByteLevel BPE with the family's special tokens),
    tokenizer_config.json with its chat template, and generation_config.json.

    Args:
        directory: is made where it does not exist.
        family: a spec, or the name of a registered one.
        variant: whose kind of model it is (see :func:`npu_zoo.testing.tiny_config`); the first with hyperparameters
            where it is left out.
        seed: of the weights.
        changes: of the tiny model's hyperparameters (:class:`npu_zoo.api.ModelConfig`).

    Returns:
        The directory.

    Raises:
        UsageError: the family has no such variant, or names no hyperparameters at all.
    """
    spec = get_registry().find(family)[0] if isinstance(family, str) else family
    chosen, config = shaped_variant(spec, variant)
    config = tiny_config(config).model_copy(update=changes)
    directory.mkdir(parents=True, exist_ok=True)
    markers = (spec.fim.begin, spec.fim.hole, spec.fim.end) if spec.fim else ()
    tokenizer = byte_level_tokenizer((BOS, EOS, *markers))
    ids = {"bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": (tokenizer.token_to_id(EOS),)}
    config = config.model_copy(update=ids)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise UsageError(
            f"vocab_size={config.vocab_size} is below the tokenizer's {tokenizer.get_vocab_size()}; raise it"
        )
    prompt = chosen.prompt or spec.prompt
    save_tokenizer(directory, tokenizer, BOS, EOS, prompt.chat_template if prompt else None)
    generation = {"bos_token_id": ids["bos_token_id"], "eos_token_id": list(config.eos_token_id)}
    (directory / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    return write_random_model(directory, spec, config, seed)


def shaped_variant(family: FamilySpec, name: str | None) -> tuple[VariantSpec, ModelConfig]:
    """A variant with its hyperparameters; the first that has any where none is named.

    Raises:
        UsageError: there is none.
    """
    named = family.variants if name is None else [variant for variant in [family.variant(name)] if variant]
    for variant in named:
        config = config_of(variant, family)
        if config is not None:
            return variant, config
    names = ", ".join(variant.name for variant in family.variants if config_of(variant, family))
    what = f"'{name}' of {family.name}" if name else f"no variant of {family.name}"
    raise UsageError(f"{what} has hyperparameters (VariantSpec.config); those that have: {names or 'none'}")
