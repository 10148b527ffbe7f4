"""What a level needs at least, beside sums over single steps."""

from __future__ import annotations

import pytest

from npu_zoo.core.config import EngineArgs
from npu_zoo.dispatch import resolve
from npu_zoo.evaluation.serving.floors import level_work
from npu_zoo.evaluation.serving.observation import Observation
from npu_zoo.evaluation.work import NO_WORK, ModelWork


def seen(prompt: int | None, output: int, status: str = "completed") -> Observation:
    fields = {"index": 0, "sent": 0.0, "ended": 1.0, "status": status}
    return Observation.model_validate({**fields, "prompt_tokens": prompt, "output_tokens": output})


@pytest.fixture(scope="module")
def model() -> ModelWork:
    return ModelWork.of(resolve(EngineArgs(model="deepseek_coder", hardware="cpu", dtype="float32")))


def test_equal_requests_at_once_are_a_prefill_and_their_steps(model: ModelWork) -> None:
    found = level_work(model, [seen(10, 5)] * 3, 3)
    steps = model.prefill([10] * 3) + model.decode([10] * 3, 4)
    assert found.operations == pytest.approx(steps.operations, rel=1e-3)
    assert found.bytes == pytest.approx(steps.bytes, rel=1e-3)


def test_clients_one_after_the_other_read_the_weights_each(model: ModelWork) -> None:
    one, three = level_work(model, [seen(10, 5)] * 3, 1), level_work(model, [seen(10, 5)] * 3, 3)
    assert one.operations == pytest.approx(three.operations, rel=1e-3)
    assert one.bytes > 2 * three.bytes


def test_what_did_not_complete_or_was_not_counted_needs_nothing(model: ModelWork) -> None:
    assert level_work(model, [seen(10, 5, "failed"), seen(None, 5), seen(10, 0)], 3) == NO_WORK
    assert level_work(model, [seen(10, 1)], 1) == model.prefill([10])
