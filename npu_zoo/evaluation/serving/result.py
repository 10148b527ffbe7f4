"""What ``bench serve`` found: the figures of each level, and every request that they come from."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from npu_zoo.evaluation.floor import Floor
from npu_zoo.evaluation.record import Machine
from npu_zoo.evaluation.serving.arrivals import Load, OpenLoop
from npu_zoo.evaluation.serving.figures import Goal, LevelFigures
from npu_zoo.evaluation.serving.floors import level_work
from npu_zoo.evaluation.serving.load import LevelRun
from npu_zoo.evaluation.serving.observation import Observation
from npu_zoo.evaluation.serving.server import ServerIdentity
from npu_zoo.evaluation.serving.work import Endpoint
from npu_zoo.evaluation.work import ModelWork


class MeasuredLevel(BaseModel):
    """One level of load.

    Attributes:
        name: as tables name it, such as ``rate 2``.
        rate: requests per second of an open loop; None where they were sent all at once, too.
        concurrency: clients of a closed loop.
        client_cpu_share: processor time of the client per second; near 1, its own slowness is measured.
        interrupted: whether Ctrl-C ended it.
        requests: what was observed of each, raw.
        floor: what the model needs at least for it; None where nobody said what the server runs.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    loop: Literal["open", "closed"]
    rate: float | None = None
    concurrency: int | None = None
    client_cpu_share: float
    interrupted: bool
    figures: LevelFigures
    requests: tuple[Observation, ...]
    floor: Floor | None = None

    @classmethod
    def of(cls, load: Load, run: LevelRun, goal: Goal | None) -> MeasuredLevel:
        """What a run of a load came to."""
        is_open = isinstance(load, OpenLoop)
        return cls(
            name=load.name,
            loop="open" if is_open else "closed",
            rate=load.finite_rate if isinstance(load, OpenLoop) else None,
            concurrency=None if isinstance(load, OpenLoop) else load.concurrency,
            client_cpu_share=run.client_cpu_share,
            interrupted=run.interrupted,
            figures=LevelFigures.of(run.observations, goal),
            requests=tuple(run.observations),
        )

    def on(self, model: ModelWork, machine: Machine) -> MeasuredLevel:
        """The same, with its floor on a server's machine."""
        work = level_work(model, self.requests, self.figures.peak_concurrency)
        return self.model_copy(update={"floor": Floor.of(work, self.figures.seconds, machine)})


class ServeResult(BaseModel):
    """The body of a record of kind ``bench serve``.

    Attributes:
        prompts: ``ids`` or ``words`` of random lengths, or ``file``.
        ignore_eos: whether answers went on to their full length.
        interrupted: whether something ended it before all of its levels were measured to their end.
        notes: what a reader of the figures has to know.
    """

    model_config = ConfigDict(frozen=True)

    server: ServerIdentity
    endpoint: Endpoint
    prompts: Literal["ids", "words", "file"]
    ignore_eos: bool
    interrupted: bool = False
    notes: tuple[str, ...] = ()
    levels: tuple[MeasuredLevel, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether a level has not a single completed request."""
        return any(level.figures.failed and not level.figures.completed for level in self.levels)

    def on(self, model: ModelWork, machine: Machine) -> ServeResult:
        """The same, with every level's floor."""
        return self.model_copy(update={"levels": tuple(level.on(model, machine) for level in self.levels)})

    def headline(self) -> dict[str, float]:
        """The few figures that others cite, with their units; of several levels each has its own."""
        found: dict[str, float] = {}
        for level in self.levels:
            suffix = f" at {level.name}" if len(self.levels) > 1 else ""
            found |= {f"{name}{suffix}": value for name, value in _headline(level.figures).items()}
        return found


def _headline(figures: LevelFigures) -> dict[str, float]:
    found = {
        "completed": float(figures.completed),
        "failed": float(figures.failed),
        "requests_per_s": figures.request_throughput,
        "output_tokens_per_s": figures.output_throughput,
    }
    for name in ("ttft", "tpot", "itl", "e2e"):
        if (times := getattr(figures, name)) is not None:
            found |= {f"{name}_{point}_ms": getattr(times, point) for point in ("p50", "p90", "p99")}
    if figures.goodput:
        found["goodput_requests_per_s"] = figures.goodput.requests_per_s
    return found
