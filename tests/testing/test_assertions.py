"""What a plugin's author asserts: it passes for sound plugins, and names row and axis where it does not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from npu_zoo.core.errors import NpuZooError, UnknownModelError, UsageError
from npu_zoo.engine.tokenizer import Tokenizer
from npu_zoo.registry import get_registry
from npu_zoo.testing import (
    assert_kernels_match_reference,
    assert_matches_reference,
    assert_matrix_builds,
    assert_spec_valid,
    isolated_registry,
    write_tiny_checkpoint,
)
from npu_zoo.testing.reference import transformers_logits

FAULTY = """
FAMILY = family({}, {'hardware': ('atlas_300i_duo',), 'dtype': ('bfloat16',)}, {'world_size': (3,)})
KERNELS = [
    kernel("faulty_reference", "{name}.kernels:scale", inputs="{name}.kernels:inputs"),
    kernel("faulty_cpu", "{name}.kernels:other", chip="cpu"),
]
"""
KERNELS = """
import torch


def inputs(rows, dtype, seed):
    return (torch.ones(rows, 4, dtype=dtype),)


def scale(x):
    return x * 2


def other(x):
    return x * 3
"""


@pytest.fixture
def plugin(
    tmp_path: Path, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., ModuleType]]:
    """Installs a plugin and imports it."""
    names: list[str] = []

    def make(name: str, *arguments: str, **files: str) -> ModuleType:
        install(tmp_path, name, *arguments, **files)
        names.append(name)
        monkeypatch.syspath_prepend(tmp_path)
        return __import__(name)

    yield make
    for module in [module for module in sys.modules if module.partition(".")[0] in names]:
        del sys.modules[module]


def test_a_sound_plugin_passes_by_module_and_by_name(plugin: Callable[..., ModuleType]) -> None:
    module = plugin("sound", "KERNELS = [kernel('own', '{name}.kernels:scale', inputs='{name}.kernels:inputs')]",
                    **{"kernels.py": KERNELS})  # fmt: skip
    for given in (module, "sound"):
        assert_spec_valid(given)
        assert_kernels_match_reference(given)
    assert_matrix_builds(module.FAMILY)
    with isolated_registry(module):
        assert_matrix_builds("sound")


@pytest.mark.long  # `make validate` judges the same claims
def test_the_zoo_s_own_pass() -> None:
    assert_spec_valid("native")
    assert_matrix_builds("wizardcoder")
    assert_kernels_match_reference("native")


def test_a_faulty_plugin_fails_by_row_and_axis(plugin: Callable[..., ModuleType]) -> None:
    module = plugin("faulty", FAULTY, **{"kernels.py": KERNELS})
    with pytest.raises(AssertionError) as spec:
        assert_spec_valid(module)
    lines = str(spec.value).splitlines()
    assert lines == [
        "faulty row 2: 1b on atlas_300i_duo in bfloat16 [dtype]: its chips have its dtypes: "
        "atlas_300i_duo has no bfloat16: ascend310p computes in float32, float16"
    ]
    with pytest.raises(AssertionError, match=r"faulty row 3: 1b-chat of .* \[world_size\]: builds on 3 ranks: "):
        assert_matrix_builds(module.FAMILY)
    with pytest.raises(AssertionError, match=r"faulty: kernel faulty_cpu \[dtype\]: .*: results differ by 0\.\d+ of"):
        assert_kernels_match_reference(module)


def test_kernels_that_cannot_be_run_are_no_success(plugin: Callable[..., ModuleType]) -> None:
    specs = "KERNELS = [kernel('own', '{name}.kernels:scale', chip='ascend910b', priority=5)]"
    module = plugin("elsewhere", specs, **{"kernels.py": KERNELS})
    with pytest.raises(AssertionError, match="no kernel could be run here: this machine has no atlas_800i_a2 or"):
        assert_kernels_match_reference(module)


def test_what_is_not_installed_is_said() -> None:
    with pytest.raises(AssertionError, match="no plugin is named 'orchid'; installed: "):
        assert_spec_valid("orchid")
    with pytest.raises(UnknownModelError, match="orchid"):
        assert_matrix_builds("orchid")


def test_a_plugin_that_does_not_load_is_said() -> None:
    with pytest.raises(AssertionError, match=r"raising \[plugin\]: loads: RuntimeError: no licence"):
        assert_spec_valid(_raising())


def _raising() -> ModuleType:
    from npu_zoo.api import hookimpl

    module = ModuleType("raising")

    @hookimpl
    def register_families() -> list[Any]:
        raise RuntimeError("no licence")

    module.register_families = register_families  # type: ignore[attr-defined]
    return module


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "new" / "folder", "wizardcoder", "34b")


def logits_of(weights: Path) -> Callable[[Sequence[int]], Any]:
    import transformers

    return transformers_logits(transformers.LlamaForCausalLM, weights)


def test_a_model_is_held_against_a_class_its_name_and_a_callable(weights: Path) -> None:
    import transformers

    few: dict[str, Any] = {"prompts": [(3, 4, 5)], "max_tokens": 2}
    assert_matches_reference("wizardcoder", transformers.LlamaForCausalLM, weights=weights, **few)
    assert_matches_reference(get_registry().families["wizardcoder"], "LlamaForCausalLM", **few)
    assert_matches_reference("wizardcoder", logits_of(weights), weights=weights, **few)


def test_a_wrong_reference_fails(weights: Path) -> None:
    import torch

    right = logits_of(weights)
    few: dict[str, Any] = {"weights": weights, "prompts": [(3, 4, 5)], "max_tokens": 2}
    nowhere = torch.tensor([[float("nan")], [0.0], [0.0]])
    cases: list[tuple[Callable[[Sequence[int]], Any], str]] = [
        (lambda ids: right(ids) * 1.01, "logits differ by up to .*, and 0.0001 is allowed"),
        (lambda ids: -right(ids), r"after 3 tokens the model goes on with \[.*\], the reference with \["),
        (lambda ids: right(ids) + (nowhere if len(ids) == 3 else 0), "logits differ by up to nan"),
        (lambda ids: right(ids)[-1:], r"the model gives logits \[3, 384\], the reference \[1, 384\]"),
    ]
    for reference, message in cases:
        with pytest.raises(AssertionError, match=message):
            assert_matches_reference("wizardcoder", reference, **few)


def test_a_reference_that_cannot_be_asked_is_said(weights: Path) -> None:
    for reference, message in (
        ("OrchidForCausalLM", "transformers has no class OrchidForCausalLM; name another, or give a callable"),
        (lambda ids: ids, "a callable speaks of weights of its own; write them first and give weights=DIR"),
    ):
        with pytest.raises(UsageError, match=message):
            assert_matches_reference("wizardcoder", reference)
    with pytest.raises(NpuZooError, match="Qwen2ForCausalLM finds missing tensors in"):
        assert_matches_reference("wizardcoder", "Qwen2ForCausalLM", weights=weights)


def test_a_tiny_checkpoint_has_a_hub_s_files(weights: Path) -> None:
    import npu_zoo

    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in weights.iterdir()} == names
    assert json.loads((weights / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    with npu_zoo.LLM(model="wizardcoder:custom", weights=str(weights), hardware="cpu", dtype="float32",
                     kv_cache_memory="16MiB", max_model_len=256) as llm:  # fmt: skip
        (output,) = llm.chat([{"role": "user", "content": "def f():"}], npu_zoo.SamplingParams(max_tokens=2))
    assert len(output.outputs[0].token_ids) >= 1
    tokenizer = Tokenizer(weights)
    prompt = tokenizer.decode(output.prompt_token_ids)
    assert prompt.startswith("Below is an instruction")  # the family's own template
    assert "def f():" in prompt
    text = "for item in range(10): ｜ \N{SNOWMAN}"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_tiny_checkpoint_is_its_seed_s(weights: Path, tmp_path: Path) -> None:
    same = write_tiny_checkpoint(tmp_path / "same", "wizardcoder", "34b")
    other = write_tiny_checkpoint(tmp_path / "other", "wizardcoder", "34b", seed=1)
    tensors = [(folder / "model.safetensors").read_bytes() for folder in (weights, same, other)]
    assert tensors[0] == tensors[1] != tensors[2]
    assert (same / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    changed = write_tiny_checkpoint(tmp_path / "changed", "wizardcoder", num_hidden_layers=1)
    assert json.loads((changed / "config.json").read_text())["num_hidden_layers"] == 1


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("99b", {}, "99b"),
        ("custom", {}, "custom"),
        (None, {"vocab_size": 12}, "vocab_size=12 is below the tokenizer's"),
    ],
)
def test_what_a_tiny_checkpoint_cannot_be_is_said(
    tmp_path: Path, variant: str | None, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        write_tiny_checkpoint(tmp_path, "wizardcoder", variant, **changes)
