"""A CUDA device on both sides of a comparison, as far as it can be told without one."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from npu_zoo.core.config import EngineArgs
from npu_zoo.dispatch import resolve
from npu_zoo.evaluation import machine
from npu_zoo.evaluation.peers.cases import CATALOGUE
from npu_zoo.evaluation.peers.engines import InstalledEngine
from npu_zoo.evaluation.peers.preparation import fitting_cases, load_options
from npu_zoo.evaluation.peers.worker import transformers_driver
from npu_zoo.evaluation.peers.worker.driver import Driver, Generated, OnTokens, Request
from npu_zoo.evaluation.peers.worker.serving import Worker

ARGS = EngineArgs(model="deepseek_coder", hardware="cuda", dtype="bfloat16", allow_experimental=True)


def test_every_engine_is_told_of_the_device() -> None:
    config = resolve(ARGS)
    cases, skipped = fitting_cases([CATALOGUE[name] for name in ("decode-1", "memory-1")], config)
    options = load_options([InstalledEngine(name) for name in ("npu-zoo", "transformers", "vllm")], ARGS, config, cases)
    assert skipped == {}
    assert {name: option.device for name, option in options.items()} == dict.fromkeys(options, "cuda")
    assert options["npu-zoo"].settings["hardware"] == "cuda"


def test_transformers_model_is_moved_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    model = SimpleNamespace(eval=lambda: model)

    def move(device: str) -> Any:
        moved.append(device)
        return model

    model.to = move
    library: Any = ModuleType("transformers")
    library.AutoTokenizer = SimpleNamespace(from_pretrained=lambda path: SimpleNamespace(pad_token_id=0))
    library.AutoModelForCausalLM = SimpleNamespace(from_pretrained=lambda path, **options: model)
    library.GenerationConfig = lambda **options: options
    monkeypatch.setitem(sys.modules, "transformers", library)
    config = resolve(ARGS)
    options = load_options([InstalledEngine("transformers")], ARGS, config, [CATALOGUE["decode-1"]])["transformers"]
    transformers_driver.TransformersDriver().load(options)
    assert moved == ["cuda"]


class _Silent(Driver):
    def load(self, options: Any) -> None:
        """Nothing."""

    def generate(self, requests: list[Request], static_batch: int, on_tokens: OnTokens) -> Generated:
        raise AssertionError


def test_memory_is_the_device_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 12345)
    worker = Worker("npu-zoo")
    worker.driver = _Silent()
    options = {"weights": "", "dtype": "bfloat16", "max_model_len": 1}
    worker.load({**options, "device": "cpu"})
    assert worker.peak_memory() > 2**20
    worker.load({**options, "device": "cuda"})
    assert worker.peak_memory() == 12345
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(NotImplementedError, match="does not tell"):
        worker.peak_memory()


def test_bandwidth_and_peak_are_the_device_s(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(machine, "read_bandwidth", lambda size, device: asked.append(device) or 3e12)
    monkeypatch.setattr(machine, "matrix_peak", lambda dtype, device, divisor: asked.append(device) or 8e14)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    found = machine.measure_machine(resolve(ARGS))
    assert {device.type for device in asked} == {"cuda"}
    assert (found.hardware, found.bandwidth, found.peak, found.devices["device"]) == ("cuda", 3e12, 8e14, "a device")
