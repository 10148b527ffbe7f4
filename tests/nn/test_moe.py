"""The layer of experts: routing and feed-forward against transformers, kernels against the reference, loading."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config, DeepseekV3ForCausalLM, Qwen2MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe, DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock, Qwen2MoeTopKRouter

from npu_zoo.core.config import KernelChoice
from npu_zoo.core.errors import WeightsError
from npu_zoo.core.model_config import ModelConfig, MoEConfig
from npu_zoo.core.specs import KernelSpec
from npu_zoo.nn.context import BuildContext, ForwardContext
from npu_zoo.nn.kernels import reference
from npu_zoo.nn.kernels.table import Kernels, bind_kernels
from npu_zoo.nn.linear import Linear
from npu_zoo.nn.model import CausalLM, build_on_meta
from npu_zoo.nn.moe import MoE
from npu_zoo.nn.routing import Routing
from npu_zoo.registry import get_registry, load_code
from npu_zoo.selection import select_kernels, unavailable
from npu_zoo.testing.checkpoints import write_checkpoint
from npu_zoo.weights.load import load_weights
from npu_zoo.weights.safetensors import SafetensorsLoader

pytestmark = pytest.mark.usefixtures("inference")

HIDDEN, WIDTH = 32, 24
ROUTE, EXPERTS = (
    [
        spec
        for spec in get_registry().kernels.values()
        if spec.operation == operation and spec.chip in ("any", "cpu") and not unavailable(spec)
    ]
    for operation in ("route_tokens", "experts")
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kernels_of(chip: str, dtype: torch.dtype) -> Kernels:
    if chip == "cpu":
        return bind_kernels(select_kernels(get_registry().kernels, "cpu", str(dtype).removeprefix("torch.")))  # type: ignore[arg-type]
    references = [s for s in get_registry().kernels.values() if s.name.startswith("reference_")]
    return bind_kernels(KernelChoice(s.operation, s.name, s.implementation, "", True) for s in references)


def model_config(moe: MoEConfig | None, **changes: Any) -> ModelConfig:
    shape = {
        "hidden_size": HIDDEN,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    }
    return ModelConfig(moe=moe, **{**shape, **changes})


def build(moe: MoEConfig, kernels: Kernels, dtype: torch.dtype = torch.float32) -> MoE:
    return MoE(model_config(moe), BuildContext(kernels, dtype, 64))


def dense(weights: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """[T, num_experts] weights, zero where an expert was not chosen; the order of the choice does not show."""
    assert ids.shape == weights.shape
    assert all(len(set(row)) == len(row) for row in ids.tolist()), "an expert was chosen twice"
    return torch.zeros(len(ids), num_experts).scatter_(1, ids, weights.float())


@st.composite
def moe_configs(draw: st.DrawFn, method: str) -> MoEConfig:
    n_group = draw(st.sampled_from([1, 2, 4, 8]))
    per_group = draw(st.integers(2, 6))
    topk_group = draw(st.integers(1, n_group))
    return MoEConfig(
        n_routed_experts=n_group * per_group,
        moe_intermediate_size=WIDTH,
        num_experts_per_tok=draw(st.integers(1, min(8, topk_group * per_group))),
        n_group=n_group,
        topk_group=topk_group,
        topk_method=method,  # type: ignore[arg-type]
        scoring_func="sigmoid" if method == "noaux_tc" else "softmax",
        norm_topk_prob=draw(st.booleans()) if method != "group_limited_greedy" else False,
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5, 16.0])),
    )


def their_config(moe: MoEConfig) -> Any:
    """The config of the class of transformers that routes this way."""
    shape = {"hidden_size": HIDDEN, "experts_implementation": "eager", **moe.model_dump()}
    if moe.topk_method == "noaux_tc":
        return DeepseekV3Config(**shape)
    if not moe.norm_topk_prob:
        return DeepseekV2Config(**shape)
    shared = moe.n_shared_experts * moe.moe_intermediate_size
    return Qwen2MoeConfig(**shape, num_experts=moe.n_routed_experts, shared_expert_intermediate_size=shared)


def route_like_transformers(moe: MoEConfig, x: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    config = their_config(moe)
    router_class = {
        DeepseekV3Config: DeepseekV3TopkRouter,
        DeepseekV2Config: DeepseekV2TopkRouter,
        Qwen2MoeConfig: Qwen2MoeTopKRouter,
    }[type(config)]
    router = router_class(config)
    router.weight.data = gate
    if moe.topk_method == "noaux_tc":
        router.e_score_correction_bias.copy_(bias)
    _, weights, ids = router(x)
    return dense(weights, ids, moe.n_routed_experts)


@pytest.mark.parametrize("spec", ROUTE, ids=lambda spec: spec.name)
@pytest.mark.parametrize("method", ["noaux_tc", "group_limited_greedy", "greedy"])
def test_routing_is_transformers(spec: KernelSpec, method: str) -> None:
    @given(moe=moe_configs(method), tokens=st.integers(1, 9), seed=st.integers(0, 1000))
    def check(moe: MoEConfig, tokens: int, seed: int) -> None:
        # Qwen2Moe has no factor; elsewhere it is part of what is compared.
        plain = method == "greedy" and moe.norm_topk_prob
        moe = moe.model_copy(update={"routed_scaling_factor": 1.0}) if plain else moe
        x, gate = noise(tokens, HIDDEN, seed=seed), noise(moe.n_routed_experts, HIDDEN, seed=seed + 1) / 4
        bias = 2 * noise(moe.n_routed_experts, seed=seed + 2) - 1  # most are negative: zero is no mask for them
        due = route_like_transformers(moe, x, gate, bias)
        routing = Routing.from_config(moe)
        with torch.inference_mode():
            weights, ids = load_code(spec.implementation)(
                F.linear(x, gate), bias if routing.has_bias else None, routing
            )
        assert (weights.dtype, ids.dtype) == (torch.float32, torch.int64)
        assert weights.shape == ids.shape == (tokens, moe.num_experts_per_tok)
        assert torch.allclose(dense(weights, ids, moe.n_routed_experts), due, rtol=1e-6, atol=1e-7)

    check()


def logits_of(scores: list[float]) -> Tensor:
    """Logits whose sigmoids are the scores."""
    return torch.tensor([scores], dtype=torch.float64).logit().float()


@pytest.mark.parametrize("spec", ROUTE, ids=lambda spec: spec.name)
def test_a_bias_moves_the_choice_and_not_the_weights(spec: KernelSpec) -> None:
    route = load_code(spec.implementation)
    routing = Routing(2, "sigmoid", "noaux_tc", n_group=2, topk_group=1, renormalize=True, scaling_factor=2.5)
    logits = logits_of([0.9, 0.1, 0.1, 0.5, 0.5, 0.3])
    # The second group's best two add up to 1.0, as much as the first's; the bias decides for one and then the other.
    weights, ids = route(logits, torch.tensor([0.0, 0.0, -0.05, 0.1, 0.0, 0.0]), routing)
    assert ids.tolist() == [[3, 4]]
    assert weights.tolist() == [pytest.approx([1.25, 1.25])]
    weights, ids = route(logits, torch.tensor([-2.0, -2.0, -2.0, -3.0, -3.0, -3.0]), routing)
    assert sorted(ids[0].tolist()) in ([0, 1], [0, 2]), "a group that is out of reach was chosen for its bias"
    assert weights.tolist() == [pytest.approx([2.25, 0.25])]


@pytest.mark.parametrize("spec", ROUTE, ids=lambda spec: spec.name)
def test_the_group_of_the_best_expert_is_reached(spec: KernelSpec) -> None:
    """Limited by groups, greedy takes the group with the one best expert, where noaux_tc would take the other."""
    logits = torch.tensor([[0.5, 0.05, 0.05, 0.2, 0.2, 0.0001]]).log()
    routing = Routing(2, method="group_limited_greedy", n_group=2, topk_group=1, scaling_factor=16.0)
    weights, ids = load_code(spec.implementation)(logits, None, routing)
    assert ids[0, 0] == 0
    assert ids[0, 1] in (1, 2)
    assert weights.tolist() == [pytest.approx([8.0, 0.8], rel=1e-3)]


def test_groups_that_noaux_tc_cannot_score_are_refused() -> None:
    moe = MoEConfig(
        n_routed_experts=8,
        moe_intermediate_size=WIDTH,
        num_experts_per_tok=2,
        n_group=8,
        topk_group=4,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
    )
    with pytest.raises(WeightsError, match=r"noaux_tc with 8 experts in 8 groups; .* set n_group to 4 or less"):
        build(moe, kernels_of("cpu", torch.float32))


V3 = MoEConfig(
    n_routed_experts=16,
    moe_intermediate_size=WIDTH,
    num_experts_per_tok=4,
    n_shared_experts=1,
    n_group=4,
    topk_group=2,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
)
V2 = V3.model_copy(
    update={
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "n_shared_experts": 2,
        "routed_scaling_factor": 16.0,
    }
)
LITE = V2.model_copy(update={"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0})
MODELS = {"v3": V3, "v3_one_group": V3.model_copy(update={"n_group": 1, "topk_group": 1}), "v2": V2, "v2_lite": LITE}


def their_block(moe: MoEConfig) -> nn.Module:
    config = their_config(moe)
    block = DeepseekV3MoE(config) if moe.topk_method == "noaux_tc" else DeepseekV2Moe(config)
    for number, parameter in enumerate(block.parameters()):
        parameter.data = (noise(*parameter.shape, seed=number) / parameter.shape[-1] ** 0.5).bfloat16().float()
    if moe.topk_method == "noaux_tc":
        block.gate.e_score_correction_bias.copy_(noise(moe.n_routed_experts, seed=99) / 4)
    return block


def adopt(layer: MoE, theirs: Any) -> MoE:
    """Take the weights of one of transformers' blocks."""
    layer.gate.weight.copy_(theirs.gate.weight)
    if layer.gate.e_score_correction_bias is not None:
        layer.gate.e_score_correction_bias.copy_(theirs.gate.e_score_correction_bias)
    packed = zip(layer.experts.values(), theirs.experts.gate_up_proj, theirs.experts.down_proj, strict=True)
    for expert, gate_up, down in packed:
        expert.gate_up_proj.weight.copy_(gate_up)
        expert.down_proj.weight.copy_(down)
    if layer.shared_experts is not None:
        shared = theirs.shared_experts if hasattr(theirs, "shared_experts") else theirs.shared_expert
        layer.shared_experts.gate_up_proj.weight.copy_(torch.cat((shared.gate_proj.weight, shared.up_proj.weight)))
        layer.shared_experts.down_proj.weight.copy_(shared.down_proj.weight)
    for module in layer.modules():
        if isinstance(module, Linear):
            module.pack()
    return layer


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("chip", ["cpu", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_layer_is_transformers(name: str, chip: str, rows: int) -> None:
    theirs = their_block(MODELS[name])
    layer = adopt(build(MODELS[name], kernels_of(chip, torch.float32)), theirs)
    x = noise(rows, HIDDEN, seed=3)
    assert torch.allclose(layer(x), theirs(x[None])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("chip", ["cpu", "reference"])
def test_layer_is_the_construction_from_qwen2_moe(chip: str, norm: bool) -> None:
    """For the family that transformers lacks: a sigmoid of zero gates the shared experts, whose output is doubled."""
    moe = LITE.model_copy(update={"norm_topk_prob": norm})
    config = their_config(moe.model_copy(update={"norm_topk_prob": True}))
    config.norm_topk_prob = norm
    theirs = Qwen2MoeSparseMoeBlock(config)
    for number, parameter in enumerate(theirs.parameters()):
        parameter.data = noise(*parameter.shape, seed=number) / parameter.shape[-1] ** 0.5
    theirs.shared_expert_gate.weight.zero_()
    layer = adopt(build(moe, kernels_of(chip, torch.float32)), theirs)
    theirs.shared_expert.down_proj.weight.mul_(2)
    x = noise(11, HIDDEN, seed=3)
    assert torch.allclose(layer(x), theirs(x[None])[0], rtol=1e-5, atol=1e-5)


def root_mean_square(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("chip", ["cpu", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_no_worse_than_transformers(name: str, chip: str, rows: int) -> None:
    """Over 64 tokens, alone and together."""
    theirs, x = their_block(MODELS[name]), noise(64, HIDDEN, seed=3).bfloat16()
    layer = adopt(build(MODELS[name], kernels_of(chip, torch.bfloat16), torch.bfloat16), theirs)
    due = theirs(x.float()[None])[0]
    their_error = root_mean_square(theirs.bfloat16()(x[None])[0] - due)
    found = torch.cat([layer(part) for part in x.split(rows)])
    assert found.dtype == torch.bfloat16
    assert root_mean_square(found - due) <= 1.02 * their_error
    assert root_mean_square(found - due) <= 0.01 * root_mean_square(due)


def test_the_router_stays_in_float32() -> None:
    layer = build(V3, kernels_of("cpu", torch.bfloat16), torch.bfloat16)
    tensors = {name: p.dtype for name, p in layer.named_parameters()}
    assert {name for name, dtype in tensors.items() if dtype == torch.float32} == {
        "gate.weight",
        "gate.e_score_correction_bias",
    }
    assert set(tensors.values()) == {torch.float32, torch.bfloat16}


def test_without_shared_experts() -> None:
    moe = V3.model_copy(update={"n_shared_experts": 0})
    theirs = their_block(V3)
    layer = adopt(build(moe, kernels_of("cpu", torch.float32)), theirs)
    assert not [name for name, _ in layer.named_parameters() if "shared" in name]
    x = noise(5, HIDDEN)
    assert torch.allclose(layer(x) + theirs.shared_experts(x), theirs(x[None])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chip", ["cpu", "reference"])
def test_a_token_does_not_depend_on_the_others(chip: str) -> None:
    layer = adopt(build(V3, kernels_of(chip, torch.float32)), their_block(V3))
    x = noise(33, HIDDEN, seed=5)
    together = layer(x)
    alone = torch.cat([layer(row[None]) for row in x])
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(together, alone, rtol=1e-5, atol=2e-6)
    assert torch.allclose(together[order], layer(x[order]), rtol=1e-5, atol=2e-6)


def test_a_config_without_experts_or_with_another_activation_is_refused() -> None:
    context = BuildContext(kernels_of("cpu", torch.float32), torch.float32, 64)
    with pytest.raises(WeightsError, match="no n_routed_experts"):
        MoE(model_config(None), context)
    with pytest.raises(WeightsError, match="activation is gelu"):
        MoE(model_config(V3, hidden_act="gelu"), context)


TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 2e-3}


def experts_arguments(rows: int, dtype: torch.dtype, num_experts: int = 12, top_k: int = 3) -> tuple[Any, ...]:
    x = noise(rows, HIDDEN).to(dtype)
    weights, ids = noise(rows, num_experts, seed=1).softmax(-1).topk(top_k)
    gate_up = [(noise(2 * WIDTH, HIDDEN, seed=10 + n) / HIDDEN**0.5).to(dtype) for n in range(num_experts)]
    down = [(noise(HIDDEN, WIDTH, seed=100 + n) / WIDTH**0.5).to(dtype) for n in range(num_experts)]
    return x, ids, weights, gate_up, down


@pytest.mark.parametrize("rows", [0, 1, 2, 8, 33])
@pytest.mark.parametrize(
    ("spec", "dtype"), [(spec, dtype) for spec in EXPERTS for dtype in spec.dtypes], ids=lambda v: getattr(v, "name", v)
)
def test_experts_against_the_definition(spec: KernelSpec, dtype: str, rows: int) -> None:
    x, ids, weights, gate_up, down = experts_arguments(rows, getattr(torch, dtype))
    kept = [t.clone() for t in (x, ids, weights)]
    linear = kernels_of("cpu", getattr(torch, dtype)).linear
    packed = [linear.pack(w) for w in gate_up], [linear.pack(w) for w in down]
    found = load_code(spec.implementation)(x, ids, weights, *packed, linear, reference.silu_and_mul)
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    assert all(map(torch.equal, kept, (x, ids, weights))), "an argument was changed"
    for token in range(rows):
        row, due = x[token].float(), torch.zeros(HIDDEN)
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            gate, up = (gate_up[expert].float() @ row).chunk(2)
            due += weight * (down[expert].float() @ (F.silu(gate) * up))
        assert ((found[token].float() - due).abs() / (1 + due.abs())).max() <= TOLERANCE[dtype]


class Counting:
    """The plain products, noting which weight met how many rows."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}

    def packs(self, dtype: torch.dtype) -> bool:
        return False

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def apply(self, x: Tensor, packed: Tensor) -> Tensor:
        self.rows.setdefault(id(packed), []).append(len(x))
        return F.linear(x, packed)


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("spec", EXPERTS, ids=lambda spec: spec.name)
def test_each_expert_that_was_hit_is_computed_once_for_its_tokens_and_no_other(spec: KernelSpec, rows: int) -> None:
    x, ids, weights, gate_up, down = experts_arguments(rows, torch.float32)
    ids = ids % 7  # experts 7 to 11 are hit by none
    ids[:] = torch.stack([torch.tensor([0, 3, 5 + number % 2]) for number in range(rows)])
    linear = Counting()
    load_code(spec.implementation)(x, ids, weights, gate_up, down, linear, reference.silu_and_mul)
    due = {0: rows, 3: rows, 5: (rows + 1) // 2, 6: rows // 2}
    assert linear.rows == {id(table[n]): [count] for table in (gate_up, down) for n, count in due.items() if count}


class OneLayer(CausalLM):
    """A model that is nothing but a layer of experts."""

    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__(config, context)
        self.mlp = MoE(config, context)

    def forward(self, x: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        raise NotImplementedError

    def compute_logits(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], nn.Module]:
    """What transformers writes of the layer of experts of a whole model, and that layer."""
    directory = write_checkpoint(
        tmp_path_factory.mktemp("moe"),
        architecture="DeepseekV3ForCausalLM",
        tokenizer=False,
        hidden_size=HIDDEN,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        **V3.model_dump(exclude={"first_k_dense_replace"}),
    )
    tensors = load_file(directory / "model.safetensors")
    prefix = "model.layers.1."
    layer = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix + "mlp.")}
    layer["mlp.gate.e_score_correction_bias"] = noise(V3.n_routed_experts) / 4
    model = DeepseekV3ForCausalLM.from_pretrained(directory, experts_implementation="eager")
    theirs = model.model.layers[1].mlp
    theirs.gate.e_score_correction_bias.copy_(layer["mlp.gate.e_score_correction_bias"])
    return layer, theirs


def load(tensors: dict[str, Tensor], directory: Path, chip: str, dtype: torch.dtype = torch.float32) -> OneLayer:
    save_file(tensors, directory / "model.safetensors")
    model = build_on_meta(OneLayer, model_config(V3), BuildContext(kernels_of(chip, dtype), dtype, 64))
    assert isinstance(model, OneLayer)
    model.allocate(torch.device("cpu"))
    loader = SafetensorsLoader(directory)
    load_weights(model.checkpoint_tensors(), loader, storage=model.storage_of, on_loaded=model.tensor_loaded)
    model.finish_loading()
    return model


@pytest.mark.parametrize("chip", ["cpu", "reference"])
def test_a_checkpoint_of_transformers_is_loaded(
    saved: tuple[dict[str, Tensor], nn.Module], tmp_path: Path, chip: str
) -> None:
    tensors, theirs = saved
    assert sum(".experts." in name for name in tensors) == 3 * V3.n_routed_experts
    model, x = load(tensors, tmp_path, chip), noise(9, HIDDEN)
    assert torch.allclose(model.mlp(x), theirs(x[None])[0], rtol=1e-4, atol=1e-4)


def test_router_weights_are_exact_in_a_bfloat16_model(
    saved: tuple[dict[str, Tensor], nn.Module], tmp_path: Path
) -> None:
    model = load(saved[0], tmp_path, "cpu", torch.bfloat16)
    bias = model.mlp.gate.e_score_correction_bias
    assert bias is not None
    assert torch.equal(bias, saved[0]["mlp.gate.e_score_correction_bias"])
    assert torch.equal(model.mlp.gate.weight, saved[0]["mlp.gate.weight"])


@pytest.mark.parametrize(
    "name",
    [
        "mlp.experts.11.up_proj.weight",
        "mlp.experts.0.down_proj.weight",
        "mlp.gate.e_score_correction_bias",
        "mlp.shared_experts.gate_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(saved: tuple[dict[str, Tensor], nn.Module], tmp_path: Path, name: str) -> None:
    tensors = {key: tensor for key, tensor in saved[0].items() if key != name}
    with pytest.raises(WeightsError, match=rf"1 missing:\s+{name}\n"):
        load(tensors, tmp_path, "cpu")


def test_a_surplus_expert_is_named(saved: tuple[dict[str, Tensor], nn.Module], tmp_path: Path) -> None:
    extra = {"mlp.experts.16.up_proj.weight": torch.zeros(WIDTH, HIDDEN)}
    with pytest.raises(WeightsError, match=r"1 unexpected:\s+mlp.experts.16.up_proj.weight\n"):
        load({**saved[0], **extra}, tmp_path, "cpu")


def test_the_layer_multiplies_with_what_the_kernel_packed(saved: tuple[dict[str, Tensor], nn.Module]) -> None:
    """Every product of the layer goes through the bound linear kernel, the shared experts' too."""
    linear = Counting()
    kernels = dataclasses.replace(kernels_of("reference", torch.float32), linear=linear)
    layer = adopt(build(V3, kernels), saved[1])
    layer(noise(1, HIDDEN))
    assert len(linear.rows) == 2 * (V3.num_experts_per_tok + 1)
