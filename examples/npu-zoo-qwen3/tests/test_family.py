"""The family's facts: hyperparameters, rows, prompts, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from npu_zoo import LLM, SamplingParams
from npu_zoo.api import FeatureRow, ModelConfig, UnsupportedError, WeightsError
from npu_zoo.testing.checkpoints import write_checkpoint
from npu_zoo_qwen3 import FAMILY

from .conftest import Launch, Write, change_config

# size: hidden, intermediate, layers, heads, tied, billions of parameters on the model's page
PUBLISHED = {
    "0.6b": (1024, 3072, 28, 16, True, 0.6),
    "1.7b": (2048, 6144, 28, 16, True, 1.7),
    "4b": (2560, 9728, 36, 32, True, 4.0),
    "8b": (4096, 12288, 36, 32, False, 8.2),
    "14b": (5120, 17408, 40, 40, False, 14.8),
    "32b": (5120, 25600, 64, 64, False, 32.8),
}


def config_of(size: str) -> ModelConfig:
    variant = FAMILY.variant(size)
    assert variant is not None
    assert variant.config is not None
    return variant.config


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_variant_has_its_checkpoints_hyperparameters(size: str) -> None:
    hidden, intermediate, layers, heads, tied, billions = PUBLISHED[size]
    published: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": [151645, 151643],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": 40960,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
    }
    assert config_of(size) == ModelConfig.from_hf(published)
    assert round(config_of(size).num_parameters / 1e9, 1) == billions


def test_the_bare_family_is_the_smallest_and_needs_weights() -> None:
    variant = FAMILY.variant(FAMILY.default_variant)
    assert variant is not None
    assert (variant.name, variant.huggingface) == ("0.6b-chat", "Qwen/Qwen3-0.6B")
    with pytest.raises(WeightsError, match=r"qwen3:0.6b-chat needs weights(.|\n)*npu-zoo pull qwen3:0.6b-chat"):
        LLM("qwen3", hardware="cpu")


@pytest.mark.parametrize("row", [row for row in FAMILY.rows if row.hardware != ("cpu",)], ids=lambda row: row.note)
def test_worlds_of_npus_share_heads_and_widths_evenly(row: FeatureRow) -> None:
    for size in set(row.sizes) - {"custom"}:
        config = config_of(size)
        for world in row.world_size:
            sizes = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
            assert all(part % world == 0 for part in sizes)


def test_an_npu_is_offered_as_an_experiment() -> None:
    with pytest.raises(UnsupportedError, match="--allow-experimental runs it"):
        LLM("qwen3:8b", hardware="atlas_800i_a2", dtype="bfloat16")
    with pytest.raises(UnsupportedError, match="world_size=1 is not supported by qwen3:32b"):
        LLM("qwen3:32b", hardware="atlas_800i_a2", dtype="bfloat16", world_size=1, allow_experimental=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": True}, "linear layers have biases"),
        ({"use_sliding_window": True}, "layers with a sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers with a sliding window"),
        ({"hidden_act": "gelu"}, "activation is gelu"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "qwen3 loads Qwen3ForCausalLM"),
    ],
)
def test_what_the_model_is_not_is_refused(changes: Any, named: str, write: Write, launch: Launch) -> None:
    with pytest.raises(WeightsError, match=named):
        launch(change_config(write(), **changes))


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "<think>\nOne and one.\n</think>\n\n2"},
    {"role": "user", "content": "And 2 + 2?"},
]
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    "<|im_start|>user\nAnd 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer has Qwen's special tokens, and puts none before a text, as Qwen's does not."""
    directory = write_checkpoint(
        tmp_path_factory.mktemp("chat"), architecture="Qwen3ForCausalLM", bos_token="<|endoftext|>",
        eos_token="<|im_end|>", added_tokens=("<|im_start|>",), head_dim=32,
    )  # fmt: skip
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"add_bos_token": False}), "utf-8")
    return directory


def test_conversations_are_chatml_without_earlier_reasoning(chatting: Path) -> None:
    llm = LLM("qwen3:custom", weights=str(chatting), hardware="cpu", dtype="float32", max_model_len=400)
    found = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=1))[0].prompt_token_ids
    tokenizer = Tokenizer.from_file(str(chatting / "tokenizer.json"))
    assert tokenizer.decode(found, skip_special_tokens=False) == CHATML
    assert tokenizer.token_to_id("<|im_start|>") in found


def test_importing_the_plugin_imports_no_torch() -> None:
    program = "import sys, npu_zoo_qwen3 as p; p.register_families(); p.register_kernels();"
    program += "p.register_quantization_methods(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_package_imports_the_two_surfaces_alone() -> None:
    import npu_zoo_qwen3

    folder = Path(npu_zoo_qwen3.__file__).parent
    lines = [line for file in folder.rglob("*.py") for line in file.read_text("utf-8").splitlines()]
    imports = [line.split()[1] for line in lines if line.strip().startswith(("from npu_zoo", "import npu_zoo"))]
    assert imports
    own = "npu_zoo_qwen3"
    assert [name for name in imports if name != "npu_zoo.api" and not name.startswith(("npu_zoo.nn", own))] == []
