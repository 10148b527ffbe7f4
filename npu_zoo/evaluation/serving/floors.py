"""What a level of load needs at least of the model that the server runs, where that is known."""

from __future__ import annotations

from collections.abc import Sequence

from npu_zoo.evaluation.serving.observation import Observation
from npu_zoo.evaluation.work import NO_WORK, ModelWork, Work


def level_work(model: ModelWork, observations: Sequence[Observation], peak_concurrency: int) -> Work:
    """The least that a level's completed requests take.

    Prompts in a single step, and decode steps that each had as many sequences as were under way at most. Requests whose
    prompts the server did not count are left out. Beginnings that prompts share are counted for each.

    Args:
        peak_concurrency: most requests under way at once.
    """
    done = [(one.prompt_tokens, one.output_tokens) for one in observations if one.status == "completed"]
    known = [(prompt, output) for prompt, output in done if prompt and output]
    if not known:
        return NO_WORK
    return model.prefill([prompt for prompt, _ in known]) + _decode(model, known, max(1, peak_concurrency))


def _decode(model: ModelWork, lengths: Sequence[tuple[int, int]], batch: int) -> Work:
    """Tokens after the first, whose contexts are taken as their mean: both costs grow evenly with the context."""
    tokens = sum(output - 1 for _, output in lengths)
    if not tokens:
        return NO_WORK
    met = sum((output - 1) * prompt + (output - 1) * output // 2 for prompt, output in lengths)
    step = model.step([(met // tokens, 1)] * batch, batch)
    return Work(step.bytes * tokens // batch, step.operations * tokens // batch)
