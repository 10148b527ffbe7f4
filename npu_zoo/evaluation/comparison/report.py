"""What a comparison finds: the body of a record of `npu-zoo eval compare`."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, JsonValue

from npu_zoo.evaluation.comparison.proportions import Contingency, Interval


class _Part(BaseModel):
    # A KL may be infinite, which JSON has no number for.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Side(_Part):
    """One of the two results.

    Attributes:
        record: the file.
        model: ``family:variant``; empty where somebody else's engine ran.
        differs: what is not as in the other result, by the name of the field.
    """

    record: str
    date: str
    model: str
    differs: dict[str, JsonValue] = {}


class FigureComparison(_Part):
    """A number that both results have of every sample that they share.

    Attributes:
        a: the mean; likewise b.
        difference: mean of B minus A over samples, with an interval of the normal approximation; none of few samples.
    """

    a: float
    b: float
    difference: Interval | None
    largest_difference: float


class TaskComparison(_Part):
    """A task's samples that both results have.

    Attributes:
        samples: how many there are.
        agreement: share of them with the same answer; None where there are no answers, but figures alone.
        differing: ids of those with another answer.
        only_in_a: ids of samples that B does not have; likewise only_in_b.
        other_prompts: ids of samples whose prompts differ, so that their logits are not of the same text.
        judged: right and wrong ones, counted; None where samples are neither.
        accuracy_a: share of right ones; likewise accuracy_b.
        difference: accuracy of B minus A, over the same samples.
        mcnemar_p: how likely as uneven a split of the samples that one result alone got right is by chance.
        figures: numbers of samples that are neither right nor wrong, such as log-likelihoods.
    """

    task: str
    samples: int
    agreement: Interval | None
    differing: list[str]
    only_in_a: list[str] = []
    only_in_b: list[str] = []
    other_prompts: list[str] = []
    judged: Contingency | None = None
    accuracy_a: Interval | None = None
    accuracy_b: Interval | None = None
    difference: Interval | None = None
    mcnemar_p: float | None = None
    figures: dict[str, FigureComparison] = {}


class WorstSample(_Part):
    """A sample's position with the largest KL."""

    sample: str
    position: int
    kl: float


class LogitsComparison(_Part):
    """KL(A || B) in nats of all positions of the samples that both files hold.

    Attributes:
        passes: whether the rule holds.
        top1_agreement: share of positions at which both have the same most likely token.
        invalid: positions without logits (NaN, +inf, or -inf throughout) in either result, by sample.
        left_out: samples that one file alone holds, or that are not of the same text or length, with the reason.
    """

    passes: bool
    samples: int
    positions: int
    mean: float
    p99: float
    largest: float
    above_usual: int
    above_largest: int
    usual_bound: float
    largest_bound: float
    share_bound: float
    top1_agreement: float
    worst: list[WorstSample]
    invalid: dict[str, int] = {}
    left_out: dict[str, str] = {}


class ComparisonBody(_Part):
    """Two results of the same evaluation.

    Attributes:
        passes: whether the rule for logits and the least agreement hold, as far as they were asked for.
        partial: whether samples, tasks or logits of one result were left out.
        remarks: what a reader of the figures should know, a sentence each.
    """

    a: Side
    b: Side
    passes: bool
    partial: bool
    tasks: list[TaskComparison]
    logits: LogitsComparison | None = None
    remarks: list[str] = []

    def as_json(self) -> dict[str, JsonValue]:
        """As the body of a record, an infinite KL as the text ``Infinity``."""
        body: dict[str, JsonValue] = json.loads(self.model_dump_json())  # a dump to Python keeps floats as they are
        return body
