from __future__ import annotations

import pytest

from npu_zoo.core.config import EngineArgs
from npu_zoo.dispatch import resolve
from npu_zoo.platforms.environment import apply_presets, near_misses, presets

WANTED = {"TASK_QUEUE_ENABLE": "1", "ATB_CONTEXT_WORKSPACE_SIZE": "0", "INF_NAN_MODE_ENABLE": "0"}


def test_only_what_is_read_is_preset() -> None:
    assert presets(WANTED, ("TASK_QUEUE_ENABLE", "INF_*")) == {"TASK_QUEUE_ENABLE": "1", "INF_NAN_MODE_ENABLE": "0"}
    assert presets(WANTED, ()) == {}


def test_what_the_user_has_set_stays() -> None:
    environ = {"TASK_QUEUE_ENABLE": "2", "INF_NAN_MODE_ENABLE": ""}
    assert apply_presets(WANTED, environ) == {"ATB_CONTEXT_WORKSPACE_SIZE": "0"}
    assert environ == {"TASK_QUEUE_ENABLE": "2", "INF_NAN_MODE_ENABLE": "", "ATB_CONTEXT_WORKSPACE_SIZE": "0"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ATB_LAUNCH_KERNAL_WITH_TILING", "ATB_LAUNCH_KERNEL_WITH_TILING"),
        ("ASCEND_RT_VISIBLE_DEVICE", "ASCEND_RT_VISIBLE_DEVICES"),
        ("TASK_QUEUE_ENABLED", "TASK_QUEUE_ENABLE"),
    ],
)
def test_near_misses_are_named(name: str, meant: str) -> None:
    assert near_misses({name: "1", "PATH": "", meant: "1"}) == [(name, meant)]


def test_other_variables_are_nobodys_business() -> None:
    assert near_misses({"ASCEND_SOMETHING_ELSE": "1", "ATB_HOME_PATH": "/x", "TASKS": "1"}) == []


@pytest.mark.parametrize(("hardware", "has_atb"), [("atlas_300i_duo", True), ("atlas_800i_a2", False)])
def test_a_backends_presets_reach_the_run(hardware: str, has_atb: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_zoo.dispatch.is_importable", lambda module: True)
    monkeypatch.setattr("npu_zoo.selection.is_importable", lambda module: True)
    monkeypatch.setenv("TASK_QUEUE_ENABLED", "1")
    config = resolve(EngineArgs(model="deepseek_coder", hardware=hardware))
    assert config.environment["TASK_QUEUE_ENABLE"] == "1"
    assert any(name.startswith("ATB_") for name in config.environment) == has_atb
    assert any("TASK_QUEUE_ENABLED, which nothing reads; TASK_QUEUE_ENABLE?" in note for note in config.notes)


def test_a_deterministic_run_sets_what_mindie_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_zoo.dispatch.is_importable", lambda module: True)
    monkeypatch.setattr("npu_zoo.selection.is_importable", lambda module: True)
    monkeypatch.setenv("HCCL_DETERMINISTIC", "false")
    args = EngineArgs(model="deepseek_coder", hardware="atlas_800i_a2", dtype="float16", deterministic=True)
    config = resolve(args)
    wanted = {"LCCL_DETERMINISTIC": "1", "HCCL_DETERMINISTIC": "true", "ATB_MATMUL_SHUFFLE_K_ENABLE": "0"}
    assert wanted.items() <= config.environment.items()
    environ = {"HCCL_DETERMINISTIC": "false"}
    assert "HCCL_DETERMINISTIC" not in apply_presets(config.environment, environ)
    said = "HCCL_DETERMINISTIC=false is set and stays; a deterministic run needs HCCL_DETERMINISTIC=true"
    assert said in config.notes
    assert not wanted.keys() & resolve(args.model_copy(update={"deterministic": None})).environment.keys()
    on_cpu = resolve(args.model_copy(update={"hardware": "cpu", "dtype": "float32"}))
    assert on_cpu.deterministic
    assert not wanted.keys() & on_cpu.environment.keys()
