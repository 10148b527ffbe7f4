"""The module of latent attention against transformers' two, and what its up-projection stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from npu_zoo.core.attention import CacheLayout, LatentLayout, SequenceSlice
from npu_zoo.core.config import KernelChoice
from npu_zoo.core.errors import EngineError, WeightsError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.nn.attention import latent as latent_module
from npu_zoo.nn.attention import latent_pool
from npu_zoo.nn.attention.latent import PagedLatentAttention
from npu_zoo.nn.attention.paged import PagedAttention
from npu_zoo.nn.context import BuildContext, ForwardContext
from npu_zoo.nn.kernels.table import Kernels, bind_kernels
from npu_zoo.nn.mla import MultiHeadLatentAttention, UpProjection
from npu_zoo.nn.model import CausalLM, build_on_meta
from npu_zoo.nn.rotary import RotaryEmbedding, softmax_scale
from npu_zoo.registry import get_registry
from npu_zoo.selection import select_kernels
from npu_zoo.weights.load import load_weights
from npu_zoo.weights.safetensors import SafetensorsLoader

pytestmark = pytest.mark.usefixtures("inference")

CPU = torch.device("cpu")
NO_YARN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.707,
    "mscale_all_dim": 0.5,
}
SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 0.5,  # far from the norms' own inside
    "rope_parameters": YARN,
}
CLASSES: dict[str, tuple[Any, Any, Any]] = {
    "v3": (DeepseekV3Config, DeepseekV3Attention, DeepseekV3RotaryEmbedding),
    "v2": (DeepseekV2Config, DeepseekV2Attention, DeepseekV2RotaryEmbedding),
}
TABLES = {"a": [7, 2, 5, 0, 6], "b": [1, 9, 3], "c": [4, 8]}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kernels_of(chip: str, dtype: torch.dtype) -> Kernels:
    if chip == "cpu":
        return bind_kernels(select_kernels(get_registry().kernels, "cpu", str(dtype).removeprefix("torch.")))  # type: ignore[arg-type]
    references = [s for s in get_registry().kernels.values() if s.name.startswith("reference_")]
    return bind_kernels(KernelChoice(s.operation, s.name, s.implementation, "", True) for s in references)


class Theirs:
    """A random layer of transformers; every weight counts, the norms' too."""

    def __init__(self, kind: str, **changes: Any) -> None:
        config_class, attention_class, rotary_class = CLASSES[kind]
        self.config = config_class(**{**SHAPE, "rope_parameters": dict(YARN), **changes})
        self.config._attn_implementation = "eager"
        self.attention: nn.Module = attention_class(self.config, 0).eval()
        self.rotary: nn.Module = rotary_class(self.config)
        for seed, (name, parameter) in enumerate(self.attention.named_parameters()):
            scale = 0.5 if "layernorm" in name else parameter.shape[-1] ** -0.5
            parameter.data = ("layernorm" in name) + scale * noise(*parameter.shape, seed=seed)

    def __call__(self, x: Tensor) -> Tensor:
        """One sequence, [T, hidden_size], at once."""
        length = len(x)
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        rotation = self.rotary(x[None], torch.arange(length)[None])
        attended: Tensor = self.attention(x[None], attention_mask=mask, position_embeddings=rotation)[0][0]
        return attended


class OneLayer(CausalLM):
    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__(config, context)
        self.self_attn = MultiHeadLatentAttention(config, 0, context)
        self.rotary_emb = RotaryEmbedding(config, context)

    def forward(self, x: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        raise NotImplementedError

    def compute_logits(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError


class Ours:
    """Their layer's weights through a file into ours, over blocks of four tokens."""

    def __init__(self, theirs: Theirs, directory: Path, chip: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        tensors = {f"self_attn.{name}": tensor.contiguous() for name, tensor in theirs.attention.state_dict().items()}
        save_file(tensors, directory / "model.safetensors")
        self.config = ModelConfig.from_hf(theirs.config.to_dict())
        model = build_on_meta(OneLayer, self.config, BuildContext(kernels_of(chip, dtype), dtype, 128))
        assert isinstance(model, OneLayer)
        self.model = model
        model.allocate(CPU)
        loader = SafetensorsLoader(directory)
        load_weights(model.checkpoint_tensors(), loader, storage=model.storage_of, on_loaded=model.tensor_loaded)
        model.finish_loading()
        assert self.config.mla is not None
        layout = LatentLayout(1, self.config.mla, 10, 4)
        scale = softmax_scale(self.config)
        self.attention = PagedLatentAttention(layout, dtype, CPU, self.config.num_attention_heads, scale)
        self.attention.pool.fill_(torch.nan)

    def step(self, texts: dict[str, Tensor], rows: list[tuple[str, int, int]]) -> list[Tensor]:
        """Each (text, start, length)'s result."""
        x = torch.cat([texts[name][start : start + length] for name, start, length in rows])
        positions = torch.cat([torch.arange(start, start + length) for _, start, length in rows])
        slices = [SequenceSlice(start, length, TABLES[name]) for name, start, length in rows]
        context = ForwardContext(self.attention, self.attention.prepare(slices))
        out = self.model.self_attn(x, self.model.rotary_emb(positions), context)
        return list(out.split([length for *_, length in rows]))


STEPS = [
    [("a", 0, 11), ("b", 0, 3)],
    [("b", 3, 1), ("a", 11, 1)],
    [("c", 0, 6), ("a", 12, 5), ("b", 4, 1)],
    [("a", 17, 1), ("b", 5, 6), ("c", 6, 1)],
]
LENGTHS = {"a": 18, "b": 11, "c": 7}


def assert_is_transformers(theirs: Theirs, ours: Ours, dtype: torch.dtype, atol: float, scale: float = 1.0) -> None:
    texts = {name: scale * noise(length, 48, seed=length) for name, length in LENGTHS.items()}
    due = {name: theirs(x) for name, x in texts.items()}
    given = {name: x.to(dtype) for name, x in texts.items()}
    for rows in STEPS:
        for (name, start, length), found in zip(rows, ours.step(given, rows), strict=True):
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), due[name][start : start + length], rtol=atol, atol=atol)


@pytest.mark.parametrize("chip", ["cpu", "reference"])
@pytest.mark.parametrize("q_lora_rank", [None, 20])
@pytest.mark.parametrize(
    "rope",
    [NO_YARN, YARN, {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}],
    ids=["no-yarn", "two-mscales", "equal-mscales"],
)
@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_the_layer_is_transformers(
    kind: str, rope: dict[str, Any], q_lora_rank: int | None, chip: str, tmp_path: Path
) -> None:
    theirs = Theirs(kind, rope_parameters=dict(rope), q_lora_rank=q_lora_rank)
    assert_is_transformers(theirs, Ours(theirs, tmp_path, chip), torch.float32, 1e-5)


@pytest.mark.parametrize("absorbed", [True, False])
def test_either_form_of_the_attention_is_transformers(
    absorbed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_pool, "prefers_absorbed", lambda *_: absorbed)
    monkeypatch.setattr(latent_module, "_EXPANDED_TOKENS", 5)
    theirs = Theirs("v3", q_lora_rank=20)
    assert_is_transformers(theirs, Ours(theirs, tmp_path), torch.float32, 1e-5)


def test_small_latents_meet_the_norms_own_epsilon(tmp_path: Path) -> None:
    """Where the epsilon is most of the norm, it is the fixed one and not the config's."""
    theirs = Theirs("v3", q_lora_rank=20)
    assert_is_transformers(theirs, Ours(theirs, tmp_path), torch.float32, 1e-5, scale=1e-3)


def test_bfloat16_is_close(tmp_path: Path) -> None:
    theirs = Theirs("v3", q_lora_rank=20)
    assert_is_transformers(theirs, Ours(theirs, tmp_path, dtype=torch.bfloat16), torch.bfloat16, 5e-2)


@pytest.mark.parametrize("q_lora_rank", [None, 20])
def test_parameters_have_the_checkpoints_names(q_lora_rank: int | None) -> None:
    theirs = Theirs("v3", q_lora_rank=q_lora_rank)
    config = ModelConfig.from_hf(theirs.config.to_dict())
    model = build_on_meta(OneLayer, config, BuildContext(kernels_of("cpu", torch.float32), torch.float32, 128))
    found = {name: tensor.shape for name, tensor in model.checkpoint_tensors().items()}
    assert found == {f"self_attn.{name}": tensor.shape for name, tensor in theirs.attention.state_dict().items()}


def projection(dtype: torch.dtype = torch.float32, chip: str = "cpu") -> tuple[UpProjection, Tensor]:
    """A loaded one, not packed yet, and its weight in float32, [heads, nope + v, rank]."""
    config = ModelConfig.from_hf(DeepseekV3Config(**{**SHAPE, "rope_parameters": dict(YARN)}).to_dict())
    assert config.mla is not None
    made = UpProjection(3, config.mla, BuildContext(kernels_of(chip, dtype), dtype, 128))
    made.weight.data = noise(3 * 32, 24).to(dtype)
    return made, made.weight.data.float().clone().view(3, 32, 24)


def held(module: UpProjection) -> int:
    """Bytes of all storages that a module keeps alive by its attributes."""
    tensors = [value for value in [*vars(module).values(), *module.parameters()] if isinstance(value, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("chip", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_keeps_the_weights_bytes_and_no_more(dtype: torch.dtype, chip: str) -> None:
    made, weight = projection(dtype, chip)
    size = weight.numel() * dtype.itemsize
    assert held(made) == size
    assert made.packs
    made.pack()
    assert made.keys is not None
    assert made.values is not None
    assert torch.equal(made.keys.float(), weight[:, :12])
    assert torch.equal(made.values.float(), weight[:, 12:].transpose(1, 2))
    assert made.keys.is_contiguous()
    assert made.values.is_contiguous()
    assert held(made) == size
    kept = made.keys, made.values
    made.pack()
    assert (made.keys, made.values) == kept
    made.expand(noise(5, 24).to(dtype))
    made.absorb(noise(5, 3, 12).to(dtype))
    made.project(noise(5, 3, 24).to(dtype))
    assert held(made) == size


def test_loading_gives_the_buffer_of_the_weight_back(tmp_path: Path) -> None:
    made = Ours(Theirs("v3"), tmp_path).model.self_attn.kv_b_proj
    assert held(made) == 3 * 32 * 24 * 4


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("chip", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_absorbing_is_expanding_on_the_other_side(dtype: torch.dtype, chip: str, rows: int) -> None:
    made, weight = projection(dtype, chip)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    latent, query, shares = noise(9, 24), noise(rows, 3, 12, seed=1), noise(rows, 3, 9, seed=2).softmax(-1)
    keys, values = F.linear(latent, weight.flatten(0, 1)).view(9, 3, 32).split((12, 20), dim=-1)
    found = made.expand(latent.to(dtype))
    assert [one.shape for one in found] == [(3, 12, 9), (3, 9, 20)]
    for one, due in zip(found, (keys.permute(1, 2, 0), values.transpose(0, 1)), strict=True):
        close(one, due, dtype, tolerance)
    scores = made.absorb(query.to(dtype)).float() @ latent.T
    close(scores.to(dtype), torch.einsum("thn,khn->thk", query, keys), dtype, tolerance)
    attended = made.project((shares @ latent).to(dtype))
    close(attended, torch.einsum("thk,khv->thv", shares, values), dtype, tolerance)


def close(found: Tensor, due: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    """Within a share of the largest value, which is what a sum of many products is rounded by."""
    assert found.dtype == dtype
    assert (found.float() - due).abs().max() <= tolerance * due.abs().max()


def test_a_config_without_latents_is_refused() -> None:
    values = {**SHAPE, "vocab_size": 9}
    del values["kv_lora_rank"]
    config = ModelConfig.from_hf({**values, "intermediate_size": 8})
    with pytest.raises(WeightsError, match="no kv_lora_rank; latent attention cannot be built"):
        MultiHeadLatentAttention(config, 0, BuildContext(kernels_of("cpu", torch.float32), torch.float32, 128))


def test_a_backend_that_stores_no_latents_is_refused(tmp_path: Path) -> None:
    ours = Ours(Theirs("v3"), tmp_path)
    by_head = PagedAttention(CacheLayout(1, 3, 20, 4, 4), torch.float32, CPU, 3, 1.0)
    context = ForwardContext(by_head, by_head.prepare([SequenceSlice(0, 1, [0])]))
    with pytest.raises(EngineError, match="PagedAttention stores no latents"):
        ours.model.self_attn(noise(1, 48), ours.model.rotary_emb(torch.zeros(1, dtype=torch.int64)), context)
    context = ForwardContext(ours.attention, ours.attention.prepare([SequenceSlice(0, 1, [0])]))
    with pytest.raises(EngineError, match="PagedLatentAttention stores no keys and values by head"):
        context.attend(0, *(noise(1, 3, 20) for _ in range(3)))
