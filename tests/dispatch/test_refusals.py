"""What is refused before a weight is read: too large for the machine, another architecture, splits of experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import HardwareError, WeightsError
from npu_zoo.dispatch import resolve

GIB = 2**30
Weights = Callable[..., Path]


@pytest.fixture
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_zoo.dispatch.total_memory", lambda: 16 * GIB)


@pytest.mark.usefixtures("laptop")
@pytest.mark.parametrize(
    ("model", "dtype", "needed"),
    [
        ("deepseek_v3:671b", "bf16", "1,250 GiB for its 671.0 billion parameters in bfloat16"),
        ("deepseek_v3:v2-lite", "fp32", "59 GiB for its 15.7 billion parameters in float32"),
        ("deepseek_moe:16b", "bf16", "31 GiB for its 16.4 billion parameters in bfloat16"),
    ],
)
def test_a_model_beyond_the_machines_memory(model: str, dtype: str, needed: str) -> None:
    with pytest.raises(HardwareError) as refusal:
        resolve(EngineArgs(model=model, hardware="cpu", dtype=dtype))
    assert needed in str(refusal.value)
    assert "this machine has 16 GiB" in str(refusal.value)
    assert refusal.value.exit_code == 4


@pytest.mark.usefixtures("laptop")
def test_what_fits_is_asked_for_its_weights() -> None:
    with pytest.raises(WeightsError, match="needs weights"):
        resolve(EngineArgs(model="deepseek_coder:6.7b", hardware="cpu", dtype="bf16"))


def test_weights_of_a_custom_model_are_measured_too(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_zoo.dispatch.total_memory", lambda: 100_000)
    asked = EngineArgs(model="deepseek_coder:custom", weights=str(weights()), hardware="cpu", dtype="fp32")
    with pytest.raises(HardwareError, match="billion parameters in float32"):
        resolve(asked)


def test_another_familys_checkpoint_names_who_loads_it(weights: Weights) -> None:
    directory = weights(architectures=["DeepseekForCausalLM"])
    with pytest.raises(WeightsError) as refusal:
        resolve(EngineArgs(model="deepseek_coder:6.7b", weights=str(directory), hardware="cpu"))
    lines = str(refusal.value).splitlines()
    assert lines[1] == "  architecture: DeepseekForCausalLM, and deepseek_coder loads LlamaForCausalLM"
    assert "  hidden_size: 96, not 4096" in lines
    assert lines[-1] == "families that load DeepseekForCausalLM: deepseek_moe"


def test_config_json_is_judged_before_weight_files_are_missed(weights: Weights) -> None:
    directory = weights(quantization_config={"quant_method": "fp8"})
    (directory / "model.safetensors").unlink()
    for model, due in (("deepseek_coder:6.7b", "hidden_size: 96, not 4096"), ("deepseek_coder:custom", "is quantized")):
        with pytest.raises(WeightsError, match=due):
            resolve(EngineArgs(model=model, weights=str(directory), hardware="cpu"))
