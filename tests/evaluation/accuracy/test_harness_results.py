"""What the harness returns, as our results: answers that can differ, and how many samples a group has."""

from __future__ import annotations

from typing import Any

import pytest

from npu_zoo.evaluation.accuracy.harness_results import task_results

QUESTION, OTHER = ("a question", " yes"), ("a question", " no")
METRICS = {"acc,none": 0.5, "acc_stderr,none": "N/A"}


def sample(arguments: list[tuple[str, str]], scores: list[tuple[float, bool]], **more: Any) -> dict[str, Any]:
    asked = {f"gen_args_{n}": {"arg_0": a, "arg_1": b} for n, (a, b) in enumerate(arguments)}
    given = {"doc_id": 0, "filter": "none", "prompt_hash": "p", "target": "yes", "metrics": ["acc"], "acc": 1.0}
    arguments_by_number = {name: tuple(values.values()) for name, values in asked.items()}
    return {**given, "arguments": arguments_by_number, "filtered_resps": scores, "resps": [[s] for s in scores], **more}


def answer(*given: Any, **more: Any) -> Any:
    found = {"n-samples": {"t": {"effective": 1}}, "results": {"t": METRICS}, "n-shot": {"t": 0}}
    (result,) = task_results({**found, "samples": {"t": [sample(*given, **more)]}}, notes=[], data={})
    return result.samples[0]["answer"]


@pytest.mark.parametrize("greedy", [True, False])
def test_a_single_continuation_is_greedy_or_not(greedy: bool) -> None:
    assert answer([QUESTION], [(-1.0, greedy)]) is greedy


def test_choices_are_told_by_what_tells_them_apart() -> None:
    scores = [(-2.0, False), (-1.0, True)]
    assert answer([QUESTION, OTHER], scores, target=0) == "no"
    assert answer([("the car", " is red"), ("the sky", " is red")], scores) == 1


def test_choices_without_the_question_are_no_answers() -> None:
    arguments = [QUESTION, OTHER, ("", " yes"), ("", " no")]
    scores = [(-2.0, False), (-1.0, True), (-3.0, False), (-0.1, True)]
    assert answer(arguments, scores, metrics=["acc", "acc_mutual_info"]) == "no"
    assert answer(arguments, [*scores[1::-1], *scores[2:]], metrics=["acc", "acc_mutual_info"]) == "yes"


def test_a_group_has_the_samples_of_its_own_tasks() -> None:
    found = {
        "n-samples": {"a": {"effective": 2}, "b": {"effective": 3}, "c": {"effective": 10}},
        "results": dict.fromkeys("abc", METRICS),
        "n-shot": dict.fromkeys("abc", 0),
        "groups": {"whole": METRICS, "inner": METRICS},
        "group_subtasks": {"whole": ["inner", "b"], "inner": ["a"], "c": []},
    }
    results = {result.task: result.metrics["acc"].samples for result in task_results(found, notes=[], data={})}
    assert results == {"a": 2, "b": 3, "c": 10, "whole": 5, "inner": 2}
