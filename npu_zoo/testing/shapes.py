"""Small random models that keep the sizes of a larger one which kernels and operators depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_zoo.core.features import FeatureRow
from npu_zoo.core.model_config import ModelConfig, MoEConfig
from npu_zoo.core.parallel import Split
from npu_zoo.core.specs import FamilySpec, VariantSpec
from npu_zoo.registry import get_registry, load_code
from npu_zoo.request import bundled_directory, read_model_config
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


def configs_of(family: FamilySpec, row: FeatureRow) -> list[ModelConfig]:
    """The models that a row speaks of, each once: its variants', or another's of the family for what takes any.

    Empty where the family names no hyperparameters at all.
    """
    own = [variant for variant in family.variants if variant.size in row.sizes]
    found = [config for variant in own if (config := config_of(variant, family))]
    if not found:
        found = [config for variant in family.variants if (config := config_of(variant, family))][:1]
    bare = {"eos_token_id": (), "bos_token_id": None, "pad_token_id": None}
    distinct = {config.model_copy(update=bare).model_dump_json(): config for config in reversed(found)}
    return list(reversed(distinct.values()))


def config_of(variant: VariantSpec, family: FamilySpec) -> ModelConfig | None:
    """A variant's hyperparameters, or those of its bundled checkpoint; None for what takes any."""
    directory = bundled_directory(variant)
    return variant.config if directory is None else read_model_config(directory, family)


def kind_of(config: ModelConfig) -> tuple[object, ...]:
    """What of a model decides which code computes it, beside sizes: models of one kind are alike to a test."""
    moe, mla = config.moe, config.mla
    sharing = (config.num_key_value_heads < config.num_attention_heads, config.num_key_value_heads == 1)
    routing = moe and (moe.topk_method, moe.scoring_func, moe.norm_topk_prob, moe.n_group > 1, moe.n_shared_experts > 0)
    latent = mla and mla.q_lora_rank is not None
    return (config.architecture, sharing, config.rope_scaling.kind, config.tie_word_embeddings, routing, latent)


def shared_kind_of(config: ModelConfig) -> tuple[object, ...]:
    """What of a kind decides how ranks share it, in one family: not how positions are scaled or experts chosen."""
    moe, mla = config.moe, config.mla
    sharing = (config.num_key_value_heads < config.num_attention_heads, config.num_key_value_heads == 1)
    experts = moe and moe.n_shared_experts > 0
    return (sharing, config.tie_word_embeddings, experts, mla and mla.q_lora_rank is not None)


def kinds_of(family: FamilySpec, row: FeatureRow) -> list[ModelConfig]:
    """One of the models that a row speaks of for each of their kinds."""
    return list({kind_of(config): config for config in reversed(configs_of(family, row))}.values())[::-1]


_RANKS = 12
"""Heads, experts and widths are multiples of it, so that up to four ranks, and six, can share them."""


def tiny_config(config: ModelConfig) -> ModelConfig:
    """A model of the same kind as another and of four layers, which up to four ranks share in every way.

    What tells kinds apart stays: see :func:`kind_of`.
    """
    moe, mla, scaling = config.moe, config.mla, config.rope_scaling
    grouped = config.num_key_value_heads < config.num_attention_heads
    head_dim = _LATENT["qk_nope_head_dim"] + _LATENT["qk_rope_head_dim"] if mla else _TINY_HEAD
    stretched = {
        "factor": 4.0,
        "parameters": {**scaling.parameters, "original_max_position_embeddings": _POSITIONS // 4},
    }
    return config.model_copy(
        update={
            "hidden_size": 8 * _RANKS,
            "intermediate_size": 32 * _RANKS,
            "num_hidden_layers": 4,
            "num_attention_heads": 2 * _RANKS if grouped else _RANKS,
            "num_key_value_heads": 1 if config.num_key_value_heads == 1 and grouped else _RANKS,
            "head_dim": head_dim,
            "vocab_size": 32 * _RANKS,
            "max_position_embeddings": _POSITIONS,
            "rope_scaling": scaling.model_copy(update=stretched) if scaling.yarn else scaling,
            "bos_token_id": 1,
            "eos_token_id": (2,),
            "pad_token_id": None,
            "moe": moe and _tiny_experts(moe),
            "mla": mla
            and mla.model_copy(update={**_LATENT, "q_lora_rank": mla.q_lora_rank and _LATENT["kv_lora_rank"]}),
        }
    )


_TINY_HEAD = 16
_LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}


def _tiny_experts(moe: MoEConfig) -> MoEConfig:
    groups = {"n_group": 4, "topk_group": 2} if moe.n_group > 1 else {}
    few = {"n_routed_experts": _RANKS, "num_experts_per_tok": 3, "moe_intermediate_size": 8 * _RANKS, **groups}
    return moe.model_copy(update={**few, "first_k_dense_replace": min(1, moe.first_k_dense_replace)})


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

    What a checkpoint may lack it lacks, such as the head of a model that shares it with its embedding.

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
    choices = select_kernels(get_registry().kernels, "cpu", "float32", config, operations=family.operations)
    kernels = bind_kernels(choices)
    context = BuildContext(kernels, torch.float32, config.max_position_embeddings)
    model = build_on_meta(load_code(family.model), config, context)
    generator = torch.Generator().manual_seed(seed)
    due = {
        name: view.shape for name, view in model.checkpoint_tensors().items() if name not in model.optional_tensors()
    }
    tensors = {name: _draw(shape, generator) for name, shape in due.items()}
    (directory / "config.json").write_text(json.dumps(config.to_hf(), indent=2), "utf-8")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def _draw(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Matrices that keep the size of what they are multiplied with, and vectors near one, as norms have them."""
    import torch

    drawn = torch.randn(shape, generator=generator)
    return 1 + 0.1 * drawn if len(shape) < 2 else drawn.mul_(shape[-1] ** -0.5)
