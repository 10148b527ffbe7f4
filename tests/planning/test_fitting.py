"""What does not fit is refused before anything is read, with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import HardwareError
from npu_zoo.core.hardware import PRODUCTS
from npu_zoo.fitting import GIB, device_memory, offered_splits, require_fit
from npu_zoo.registry import get_registry
from npu_zoo.request import Request, read_request
from tests.platforms.test_ascend import A2

FAMILY = "deepseek_coder"


def request_of(**values: object) -> tuple[EngineArgs, Request]:
    args = EngineArgs(**values)  # type: ignore[arg-type]
    return args, read_request(args, get_registry())


def refusal(memory: int, monkeypatch: pytest.MonkeyPatch, **values: object) -> str:
    monkeypatch.setattr("npu_zoo.fitting.device_memory", lambda hardware: (memory,))
    args, request = request_of(**values)
    assert request.config
    with pytest.raises(HardwareError) as caught:
        require_fit(args, request, request.config)
    return str(caught.value)


def test_what_fits_passes() -> None:
    args, request = request_of(model=f"{FAMILY}:33b", hardware="atlas_800i_a2")
    assert request.config
    require_fit(args, request, request.config)


def test_the_smallest_world_size_that_fits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    text = refusal(12 * GIB, monkeypatch, model=f"{FAMILY}:33b", hardware="atlas_800i_a2")
    assert "15.5 GiB of weights" in text
    assert "world size 4" in text
    assert "a device of atlas_800i_a2 has 12.0 GiB" in text
    assert "--world-size 8 is the smallest of the matrix that fits" in text


def test_the_longest_sequence_that_fits_is_named_where_a_length_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"model": f"{FAMILY}:33b", "hardware": "atlas_800i_a2", "world_size": 8, "max_model_len": 16384}
    text = refusal(int(8.3 * GIB), monkeypatch, **asked)
    assert "max_model_len=16384 was asked for" in text
    length = int(text.split("--max-model-len ")[1].split()[0])
    assert 0 < length < 16384
    args, request = request_of(**{**asked, "max_model_len": length})
    assert request.config
    require_fit(args, request, request.config)


def test_nothing_that_fits_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    text = refusal(GIB, monkeypatch, model=f"{FAMILY}:33b", hardware="atlas_800i_a2")
    assert "no world size of the matrix fits" in text
    assert "npu-zoo plan --model deepseek_coder:33b-instruct" in text


def test_this_machines_memory_is_taken_where_it_has_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_zoo.fitting.detect_ascend", lambda: ("atlas_800i_a2", "atlas_800t_a2"))
    monkeypatch.setattr("npu_zoo.fitting.run_npu_smi", lambda: A2)
    assert device_memory("atlas_800i_a2") == (32768 << 20,)
    assert device_memory("atlas_300i_duo") == tuple(size * GIB for size in PRODUCTS["atlas_300i_duo"].memory_gib)


def test_unknown_devices_do_not_stand_in_the_way_of_other_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> tuple[str, ...]:
        raise HardwareError("unknown SoC")

    monkeypatch.setattr("npu_zoo.fitting.detect_ascend", refuse)
    assert device_memory("atlas_800t_a2") == (64 * GIB,)


def test_splits_of_the_matrix() -> None:
    args, request = request_of(model="deepseek_moe:16b", hardware="atlas_800t_a2")
    found = [split.describe() for split in offered_splits(args, request)]
    assert found == ["8", "8 (tp 8, ep 8)", "16", "16 (tp 8, pp 2)"]


def test_memory_of_a_gpu_is_not_guessed(tmp_path: Path) -> None:
    assert device_memory("cuda") == ()
