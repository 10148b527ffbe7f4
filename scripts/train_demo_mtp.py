"""Add a layer that predicts further tokens to a demo checkpoint, whose own tensors stay as they are.

    python scripts/train_demo_mtp.py CHECKPOINT_DIR [--minutes N] [--threads N] [--seed N]

CHECKPOINT_DIR holds what train_demo.py has written, with its recipe.json, whose "mtp" says how the layer is trained.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from demo.corpus import load_corpus, read_heldout
from demo.export import readme, write_json, write_text, write_weights
from demo.layout import from_checkpoint
from demo.mtp import layer_tensors, share_foretold, train
from demo.recipe import JSON, Recipe, load_recipe
from demo.samples import SampleSource
from demo.tokenizer import role_ids
from safetensors.torch import load_file
from tokenizers import Tokenizer

PREFIX = "model.layers."
PROMPT_TOKENS = 128
"""Of a held-out text's beginning that is continued."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a trained demo checkpoint with its recipe.json")
    parser.add_argument("--minutes", type=float, default=15, help="training time, evaluation not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def own_tensors(folder: Path, layers: int) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors without those of layers beyond the model's own."""
    stored = load_file(folder / "model.safetensors")
    return {name: value for name, value in stored.items() if not _beyond(name, layers)}


def _beyond(name: str, layers: int) -> bool:
    return name.startswith(PREFIX) and int(name.removeprefix(PREFIX).partition(".")[0]) >= layers


def heldout_prompts(recipe: Recipe, tokenizer: Tokenizer, every: int, length: int) -> list[list[int]]:
    """Beginnings of windows of the held-out files, each behind bos."""
    bos = role_ids(tokenizer, recipe)["bos"]
    found = []
    for _, text in sorted(read_heldout(recipe.corpus["heldout"]).items()):
        ids = list(tokenizer.encode(text, add_special_tokens=False).ids)
        found += [[bos, *ids[start : start + length - 1]] for start in range(0, len(ids) - length, every)]
    return found


def main() -> int:
    """Train, write, measure what was written."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    folder: Path = options.checkpoint
    recipe = load_recipe(folder)
    config: JSON = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = own_tensors(folder, config["num_hidden_layers"])
    model = from_checkpoint(stored, config, recipe).requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    modules = load_corpus(recipe.corpus["exclude"], recipe.corpus["heldout"])
    source = SampleSource([m for i, m in enumerate(modules) if i % 25], tokenizer, recipe, options.seed)
    layer, progress = train(model, source, recipe.mtp, options.minutes * 60, options.seed, say)
    added = layer_tensors(model, layer, recipe)
    write_weights(stored | added, folder)
    limit = int(recipe.evaluation["max_new_tokens"])
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(value.bfloat16())
    prompts = heldout_prompts(recipe, tokenizer, int(recipe.evaluation["window"]), PROMPT_TOKENS)
    hits, total = share_foretold(model, layer, prompts, limit)
    card: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    card["weights_sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    card["mtp"] = {
        "layer": config["num_hidden_layers"],
        "parameters": sum(value.numel() for value in added.values()),
        "tokens_trained": progress.tokens,
        "steps": progress.step,
        "minutes": round(progress.seconds / 60, 1),
        "minutes_budget": options.minutes,
        "threads": options.threads,
        "seed": options.seed,
        "final_train_loss": round(progress.loss, 4),
        "own_tokens": int(recipe.mtp["own_rows"]) * int(recipe.mtp["own_length"]),
        "heldout_prompts": len(prompts),
        "prompt_tokens": PROMPT_TOKENS,
        "continued_tokens": limit,
        "heldout_greedy_tokens": total,
        "heldout_foretold": round(hits / total, 4),
    }
    write_json(folder / "card.json", card)
    write_text(folder / "README.md", readme(card, recipe))
    say(f"{hits} of {total} greedy tokens on held-out prompts foretold: {hits / total:.1%}")
    return 0


def say(line: str) -> None:
    """One line for the person who waits."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
