"""What plots take of the bodies of records, each kind as its own command writes it."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from npu_zoo.core.errors import UsageError, validation_lines
from npu_zoo.evaluation.record import ResultRecord


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class OfflineSample(_Part):
    """A round: when each step ended, in seconds from the start."""

    steps: tuple[float, ...]


class Floor(_Part):
    """What a phase needs at least."""

    bytes: int
    operations: int


class OfflineCase(_Part):
    """A case of `bench offline`; times in seconds, rates in tokens/s."""

    input: int
    output: int
    batch: int
    together: bool
    prefill_s: float
    non_first_token_s: float | None
    non_first_token_throughput: float
    e2e_throughput: float
    prefill: Floor
    decode: Floor | None
    samples: tuple[OfflineSample, ...] = ()

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"[{self.input},{self.output}]"

    @property
    def label(self) -> str:
        """With the batch."""
        return f"{self.name} x{self.batch}"

    @property
    def apart(self) -> bool:
        """Whether no step after the first tokens had all sequences, so that there is no time of one."""
        return self.output > 1 and not self.together

    @property
    def e2e_rounds(self) -> list[float]:
        """The end-to-end throughput of each round, tokens/s."""
        return [self.batch * self.output / sample.steps[-1] for sample in self.samples]


class OfflineSearch(_Part):
    """A search for the largest batch under a latency."""

    input: int
    output: int
    under_ms: float
    probes: tuple[OfflineCase, ...]

    @property
    def times(self) -> list[tuple[int, float]]:
        """Each batch that ran at once with its seconds per token after the first."""
        found = [(probe.batch, probe.non_first_token_s) for probe in self.probes if not probe.apart]
        return sorted((batch, seconds) for batch, seconds in found if seconds)


class OfflineBody(_Part):
    """The body of `bench offline`."""

    cases: tuple[OfflineCase, ...]
    searches: tuple[OfflineSearch, ...] = ()


class Times(_Part):
    """Percentiles in milliseconds."""

    p50: float
    p99: float


class LevelFigures(_Part):
    """The figures of a level that are shown."""

    failed: int
    ttft: Times | None
    tpot: Times | None


class Level(_Part):
    """A level of load of `bench serve`; one without rate and concurrency was sent all at once."""

    name: str
    rate: float | None = None
    concurrency: int | None = None
    interrupted: bool
    figures: LevelFigures


class ServeBody(_Part):
    """The body of `bench serve`."""

    levels: tuple[Level, ...]


class Engine(_Part):
    """An engine of a comparison."""

    name: str


class NeededWork(_Part):
    """What a case needs at least, and the tokens that its rate counts."""

    bytes: int
    operations: int
    tokens: int


class PeerCase(_Part):
    """A case on all engines; a round has a figure of each that came through."""

    name: str
    higher_is_better: bool
    rounds: tuple[dict[str, float], ...]
    unit: str
    work: NeededWork | None = None

    def ratios(self, engine: str, subject: str) -> list[float]:
        """Of each round in which both came through; above 1 the subject is better."""
        pairs = [(found[subject], found[engine]) for found in self.rounds if {subject, engine} <= found.keys()]
        return [own / other if self.higher_is_better else other / own for own, other in pairs]


class PeersBody(_Part):
    """The body of `bench compare`."""

    engines: tuple[Engine, ...]
    cases: tuple[PeerCase, ...]


Body = TypeVar("Body", bound=BaseModel)


def body_of(record: ResultRecord, path: Path, model: type[Body]) -> Body:
    """The body of a record.

    Raises:
        UsageError: it has another form.
    """
    try:
        return model.model_validate(record.body)
    except ValidationError as error:
        raise UsageError(
            f"{path} is no whole record of `npu-zoo {record.kind}`: {validation_lines(error)[0]}"
        ) from None
