"""Small random models that keep the sizes of a larger one which kernels and operators depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.core.specs import FamilySpec
from npu_zoo.registry import get_registry, load_code
from npu_zoo.selection import select_kernels

if TYPE_CHECKING:
    import torch

_HIDDEN = 256
_INTERMEDIATE = 192
_EXPERT = 32
_VOCABULARY = 320
_POSITIONS = 512
_LORA = 128


def rank_shape(config: ModelConfig, split: Split) -> ModelConfig:
    """A model of two layers with one rank's heads of a larger model; two of three kinds where it has experts.

    What operators depend on stays: heads, head sizes and latents, the number of experts and how they are chosen, the
    base of the rotation. Widths, layers, vocabulary and positions are small.

    Args:
        config: the model whose share is taken.
        split: how ranks share it.
    """
    moe, mla = config.moe, config.mla
    heads = config.num_attention_heads // split.tp
    dense = min(1, moe.first_k_dense_replace) if moe else 0
    return config.model_copy(
        update={
            "hidden_size": _HIDDEN,
            "intermediate_size": _INTERMEDIATE,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, config.num_key_value_heads // split.tp),
            "vocab_size": _VOCABULARY,
            "max_position_embeddings": _POSITIONS,
            "rope_scaling": type(config.rope_scaling)(),
            "bos_token_id": 1,
            "eos_token_id": (2,),
            "pad_token_id": None,
            "moe": moe and moe.model_copy(update={"moe_intermediate_size": _EXPERT, "first_k_dense_replace": dense}),
            "mla": mla and mla.model_copy(update={"q_lora_rank": mla.q_lora_rank and _LORA}),
        }
    )


def shareable_shape(family: FamilySpec, **changes: Any) -> ModelConfig:
    """A family's model as :func:`rank_shape` makes it, with eight heads and eight experts for ranks to share.

    Args:
        family: one that names the hyperparameters of a variant.
        changes: of its hyperparameters.
    """
    config = rank_shape(next(variant.config for variant in family.variants if variant.config), Split())
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8 if config.mla or config.moe else 4}
    config = config.model_copy(update={**heads, **changes})
    if config.moe is None:
        return config
    groups = {"n_group": 2, "topk_group": 1} if config.moe.n_group > 1 else {}
    few = {"n_routed_experts": 8, "num_experts_per_tok": 2, **groups}
    return config.model_copy(update={"moe": config.moe.model_copy(update=few)})


def write_random_model(directory: Path, family: FamilySpec, config: ModelConfig, seed: int = 0) -> Path:
    """Write a checkpoint of a family's own model class with random weights, without a tokenizer.

    Args:
        directory: is made where it does not exist.

    Returns:
        The directory.
    """
    import torch
    from safetensors.torch import save_file

    from npu_zoo.nn.context import BuildContext
    from npu_zoo.nn.kernels.table import bind_kernels
    from npu_zoo.nn.model import build_on_meta

    directory.mkdir(parents=True, exist_ok=True)
    kernels = bind_kernels(select_kernels(get_registry().kernels, "cpu", "float32", config))
    context = BuildContext(kernels, torch.float32, config.max_position_embeddings)
    model = build_on_meta(load_code(family.model), config, context)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _draw(view.shape, generator) for name, view in model.checkpoint_tensors().items()}
    (directory / "config.json").write_text(json.dumps(config.to_hf(), indent=2), "utf-8")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def _draw(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Matrices that keep the size of what they are multiplied with, and vectors near one, as norms have them."""
    import torch

    drawn = torch.randn(shape, generator=generator)
    return 1 + 0.1 * drawn if len(shape) < 2 else drawn.mul_(shape[-1] ** -0.5)
