"""The recipe: everything about a demo checkpoint that belongs to its model family."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

JSON = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Parsed ``recipe.json`` of one family.

    ``config`` holds the fields of the exported ``config.json``; token ids in it are filled in from the tokenizer.
    """

    name: str
    title: str
    summary: str
    config: JSON
    generation: JSON
    tokenizer: JSON
    infill: dict[str, str]
    chat_template: str
    chat_systems: list[str]
    corpus: JSON
    mixture: dict[str, float]
    training: JSON
    evaluation: JSON
    prompts: list[str]
    reference: JSON = field(default_factory=dict)
    """The transformers model that is trained in the architecture's place; see ``layout.py``."""
    mtp: JSON = field(default_factory=dict)
    """How the layer that predicts further tokens is trained; see ``mtp.py``. Empty where the family has none."""
    template_adds_bos: bool = True
    template_in_checkpoint: bool = True
    """Whether tokenizer_config.json gets the chat template; else the family's plugin brings it."""

    @property
    def sequence_length(self) -> int:
        """Tokens of one training row."""
        return int(self.training["sequence_length"])

    @property
    def token_names(self) -> dict[str, str]:
        """Roles (``bos``, ``eos``, ``pad``, ``document_end``) mapped to token texts."""
        return dict(self.tokenizer["roles"])


def load_recipe(folder: Path) -> Recipe:
    """Read ``recipe.json`` and ``prompts.json`` from ``folder``."""
    data = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    if len(set(prompts)) != len(prompts):
        raise ValueError("prompts.json holds a prompt twice")
    return Recipe(prompts=prompts, **data)
