"""The family's facts against real config.json files, and what its model makes of layers that predict further tokens."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.core.errors import WeightsError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.specs import VariantSpec
from npu_zoo.dispatch import resolve
from npu_zoo.plugins.deepseek_v3 import FAMILY
from npu_zoo.plugins.deepseek_v3.prompts import PROMPT, R1_PROMPT, V2_PROMPT
from npu_zoo.registry import get_registry
from npu_zoo.request import read_request
from npu_zoo.testing.checkpoints import write_checkpoint

R1_CONFIG = Path(__file__).parent.parent / "data" / "configs" / "deepseek-r1.xft.config.json"
CONFIGS = [
    ("v3", "DeepSeek-V3.aic.config.json"),
    ("v3", "DeepSeek-V3.ascend.config.json"),
    ("671b-base", "DeepSeek-V3.aic.config.json"),
    ("r1", "DeepSeek-R1.aic.config.json"),
    ("r1", "deepseek-r1.xft.config.json"),
    ("v2-lite", "DeepSeek-V2-Lite.kt.config.json"),
    ("v2-lite-base", "DeepSeek-V2-Lite.kt.config.json"),
]


def variant_of(name: str) -> VariantSpec:
    variant = FAMILY.variant(name)
    assert variant is not None
    return variant


def config_of(name: str) -> ModelConfig:
    config = variant_of(name).config
    assert config is not None
    return config


def r1_config() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(R1_CONFIG.read_text("utf-8"))
    return read


NAMES = [
    ("671b", "671b-v3", "671b", "DeepSeek-V3"),
    ("v3", "671b-v3", "671b", "DeepSeek-V3"),
    ("v3.1", "671b-v3.1", "671b", "DeepSeek-V3.1"),
    ("r1", "671b-r1", "671b", "DeepSeek-R1"),
    ("671b-base", "671b-base", "671b", "DeepSeek-V3-Base"),
    ("v2-lite", "v2-lite-chat", "v2-lite", "DeepSeek-V2-Lite-Chat"),
    ("v2-lite-base", "v2-lite-base", "v2-lite", "DeepSeek-V2-Lite"),
    ("v2-236b", "v2-236b-chat", "v2-236b", "DeepSeek-V2-Chat"),
    ("v2-236b-base", "v2-236b-base", "v2-236b", "DeepSeek-V2"),
]


@pytest.mark.parametrize(("asked", "name", "size", "hub"), NAMES)
def test_names(asked: str, name: str, size: str, hub: str) -> None:
    variant = variant_of(asked)
    assert variant is variant_of(name)
    assert (variant.name, variant.size) == (name, size)
    assert variant.huggingface == f"deepseek-ai/{hub}"
    assert variant.chat == (not name.endswith("-base"))


def test_what_stands_around_reasoning() -> None:
    reasoning = {v.name: (v.reasoning.start, v.reasoning.end) for v in FAMILY.variants if v.reasoning is not None}
    assert reasoning == dict.fromkeys(("671b-v3.1", "671b-r1"), ("<think>", "</think>"))


def assert_is(variant: str, raw: dict[str, Any]) -> None:
    """Every field is the file's, the compared ones and the others."""
    read = ModelConfig.from_hf(raw)
    assert config_of(variant).differences(read) == []
    assert config_of(variant) == read.model_copy(update={"extra": {}})


@pytest.mark.parametrize(("variant", "file"), CONFIGS)
def test_a_variant_has_its_checkpoints_hyperparameters(test_data: Path, variant: str, file: str) -> None:
    assert_is(variant, json.loads((test_data / "configs" / file).read_text("utf-8")))


@pytest.mark.parametrize("variant", ["v3", "v3.1", "r1", "671b-base"])
def test_the_671b_variants_have_one_shape(variant: str) -> None:
    assert_is(variant, r1_config())


def test_v2_lite_has_the_published_numbers() -> None:
    c = config_of("v2-lite")
    assert c.moe is not None
    assert c.mla is not None
    assert c.rope_scaling.yarn is not None
    shape = (c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads)
    assert shape == (102400, 2048, 10944, 27, 16)
    assert (c.mla.q_lora_rank, c.mla.kv_lora_rank, c.mla.cache_dim) == (None, 512, 576)
    moe = c.moe
    assert (moe.n_routed_experts, moe.n_shared_experts, moe.num_experts_per_tok) == (64, 2, 6)
    assert (moe.moe_intermediate_size, moe.first_k_dense_replace) == (1408, 1)
    assert (moe.scoring_func, moe.topk_method, moe.norm_topk_prob) == ("softmax", "greedy", False)
    yarn = c.rope_scaling.yarn
    assert (c.rope_scaling.factor, yarn.mscale, yarn.mscale_all_dim) == (40, 0.707, 0.707)


def test_v2_has_the_published_numbers() -> None:
    c = config_of("v2-236b")
    assert c.moe is not None
    assert c.mla is not None
    shape = (c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads)
    assert shape == (102400, 5120, 12288, 60, 128)
    assert (c.mla.q_lora_rank, c.mla.kv_lora_rank, c.mla.cache_dim) == (1536, 512, 576)
    moe = c.moe
    assert (moe.n_routed_experts, moe.n_shared_experts, moe.num_experts_per_tok) == (160, 2, 6)
    assert (moe.n_group, moe.topk_group, moe.routed_scaling_factor) == (8, 3, 16.0)
    assert (moe.moe_intermediate_size, moe.first_k_dense_replace) == (1536, 1)
    assert (moe.scoring_func, moe.topk_method, moe.norm_topk_prob) == ("softmax", "group_limited_greedy", False)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("671b", 671_026_419_200), ("v2-236b", 235_741_434_880), ("v2-lite", 15_706_484_224)],
)
def test_a_variants_shape_has_the_parameters_that_its_name_says(name: str, parameters: int) -> None:
    c = config_of(name)
    moe, mla = c.moe, c.mla
    assert moe is not None
    assert mla is not None
    heads = c.num_attention_heads
    rank = mla.q_lora_rank
    queries = (rank or c.hidden_size) * heads * mla.qk_head_dim + (c.hidden_size * rank + rank if rank else 0)
    latents = c.hidden_size * mla.cache_dim + mla.kv_lora_rank
    expanded = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    attention = queries + latents + expanded + heads * mla.v_head_dim * c.hidden_size
    experts = 3 * c.hidden_size * moe.moe_intermediate_size * (moe.n_routed_experts + moe.n_shared_experts)
    sparse = experts + moe.n_routed_experts * c.hidden_size
    dense = 3 * c.hidden_size * c.intermediate_size
    count = sum(moe.has_experts(layer) for layer in range(c.num_hidden_layers))
    layers = c.num_hidden_layers * (attention + 2 * c.hidden_size) + count * sparse
    layers += (c.num_hidden_layers - count) * dense
    biases = count * moe.n_routed_experts if moe.topk_method == "noaux_tc" else 0
    assert layers + biases + 2 * c.vocab_size * c.hidden_size + c.hidden_size == parameters


CHANGES: dict[str, Any] = {
    "hidden_size": 6144,
    "intermediate_size": 18304,
    "num_hidden_layers": 60,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "vocab_size": 129279,
    "rope_theta": 5e4,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "n_routed_experts": 128,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1024,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 2,
    "n_group": 4,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 256,
    "q_lora_rank": None,
    "v_head_dim": 64,
}
# Both parts of a query count towards its size.
RESIZED = {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32}


def names_of(differences: list[str]) -> list[str]:
    return sorted(line.partition(":")[0] for line in differences)


@pytest.mark.parametrize("key", [*CHANGES, *RESIZED])
def test_one_difference_is_named(key: str) -> None:
    changed = ModelConfig.from_hf(r1_config() | {key: (CHANGES | RESIZED)[key]})
    due = [key, "head_dim"] if key in RESIZED else [key]
    assert names_of(config_of("r1").differences(changed)) == sorted(due)


def test_every_difference_is_listed_at_once() -> None:
    found = config_of("r1").differences(ModelConfig.from_hf(r1_config() | CHANGES | RESIZED))
    assert names_of(found) == sorted([*CHANGES, *RESIZED, "head_dim"])
    assert "q_lora_rank: 1536, not none" in found
    assert "n_routed_experts: 256, not 128" in found


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("kv_lora_rank", {"kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}),
        ("n_routed_experts", {"n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "topk_method"}),
    ],
)
def test_a_checkpoint_without_a_part_differs_in_all_of_its_keys(key: str, names: set[str]) -> None:
    found = config_of("r1").differences(ModelConfig.from_hf(r1_config() | {key: None}))
    assert set(names_of(found)) >= names


def test_yarns_own_numbers_are_compared() -> None:
    raw = r1_config()
    raw["rope_scaling"] = raw["rope_scaling"] | {"mscale_all_dim": 0.707}
    (difference,) = config_of("r1").differences(ModelConfig.from_hf(raw))
    assert difference.startswith("rope_scaling: ")
    assert "0.707" in difference


def test_every_difference_is_listed_before_weights_are_read(tmp_path: Path) -> None:
    raw = {key: value for key, value in r1_config().items() if key != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(raw | CHANGES | RESIZED))
    (tmp_path / "model.safetensors").write_bytes(b"this is no safetensors file")
    args = EngineArgs(model="deepseek_v3:r1", weights=str(tmp_path), hardware="cpu")
    with pytest.raises(WeightsError, match="is not deepseek_v3:671b-r1") as error:
        resolve(args)
    assert all(f"\n  {key}: " in str(error.value) for key in (*CHANGES, *RESIZED, "head_dim"))


def read_config(directory: Path, raw: dict[str, Any]) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(raw))
    args = EngineArgs(model="deepseek_v3:custom", weights=str(directory), hardware="cpu")
    config = read_request(args, get_registry()).config
    assert config is not None
    return config


LATER = ("topk_method", "scoring_func", "aux_loss_alpha", "seq_aux", "pretraining_tp")


def test_a_v3_config_without_routing_keys_reads_as_v3_routes(tmp_path: Path) -> None:
    config = read_config(tmp_path, {key: value for key, value in r1_config().items() if key not in LATER})
    assert config.moe is not None
    assert (config.moe.topk_method, config.moe.scoring_func) == ("noaux_tc", "sigmoid")
    assert config_of("v3").differences(config) == []


def test_what_the_config_states_wins(tmp_path: Path) -> None:
    config = read_config(tmp_path, r1_config() | {"topk_method": "greedy", "scoring_func": "softmax"})
    assert config.moe is not None
    assert (config.moe.topk_method, config.moe.scoring_func) == ("greedy", "softmax")


def test_a_v2_config_without_routing_keys_reads_as_v2_routes(tmp_path: Path) -> None:
    raw = {key: value for key, value in r1_config().items() if key not in LATER}
    config = read_config(tmp_path, raw | {"architectures": ["DeepseekV2ForCausalLM"]})
    assert config.moe is not None
    assert (config.moe.topk_method, config.moe.scoring_func) == ("greedy", "softmax")


TINY: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    return write_checkpoint(directory, architecture="DeepseekV3ForCausalLM", tokenizer=False, seed=3, **TINY)


@pytest.fixture
def with_predicting_layers(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny checkpoint with the tensors of layers beyond its last one."""

    def write(*numbers: int, **config: Any) -> Path:
        tensors = load_file(tiny / "model.safetensors")
        block = {n.split(".", 3)[3]: t for n, t in tensors.items() if n.startswith("model.layers.1.")}
        hidden = int(tensors["model.norm.weight"].numel())
        block |= {name: torch.ones(hidden) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
        block |= {"eh_proj.weight": torch.ones(hidden, 2 * hidden)}
        block |= {"embed_tokens.weight": tensors["model.embed_tokens.weight"].clone()}
        block |= {"shared_head.head.weight": tensors["lm_head.weight"].clone()}
        more = {f"model.layers.{i}.{name}": t.clone() for i in numbers for name, t in block.items()}
        save_file(tensors | more, tmp_path / "model.safetensors", {"format": "pt"})
        raw = json.loads((tiny / "config.json").read_text("utf-8"))
        (tmp_path / "config.json").write_text(json.dumps(raw | config), "utf-8")
        return tmp_path

    return write


def launch(directory: Path) -> LLM:
    options: dict[str, Any] = {"dtype": "float32", "hardware": "cpu", "max_model_len": 64, "threads": 1}
    options |= {"kv_cache_memory": "4MiB", "block_size": 16, "skip_tokenizer_init": True}
    return LLM("deepseek_v3:custom", weights=str(directory), **options)


def computed(directory: Path) -> list[Any]:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3)
    outputs = launch(directory).generate([[5, 17, 200, 31], [9]], params)
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]


@pytest.mark.parametrize("numbers", [(2,), (2, 3)])
def test_layers_that_predict_further_tokens_are_left_out(
    tiny: Path, with_predicting_layers: Callable[..., Path], numbers: tuple[int, ...]
) -> None:
    assert "model.layers.2.eh_proj.weight" not in load_file(tiny / "model.safetensors")
    directory = with_predicting_layers(*numbers, num_nextn_predict_layers=len(numbers))
    assert computed(directory) == computed(tiny)


@pytest.mark.parametrize(("numbers", "stated"), [((2,), 0), ((2,), None), ((2, 3), 1), ((20,), 1)])
def test_layers_beyond_those_that_config_json_states_are_refused(
    with_predicting_layers: Callable[..., Path], numbers: tuple[int, ...], stated: int | None
) -> None:
    directory = with_predicting_layers(*numbers, num_nextn_predict_layers=stated)
    with pytest.raises(WeightsError, match=rf"unexpected:\n\s+model\.layers\.{numbers[-1]}\."):
        launch(directory)


def test_a_checkpoint_without_latent_attention_is_refused(tmp_path: Path, tiny: Path) -> None:
    raw = json.loads((tiny / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "kv_lora_rank"}))
    (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match="kv_lora_rank"):
        launch(tmp_path)


def resolved(name: str, directory: Path) -> EngineConfig:
    """A variant's checked request, were its checkpoint the tiny one."""
    variants = tuple(variant.model_copy(update={"config": None}) for variant in FAMILY.variants)
    registry = copy.copy(get_registry())
    registry.families = registry.families | {FAMILY.name: FAMILY.model_copy(update={"variants": variants})}
    args = EngineArgs(model=f"deepseek_v3:{name}", weights=str(directory), hardware="cpu", dtype="float32")
    return resolve(args, registry)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [("v3", PROMPT), ("r1", R1_PROMPT), ("v2-lite", V2_PROMPT), ("v2-236b", V2_PROMPT), ("custom", PROMPT)],
)
def test_a_checkpoint_without_a_template_chats_under_its_variants_prompt(name: str, prompt: Any, tiny: Path) -> None:
    assert resolved(name, tiny).prompt == prompt


def test_an_fp8_checkpoint_is_refused_with_the_conversion_command(tiny: Path, tmp_path: Path) -> None:
    raw = json.loads((tiny / "config.json").read_text("utf-8"))
    quantized = raw | {"quantization_config": r1_config()["quantization_config"]}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    (tmp_path / "model.safetensors").write_bytes(b"this is no safetensors file")
    with pytest.raises(WeightsError, match="fp8") as error:
        launch(tmp_path)
    text = str(error.value)
    assert f"  npu-zoo convert {tmp_path} {tmp_path}-bf16 --to hf-safetensors\n" in text
    assert text.endswith(f"then --weights {tmp_path}-bf16")
