"""What is asked of speculative decoding, and what is refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from npu_zoo.core.config import EngineArgs, SpeculationConfig
from npu_zoo.core.errors import ConfigError
from npu_zoo.dispatch import resolve
from npu_zoo.fitting import plan_request
from npu_zoo.registry import get_registry
from npu_zoo.request import read_request


def speculation(**options: Any) -> SpeculationConfig | None:
    return resolve(EngineArgs(model="deepseek_coder:demo", hardware="cpu", **options)).speculation


def test_nothing_is_guessed_unless_it_is_asked_for() -> None:
    assert speculation() is None
    assert speculation(speculative_method="none") is None


def test_prompt_lookup_and_its_defaults() -> None:
    assert speculation(speculative_method="prompt_lookup") == SpeculationConfig("prompt_lookup", 3, 2, 4)
    asked = {"num_speculative_tokens": 7, "prompt_lookup_min": 1, "prompt_lookup_max": 5, "adaptive_speculation": False}
    assert speculation(speculative_method="prompt_lookup", **asked) == SpeculationConfig(
        "prompt_lookup", 7, 1, 5, adaptive=False
    )


def test_a_deterministic_run_does_not_decide_by_time() -> None:
    found = speculation(speculative_method="prompt_lookup", deterministic=True)
    assert found is not None
    assert not found.adaptive


@pytest.mark.parametrize(
    ("given", "bounds"),
    [({"prompt_lookup_max": 1}, (1, 1)), ({"prompt_lookup_min": 6}, (6, 6)), ({"prompt_lookup_min": 3}, (3, 4))],
)
def test_one_bound_moves_the_other(given: dict[str, int], bounds: tuple[int, int]) -> None:
    found = speculation(speculative_method="prompt_lookup", **given)
    assert found is not None
    assert (found.lookup_min, found.lookup_max) == bounds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_speculative_tokens": 2}, "num_speculative_tokens=2 says nothing with speculative_method=none"),
        ({"adaptive_speculation": True}, "adaptive_speculation=True says nothing"),
        ({"prompt_lookup_min": 2}, "--speculative-method prompt_lookup"),
        (
            {"speculative_method": "prompt_lookup", "prompt_lookup_min": 4, "prompt_lookup_max": 3},
            "prompt_lookup_min=4 is above prompt_lookup_max=3",
        ),
        (
            {"speculative_method": "prompt_lookup", "adaptive_speculation": True, "deterministic": True},
            "which deterministic=True forbids",
        ),
        (
            {"speculative_method": "mtp"},
            r"num_nextn_predict_layers of config.json\), and the checkpoint has none.*prompt_lookup works",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        speculation(**options)


V3: dict[str, Any] = {"model": "deepseek_v3:demo", "hardware": "cpu", "speculative_method": "mtp"}


def test_the_checkpoints_own_layer_and_its_defaults() -> None:
    assert resolve(EngineArgs(**V3)).speculation == SpeculationConfig("mtp", 1)
    assert resolve(EngineArgs(**V3)).mtp
    asked = EngineArgs(**V3, num_speculative_tokens=3, adaptive_speculation=False)
    assert resolve(asked).speculation == SpeculationConfig("mtp", 3, adaptive=False)
    assert resolve(EngineArgs(**V3, tensor_parallel_size=2, expert_parallel_size=2)).mtp


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_speculative_tokens": 4}, "num_speculative_tokens=4 is more than .*: 1 to 3"),
        ({"prompt_lookup_min": 2}, "prompt_lookup_min=2 says nothing with speculative_method=mtp"),
        ({"pipeline_parallel_size": 2}, r"pipeline stages and replicas, 2 \(pp 2\), cannot take it"),
        ({"data_parallel_size": 2, "expert_parallel_size": 2}, "cannot take it; take tensor or expert parallelism"),
    ],
)
def test_what_the_layer_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(EngineArgs(**V3, **options))


def test_a_layer_more_is_planned_for() -> None:
    plans = []
    for method in ("none", "mtp"):
        args = EngineArgs(**{**V3, "speculative_method": method, "dtype": "bfloat16"})
        request = read_request(args, get_registry())
        assert request.config is not None
        plans.append(plan_request(args, request, request.config, request.split))
    assert plans[1].cache_per_token == plans[0].cache_per_token * 4 // 3
    assert plans[1].weights > 1.2 * plans[0].weights


def test_positions_to_sample_from_are_planned_for() -> None:
    asked: dict[str, Any] = {"model": "deepseek_coder:demo", "hardware": "cpu", "max_num_seqs": 8}
    drafting: dict[str, Any] = {"speculative_method": "prompt_lookup", "num_speculative_tokens": 4}
    assert resolve(EngineArgs(**asked)).max_sampled_tokens == 8
    assert resolve(EngineArgs(**asked, **drafting)).max_sampled_tokens == 40
    assert resolve(EngineArgs(**asked, **drafting, max_num_batched_tokens=20)).max_sampled_tokens == 20
