"""The files of a demo checkpoint, written as a hub checkpoint would have them."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from .evaluation import (
    PARSE_DEFINITION,
    PERPLEXITY_DEFINITION,
    Completion,
    Logits,
    complete_prompts,
    heldout_perplexity,
    parse_share,
    parses,
)
from .layout import Model, freeze_reference, from_checkpoint, parse_config, reference_config
from .recipe import JSON, Recipe
from .tokenizer import role_ids

_LICENCE = """\
## Licence

The weights, the tokenizer and the cards are under Apache-2.0, like the project. The training text is the CPython
standard library, Copyright (c) Python Software Foundation, under the PSF License Version 2; none of its files is
part of this folder.
"""


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A new file's or folder's temporary place; it takes the target's name when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=target.parent)) / target.name
    try:
        yield part
        part.replace(target)
    finally:
        shutil.rmtree(part.parent, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Write a text file at once or not at all."""
    with replaced(target) as part:
        part.write_text(text, encoding="utf-8")


def write_json(target: Path, data: Any) -> None:
    """Write readable JSON at once or not at all."""
    write_text(target, json.dumps(data, ensure_ascii=False, indent=2) + "\n")


def model_config(recipe: Recipe, tokenizer: Tokenizer) -> JSON:
    """``config.json``: the recipe's fields and the token ids."""
    ids = role_ids(tokenizer, recipe)
    config = {**recipe.config, "bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["pad"]}
    return dict(sorted(config.items()))


def stop_ids(recipe: Recipe, tokenizer: Tokenizer) -> list[int]:
    """Ids that end a generation."""
    ids = role_ids(tokenizer, recipe)
    return list(dict.fromkeys([ids["eos"], ids["document_end"]]))


def new_model(recipe: Recipe, config: JSON) -> Model:
    """A model with random weights for ``config.json``'s fields."""
    parsed = parse_config(reference_config(recipe, config))
    parsed._experts_implementation = "eager"
    factory: Any = transformers.AutoModelForCausalLM
    model = factory.from_config(parsed, dtype=torch.float32, attn_implementation="sdpa")
    freeze_reference(model, recipe)
    return model


def write_descriptions(recipe: Recipe, tokenizer: Tokenizer, out: Path) -> None:
    """``config.json``, ``generation_config.json`` and the tokenizer's files."""
    config = model_config(recipe, tokenizer)
    write_json(out / "config.json", config)
    generation = {
        **recipe.generation,
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": stop_ids(recipe, tokenizer),
        "pad_token_id": config["pad_token_id"],
    }
    write_json(out / "generation_config.json", generation)
    names = recipe.token_names
    described = {
        **recipe.tokenizer["config"],
        "bos_token": names["bos"],
        "eos_token": names["eos"],
        "pad_token": names["pad"],
    }
    if recipe.template_in_checkpoint:
        described["chat_template"] = recipe.chat_template
    write_json(out / "tokenizer_config.json", described)
    write_text(out / "tokenizer.json", tokenizer.to_str())


def write_weights(stored: dict[str, Tensor], out: Path) -> None:
    """``model.safetensors``."""
    with replaced(out / "model.safetensors") as part:
        save_file(stored, part, metadata={"format": "pt"})
        # The library keeps its files to their owner; this one ships with a package.
        part.chmod(0o644)


def load_logits(out: Path, recipe: Recipe) -> Logits:
    """The exported model as a callable, in float32 with the stored weights."""
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    model = from_checkpoint(load_file(out / "model.safetensors"), config, recipe)

    def logits(ids: list[int]) -> Tensor:
        with torch.no_grad():
            result: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return result

    return logits


def evaluate(out: Path, recipe: Recipe, heldout: dict[str, str]) -> tuple[JSON, list[Completion]]:
    """The figures of an exported checkpoint and the completions behind the parse share."""
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    logits = load_logits(out, recipe)
    bos = role_ids(tokenizer, recipe)["bos"]
    window, limit = int(recipe.evaluation["window"]), int(recipe.evaluation["max_new_tokens"])

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    measured = heldout_perplexity(heldout, encode, bos, logits, window)
    stop = stop_ids(recipe, tokenizer)
    completions = complete_prompts(recipe.prompts, encode, decode, bos, logits, stop, limit)
    good, total = parse_share(completions)
    figures: JSON = {
        "heldout_files": sorted(heldout),
        "heldout_bytes": measured.byte_count,
        "heldout_tokens": measured.tokens,
        "heldout_perplexity": round(measured.per_token, 4),
        "heldout_bits_per_byte": round(measured.bits_per_byte, 4),
        "parse_share": f"{good}/{total}",
        "prompts_not_parsed": [index for index, item in enumerate(completions) if not parses(item)],
        "max_new_tokens": limit,
        "evaluation_dtype": "float32 (weights as stored in bfloat16)",
        "perplexity_definition": PERPLEXITY_DEFINITION.format(window=window, text=window - 1),
        "parse_share_definition": PARSE_DEFINITION.format(max_new_tokens=limit),
    }
    return figures, completions


def surroundings() -> JSON:
    """Versions that the result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _paragraph(text: str, bullet: str = "") -> str:
    words = " ".join(text.split())
    return textwrap.fill(
        words,
        width=118,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_long_words=False,
        break_on_hyphens=False,
    )


_KINDS = {
    "documents": "*documents* is running text",
    "units": "*units* are single functions, classes and compound statements",
    "infill": "*infill* are prefix-suffix-middle examples",
    "chat": "*chat* are questions answered with a function or class of the corpus",
}


def _training_facts(card: JSON, recipe: Recipe) -> str:
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in card["mixture"].items())
    facts = [
        f"""Corpus: {card["corpus"]}, {card["corpus_files"]} files, {card["corpus_bytes"]:,} bytes,
        {card["corpus_tokens"]:,} tokens; tests, generated tables and the held-out modules are left out.""",
        "Tokenizer: byte-level BPE trained on the same corpus.",
        f"Samples (share of the tokens): {shares}. {'; '.join(_KINDS[kind] for kind in card['mixture'])}.",
        f"""{card["tokens_trained"]:,} tokens in {card["steps"]:,} steps of {recipe.training["batch_rows"]} x
        {recipe.sequence_length} tokens, {card["minutes"]} minutes on {card["threads"]} CPU threads, seed
        {card["seed"]}; last training loss {card["final_train_loss"]} nats per token. Trained with Python
        {card["python"]}, torch {card["torch"]}, transformers {card["transformers"]}.""",
    ]
    if "kept_step" in card:
        facts.append(
            f"""{card["validation_files"]} further files of the corpus were kept from training (the tokenizer knows
            them) and measured every few minutes, as running text; the weights are those of step
            {card["kept_step"]:,}, where their loss was least ({card["validation_loss"]} nats per token)."""
        )
    if card["note"]:
        facts.append(card["note"])
    return "\n".join(_paragraph(fact, "* ") for fact in facts)


def _mtp_section(card: JSON) -> str:
    """What the card tells of the layer that predicts further tokens; nothing where there is none."""
    mtp = card.get("mtp")
    if mtp is None:
        return ""
    training = f"""Layer {mtp["layer"]} predicts the token after the next one, for speculative decoding
        (`--speculative-method mtp`). Its {mtp["parameters"]:,} parameters began as a copy of the last layer and were
        trained on the frozen model, whose own tensors are the same as before: {mtp["tokens_trained"]:,} tokens in
        {mtp["steps"]:,} steps, {mtp["minutes"]} minutes on {mtp["threads"]} CPU threads, seed {mtp["seed"]}. The rows
        are those of the corpus and {mtp["own_tokens"]:,} tokens that the model wrote itself; the target is the model's
        own distribution, one, two and three tokens ahead. It shares embedding and head with the model, so the file
        holds no copies of them."""
    figure = f"""*Greedy tokens foretold.* {mtp["heldout_prompts"]} beginnings of {mtp["prompt_tokens"]} tokens of the
        held-out files are continued greedily by {mtp["continued_tokens"]} tokens. Of each but the first, the layer's
        most likely token is compared with the one that the model chose: {mtp["heldout_foretold"]:.1%} of
        {mtp["heldout_greedy_tokens"]:,} are the same (float32, stored weights upcast)."""
    return f"""## The layer that predicts further tokens

{_paragraph(training)}

{_paragraph(figure)}

To train it again: `python scripts/train_demo_mtp.py CHECKPOINT_DIR --minutes {mtp["minutes_budget"]:g}`.

"""


def readme(card: JSON, recipe: Recipe) -> str:
    """The human card, made from the machine-readable one."""
    names = ", ".join(f"`{name}`" for name in card["heldout_files"])
    heldout = f"""The {len(card["heldout_files"])} held-out files ({card["heldout_bytes"]:,} bytes,
        {card["heldout_tokens"]:,} tokens) are standard library modules that neither the model nor the tokenizer was
        trained on: {names}."""
    return f"""# {recipe.title}

{_paragraph(recipe.summary)}

**It is not** a released model and holds no weight of one: it was trained from random weights, has
{card["parameters"]:,} parameters and can write plausible lines of Python, not useful programs. Its figures say
nothing about the family's real checkpoints, which need no file of this folder.

## Training

{_training_facts(card, recipe)}

To train it again: `python scripts/train_demo.py RECIPE_DIR --out DIR --minutes {card["minutes_budget"]:g}`
(`RECIPE_DIR` is this folder). The learning rate follows the clock, so a repetition on another machine gives a
similar checkpoint, not the same bytes.

## Figures

| Figure | Value |
| --- | --- |
| Held-out perplexity per token | {card["heldout_perplexity"]} |
| Held-out bits per byte | {card["heldout_bits_per_byte"]} |
| Greedy completions that parse | {card["parse_share"]} |

{_paragraph("*Perplexity.* " + card["perplexity_definition"] + " " + heldout)}

{_paragraph("*Parse share.* " + card["parse_share_definition"])}

Both definitions are functions of `scripts/demo/evaluation.py`; `card.json` holds the same facts for programs.

{_mtp_section(card)}{_LICENCE}"""
