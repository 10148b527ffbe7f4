"""What the speed of each case is to be, per peer, and whether a record holds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from npu_zoo.evaluation.peers.engines import SUBJECT
from npu_zoo.evaluation.peers.result import CaseResult, ComparisonBody
from npu_zoo.evaluation.peers.table import figure_text
from npu_zoo.evaluation.record import ResultRecord

AHEAD = 1.0
"""Of a peer for which no more is asked."""

DENSE = "1.3b"
DENSE_RATIOS = {
    "decode-1": 1.15,
    "decode-8": 1.2,
    "decode-32": 1.2,
    "prefill-1x2048": 1.0,
    "prefill-8x512": 1.0,
    "shared-prefix": 1.2,
    "mixed": 1.2,
}
"""Of vLLM, the fastest peer on the dense shape."""

OTHER_RATIO = 1.2
"""Of the best peer in every case of the other shapes, so of each; and of llama.cpp on quantized weights."""

OTHERS = ("moe-1b", "mla-1b")
START_SECONDS = 3.0
"""Of a start that finds its weights packed."""

UNPACKED = "unpacked"
"""The group of starts that do not."""

MEMORY_WEIGHTS = 1.4
"""Peak memory at batch 1, in sizes of the weights."""


@dataclass(frozen=True)
class Verdict:
    """A case beside its target.

    Attributes:
        name: of the shape, with the group that its cases are of.
        peer: that a ratio is to; None where the figure itself has a limit.
        found: the median ratio, or the figure.
    """

    name: str
    case: CaseResult
    peer: str | None
    found: float
    target: float

    @property
    def key(self) -> str:
        """What notes call it."""
        return "/".join(filter(None, (self.name, self.case.name, self.peer)))

    @property
    def held(self) -> bool:
        """Whether the target is met."""
        return self.found <= self.target if self.peer is None else self.found >= self.target

    @property
    def sentence(self) -> str:
        """What was found beside what was asked."""
        if self.peer is None:
            by = self.found / self.target - 1
            figures = f"{figure_text(self.found)} {self.case.unit} instead of at most {figure_text(self.target)}"
            return f"{self.name}, {self.case.title}: {figures}" + ("" if self.held else f" ({by:.0%} above)")
        by = 1 - self.found / self.target
        figures = f"{self.found:.2f} of {self.peer} instead of {self.target:g}"
        return f"{self.name}, {self.case.title}: {figures}" + ("" if self.held else f" ({by:.0%} below)")


def record_name(record: ResultRecord) -> str:
    """The shape, with the group that its cases are of."""
    shape, group = _shape_name(record), record.arguments.get("group")
    return shape if group in (None, "plain") else f"{shape}-{group}"


def _shape_name(record: ResultRecord) -> str:
    shape = record.arguments.get("shape")
    return str(shape["name"]) if isinstance(shape, dict) else ""


def verdicts(record: ResultRecord) -> list[Verdict]:
    """Every case of a record that has a target and figures; targets are for CPUs."""
    if record.machine is None or record.machine.hardware != "cpu":
        return []
    body = ComparisonBody.model_validate(record.body)
    return [verdict for case in body.cases for verdict in _of_case(record, body, case)]


def _of_case(record: ResultRecord, body: ComparisonBody, case: CaseResult) -> Iterator[Verdict]:
    name, own, limit = record_name(record), case.median_of(SUBJECT), _limit(record, case)
    if own is not None and limit is not None:
        yield Verdict(name, case, None, own, limit)
    for engine in body.engines[1:]:
        ratios, target = case.ratios(engine.name, SUBJECT), ratio_target(record, case, engine.name)
        if ratios and target is not None:
            yield Verdict(name, case, engine.name, median(ratios), target)


def _limit(record: ResultRecord, case: CaseResult) -> float | None:
    """The most that a case's own figure may be, in its unit; None where only ratios count."""
    if _shape_name(record) not in (DENSE, *OTHERS):
        return None
    if case.metric == "start":
        return None if record.arguments.get("group") == UNPACKED else START_SECONDS
    weights = record.arguments.get("weight_bytes")
    if case.name == "memory-1" and isinstance(weights, int):
        return MEMORY_WEIGHTS * weights / 2**30
    return None


def ratio_target(record: ResultRecord, case: CaseResult, peer: str) -> float | None:
    """The least median ratio to a peer; None where none is asked for."""
    shape = _shape_name(record)
    if shape not in (DENSE, *OTHERS) or not case.higher_is_better:
        return None
    if shape in OTHERS or record.arguments.get("group") != "plain":
        return OTHER_RATIO
    return DENSE_RATIOS.get(case.name) if peer == "vllm" else AHEAD
