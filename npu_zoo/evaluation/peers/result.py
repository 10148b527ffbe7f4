"""What a comparison found, as data: every sample, and the figures that follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from npu_zoo.evaluation.peers.cases import Case, Metric


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EngineEntry(_Part):
    """An engine of a comparison.

    Attributes:
        python: the interpreter that had it.
        options: how it was started.
        lasting_settings: what processes that stayed for several runs were started with beside them.
    """

    name: str
    python: str
    versions: dict[str, str]
    options: dict[str, Any] = Field(default_factory=dict)
    lasting_settings: dict[str, Any] = Field(default_factory=dict)


class Agreement(_Part):
    """An engine's greedy tokens of a case's first request beside the first engine's.

    Attributes:
        tokens: how many were compared.
        first_difference: the position of the first that differs, from 0; None where all are equal.
    """

    tokens: int
    first_difference: int | None

    @classmethod
    def of(cls, tokens: list[int], expected: list[int]) -> Agreement:
        """Compare two outputs of one length."""
        differing = (i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b)
        return cls(tokens=len(tokens), first_difference=next(differing, None))


class Correctness(_Part):
    """An engine's greedy tokens of a small model in float32 beside the first engine's.

    Attributes:
        requests: that were compared, with ``tokens`` in all.
        equal: those all of whose tokens are the same.
    """

    requests: int
    equal: int
    tokens: int


class NeededWork(_Part):
    """What a case's measured part needs at least, and the tokens that its rate counts."""

    bytes: int
    operations: int
    tokens: int


class CaseResult(_Part):
    """One case on all engines.

    Attributes:
        rounds: the figure of every engine that came through, by name, in ``unit``; one mapping a round.
        runs: the times of the same runs, in seconds from their start.
        failures: why an engine has no figures, or not all.
        agreement: by engine, but for the first.
        floor: the best figure that the machine allows, in ``unit``; None where it was not measured.
        limit: what limits it: memory, compute or size.
    """

    name: str
    title: str
    metric: Metric
    unit: str
    higher_is_better: bool
    count: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    shared_prefix: int = 0
    static_batch: int = 0
    rounds: list[dict[str, float]] = Field(default_factory=list)
    runs: list[dict[str, dict[str, Any]]] = Field(default_factory=list)
    failures: dict[str, str] = Field(default_factory=dict)
    agreement: dict[str, Agreement] = Field(default_factory=dict)
    work: NeededWork | None = None
    floor: float | None = None
    limit: str = ""

    @classmethod
    def of(cls, case: Case) -> CaseResult:
        """One without figures yet."""
        names = ("name", "title", "metric", "unit", "higher_is_better", "count", "prompt", "output")
        fields = {name: getattr(case, name) for name in names}
        return cls(**fields, shared_prefix=case.shared_prefix, static_batch=case.static_batch)

    def preemptions_of(self, engine: str) -> int:
        """How often a request of an engine lost its room in all rounds, as far as it tells."""
        return sum(int(runs[engine].get("preemptions", 0)) for runs in self.runs if engine in runs)

    def median_of(self, engine: str) -> float | None:
        """An engine's figure; None where it has none."""
        found = [sample[engine] for sample in self.rounds if engine in sample]
        return median(found) if found else None

    def ratios(self, engine: str, subject: str) -> list[float]:
        """Of each round in which both came through; above 1 ``subject`` is better, whatever the unit."""
        pairs = [(sample[subject], sample[engine]) for sample in self.rounds if {subject, engine} <= sample.keys()]
        return [own / other if self.higher_is_better else other / own for own, other in pairs]

    def seconds(self, run: Mapping[str, Any]) -> float:
        """How long the measured part of a run took; for the rates only."""
        start, split, end = run["start"], run["all_started"], run["end"]
        return float({"decode": end - split, "prefill": split - start}.get(self.metric, end - start))

    def host_share(self, engine: str) -> float | None:
        """Of an engine's measured time, what passed outside the model's own steps: the median of the rounds.

        None where the engine does not tell when its steps are.
        """
        told = [runs[engine] for runs in self.runs if runs.get(engine, {}).get("model_seconds")]
        if not told:
            return None
        return median(max(0.0, 1 - self._model_seconds(run) / self.seconds(run)) for run in told)

    def _model_seconds(self, run: Mapping[str, Any]) -> float:
        before, after = run["model_seconds"]
        return float({"decode": after, "prefill": before}.get(self.metric, before + after))

    def share(self, engine: str) -> float | None:
        """How much of the best figure that the machine allows an engine reaches, 0 to 1."""
        found = self.median_of(engine)
        if found is None or self.floor is None or not found:
            return None
        return found / self.floor if self.higher_is_better else self.floor / found


class ComparisonBody(_Part):
    """The body of a record of ``bench compare``.

    Attributes:
        engines: the first is the one that the others are compared with.
        missing: engines that were not there, and how to install them.
        skipped: cases that cannot be measured with this model or on its device, and why.
        notes: what else bears on the figures.
        correctness: by engine, but for the first; empty where it was not looked at.
    """

    engines: list[EngineEntry]
    rounds: int
    missing: dict[str, str] = Field(default_factory=dict)
    skipped: dict[str, str] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    correctness: dict[str, Correctness] = Field(default_factory=dict)
    cases: list[CaseResult] = Field(default_factory=list)

    @property
    def subject(self) -> str:
        """The engine that the others are compared with."""
        return self.engines[0].name

    def figures(self) -> dict[str, float]:
        """Medians of the first engine, and median ratios, by case."""
        return dict(self._figures())

    def _figures(self) -> Iterator[tuple[str, float]]:
        for case in self.cases:
            own = case.median_of(self.subject)
            if own is not None:
                yield f"{case.name} {self.subject} {case.unit}", own
            for engine in self.engines[1:]:
                ratios = case.ratios(engine.name, self.subject)
                if ratios:
                    yield f"{case.name} ratio to {engine.name}", median(ratios)
