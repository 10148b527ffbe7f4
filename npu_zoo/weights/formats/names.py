"""What other formats call Hugging Face's tensors, and how ranks share each of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from npu_zoo.core.errors import WeightsError


@dataclass(frozen=True)
class TensorName:
    """A tensor in another format.

    Attributes:
        name: what the format calls it.
        split: the dimension that ranks share, as Hugging Face stores it; None where each has all of it.
        expert: the routed expert that it belongs to; such a one lies whole on the rank that has the expert.
    """

    name: str
    split: int | None
    expert: int | None = None


@dataclass(frozen=True)
class NameMap:
    """A format's names.

    Attributes:
        outer: whole names.
        prefixes: what stands before a layer's number here and there.
        inner: names within a layer, by regular expression; ``{0}`` and so on stand for its groups.
    """

    format: str
    outer: dict[str, tuple[str, int | None]]
    prefixes: tuple[str, str]
    inner: dict[str, tuple[str, int | None]]

    def to_format(self, name: str) -> TensorName:
        """What the format calls one of Hugging Face's tensors.

        Raises:
            WeightsError: it has no name for it.
        """
        if name in self.outer:
            return TensorName(*self.outer[name])
        layer = re.fullmatch(rf"{re.escape(self.prefixes[0])}(\d+)\.(.+)", name)
        for pattern, (target, split) in self.inner.items():
            match = re.fullmatch(pattern, layer[2]) if layer else None
            if layer and match:
                expert = re.search(r"experts\.(\d+)\.", layer[2])
                found = f"{self.prefixes[1]}{layer[1]}.{target.format(*match.groups())}"
                return TensorName(found, split, int(expert[1]) if expert else None)
        raise WeightsError(f"tensor {name}: {self.format} has no name for it")

    def from_format(self, name: str) -> str:
        """Hugging Face's name of one of the format's tensors.

        Raises:
            WeightsError: it is none of the format's names.
        """
        for ours, (theirs, _) in self.outer.items():
            if theirs == name:
                return ours
        layer = re.fullmatch(rf"{re.escape(self.prefixes[1])}(\d+)\.(.+)", name)
        for pattern, (target, _) in self.inner.items():
            back = re.escape(target).replace(r"\{0\}", r"(\d+)")
            match = re.fullmatch(back, layer[2]) if layer else None
            if layer and match:
                inner = pattern.replace(r"(\d+)", match[1]) if match.groups() else pattern
                return f"{self.prefixes[0]}{layer[1]}.{inner.replace(chr(92) + '.', '.')}"
        raise WeightsError(f"tensor {name} is none of {self.format}'s names")


MINDSPORE = NameMap(
    format="mindspore-ckpt",
    outer={
        "model.embed_tokens.weight": ("model.tok_embeddings.embedding_weight", 0),
        "model.norm.weight": ("model.norm_out.weight", None),
        "lm_head.weight": ("lm_head.weight", 0),
    },
    prefixes=("model.layers.", "model.layers."),
    inner={
        r"self_attn\.q_proj\.weight": ("attention.wq.weight", 0),
        r"self_attn\.k_proj\.weight": ("attention.wk.weight", 0),
        r"self_attn\.v_proj\.weight": ("attention.wv.weight", 0),
        r"self_attn\.o_proj\.weight": ("attention.wo.weight", 1),
        r"mlp\.gate_proj\.weight": ("feed_forward.w1.weight", 0),
        r"mlp\.down_proj\.weight": ("feed_forward.w2.weight", 1),
        r"mlp\.up_proj\.weight": ("feed_forward.w3.weight", 0),
        r"input_layernorm\.weight": ("attention_norm.weight", None),
        r"post_attention_layernorm\.weight": ("ffn_norm.weight", None),
    },
)
"""MindFormers' names of Llama-shaped models; nothing is transposed or permuted."""

_FEED_FORWARD = {
    r"gate_proj\.weight": ("w1.weight", 0),
    r"down_proj\.weight": ("w2.weight", 1),
    r"up_proj\.weight": ("w3.weight", 0),
}

ASCEND_MP = NameMap(
    format="ascend-mp",
    outer={
        "model.embed_tokens.weight": ("embed.weight", 0),
        "model.norm.weight": ("norm.weight", None),
        "lm_head.weight": ("head.weight", 0),
    },
    prefixes=("model.layers.", "layers."),
    inner={
        r"input_layernorm\.weight": ("attn_norm.weight", None),
        r"post_attention_layernorm\.weight": ("ffn_norm.weight", None),
        r"self_attn\.q_proj\.weight": ("attn.wq.weight", 0),
        r"self_attn\.k_proj\.weight": ("attn.wk.weight", 0),
        r"self_attn\.v_proj\.weight": ("attn.wv.weight", 0),
        r"self_attn\.q_a_proj\.weight": ("attn.wq_a.weight", None),
        r"self_attn\.q_a_layernorm\.weight": ("attn.q_norm.weight", None),
        r"self_attn\.q_b_proj\.weight": ("attn.wq_b.weight", 0),
        r"self_attn\.kv_a_proj_with_mqa\.weight": ("attn.wkv_a.weight", None),
        r"self_attn\.kv_a_layernorm\.weight": ("attn.kv_norm.weight", None),
        r"self_attn\.kv_b_proj\.weight": ("attn.wkv_b.weight", 0),
        r"self_attn\.o_proj\.weight": ("attn.wo.weight", 1),
        r"mlp\.gate\.weight": ("ffn.gate.weight", None),
        r"mlp\.gate\.e_score_correction_bias": ("ffn.gate.bias", None),
        **{rf"mlp\.{ours}": (f"ffn.{theirs}", split) for ours, (theirs, split) in _FEED_FORWARD.items()},
        **{
            rf"mlp\.shared_experts\.{ours}": (f"ffn.shared_experts.{theirs}", split)
            for ours, (theirs, split) in _FEED_FORWARD.items()
        },
        **{
            rf"mlp\.experts\.(\d+)\.{ours}": (f"ffn.experts.{{0}}.{theirs}", None)
            for ours, (theirs, _) in _FEED_FORWARD.items()
        },
    },
)
"""The names of the inference code that the layout is from, with k_proj and v_proj in the same manner."""
