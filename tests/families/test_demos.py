"""Every family's bundled checkpoint: its size and shape, and its card's figures, measured anew through the engine."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.engine.tokenizer import Tokenizer
from npu_zoo.registry import get_registry
from npu_zoo.request import bundled_directory

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

FAMILIES = sorted(name for name, family in get_registry().families.items() if family.variant("demo"))
WINDOW = 511


def directory_of(family: str) -> Path:
    variant = get_registry().families[family].variant("demo")
    assert variant is not None
    directory = bundled_directory(variant)
    assert directory is not None
    return directory


class Demo:
    """A family's bundled checkpoint, running."""

    def __init__(self, family: str) -> None:
        self.family = get_registry().families[family]
        self.directory = directory_of(family)
        self.card: dict[str, Any] = json.loads((self.directory / "card.json").read_text("utf-8"))
        self.tokenizer = Tokenizer(self.directory)
        options: dict[str, Any] = {"dtype": "float32", "max_num_batched_tokens": 4096, "kv_cache_memory": "256MiB"}
        self.llm = LLM(model=family, **options)


@pytest.fixture(scope="module", params=FAMILIES)
def demo(request: pytest.FixtureRequest) -> Demo:
    return Demo(request.param)


def test_all_of_them_are_small() -> None:
    assert len(FAMILIES) == 4
    assert sum(file.stat().st_size for name in FAMILIES for file in directory_of(name).iterdir()) <= 22_000_000


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_is_one_that_ascend_operators_take(family: str) -> None:
    config = ModelConfig.from_hf(json.loads((directory_of(family) / "config.json").read_text("utf-8")))
    spec = get_registry().families[family]
    assert config.architecture in spec.architectures
    if config.mla:
        mla = config.mla
        sizes = (mla.kv_lora_rank, mla.qk_rope_head_dim, mla.qk_nope_head_dim, mla.v_head_dim)
        assert sizes == (512, 64, 128, 128)
        assert config.num_attention_heads.bit_count() == 1
    else:
        assert config.head_dim == 128
    if config.moe:
        assert config.moe.moe_intermediate_size % 16 == 0
        assert config.moe.n_routed_experts // config.moe.n_group > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_is_as_the_recipe_says(family: str) -> None:
    directory = directory_of(family)
    config = json.loads((directory / "config.json").read_text("utf-8"))
    recipe = json.loads((directory / "recipe.json").read_text("utf-8"))
    assert {key: value for key, value in config.items() if not key.endswith("_token_id")} == recipe["config"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_speaks_of_these_weights(family: str) -> None:
    directory = directory_of(family)
    card = json.loads((directory / "card.json").read_text("utf-8"))
    assert card["weights_sha256"] == hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    for figure in ("heldout_perplexity", "parse_share"):
        assert str(card[figure]) in (directory / "README.md").read_text("utf-8")


def test_conversations_are_answered_with_code_and_end(demo: Demo) -> None:
    names = ("isdir(path)", "close(self)", "get_name(self)", "add(a, b)", "read(self, size)", "main()")
    asked = [[{"role": "user", "content": f"Write a Python function `{name}`."}] for name in names]
    outputs = demo.llm.chat(asked, SamplingParams(temperature=0, max_tokens=200))
    answers = [output.outputs[0] for output in outputs]
    assert sum(answer.finish_reason == "stop" for answer in answers) >= len(names) / 2
    defined = [f"def {name.partition('(')[0]}" in answer.text for name, answer in zip(names, answers, strict=True)]
    assert sum(defined) > len(names) / 2


@pytest.mark.long
def test_the_cards_perplexity_is_what_the_engine_computes(demo: Demo) -> None:
    files = sorted((ROOT / "tests" / "data" / "demo_heldout").glob("*.txt"))
    assert [file.name.removesuffix(".txt") for file in files] == demo.card["heldout_files"]
    windows = []
    for file in files:
        ids = demo.tokenizer.encode(file.read_text(encoding="utf-8"), add_special_tokens=False)
        assert demo.tokenizer.bos_token_id is not None
        windows += [[demo.tokenizer.bos_token_id, *ids[at : at + WINDOW]] for at in range(0, len(ids), WINDOW)]
    outputs = demo.llm.generate(windows, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    logprobs = [
        entry[token].logprob
        for window, output in zip(windows, outputs, strict=True)
        for token, entry in zip(window, output.prompt_logprobs or [], strict=True)
        if entry is not None
    ]
    assert len(logprobs) == demo.card["heldout_tokens"]
    assert math.exp(-sum(logprobs) / len(logprobs)) == pytest.approx(demo.card["heldout_perplexity"], rel=1e-3)


def test_the_cards_share_of_parsing_completions_is_what_the_engine_gives(demo: Demo) -> None:
    from demo.evaluation import Completion, parse_share  # type: ignore[import-not-found]

    prompts = json.loads((demo.directory / "prompts.json").read_text("utf-8"))
    assert len(prompts) == 50
    outputs = demo.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64))
    completions = [
        Completion(prompt, output.outputs[0].text, output.outputs[0].finish_reason == "stop")
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    parsed, count = parse_share(completions)
    stated = int(str(demo.card["parse_share"]).split("/")[0])
    # Another CPU may round a near tie the other way.
    assert abs(parsed - stated) <= 2
    assert parsed > count / 4
