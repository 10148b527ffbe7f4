"""Which charts records give: throughput against batch, latency against load, ratios, and rooflines."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.plots.bodies import (
    Level,
    OfflineBody,
    OfflineCase,
    OfflineSearch,
    PeersBody,
    ServeBody,
    Times,
    body_of,
)
from npu_zoo.evaluation.plots.charts import (
    Chart,
    LineChart,
    Point,
    Ratio,
    RatioChart,
    Roof,
    RooflineChart,
    Scale,
    Series,
    WorkPoint,
    spread,
)
from npu_zoo.evaluation.record import ResultRecord, read_record

PLOTTED = ("bench offline", "bench serve", "bench compare")


@dataclass(frozen=True)
class Given:
    """A record with its file and the name that tells it from others of its kind; empty where there are none."""

    path: Path
    record: ResultRecord
    name: str = ""

    def named(self, text: str) -> str:
        """A text with the record's name before it."""
        return f"{self.name} {text}".strip()


def read_given(paths: Sequence[Path]) -> list[Given]:
    """The records that plots are asked for of.

    Raises:
        UsageError: a file is no record, or one of a kind that has no plot.
    """
    paths = list(dict.fromkeys(paths))
    records = [read_record(path) for path in paths]
    for path, record in zip(paths, records, strict=True):
        if record.kind not in PLOTTED:
            raise UsageError(f"{path} is of `npu-zoo {record.kind}`; plots are of {', '.join(PLOTTED)}")
    alone = {kind for kind in PLOTTED if sum(record.kind == kind for record in records) == 1}
    return [
        Given(path, record, "" if record.kind in alone else name)
        for path, record, name in zip(paths, records, _names(paths), strict=True)
    ]


class Selection(NamedTuple):
    """What records give.

    Attributes:
        left_out: what charts do not show, or in part, with the reason; their notes say it too.
    """

    charts: tuple[Chart, ...]
    left_out: tuple[str, ...]


def select(given: Sequence[Given]) -> Selection:
    """All charts that some records give.

    Raises:
        UsageError: a record's body is not whole, or they give none; says why.
    """
    offline = [(one, body_of(one.record, one.path, OfflineBody)) for one in given if one.record.kind == PLOTTED[0]]
    serve = [(one, body_of(one.record, one.path, ServeBody)) for one in given if one.record.kind == PLOTTED[1]]
    peers = [(one, body_of(one.record, one.path, PeersBody)) for one in given if one.record.kind == PLOTTED[2]]
    charts: list[Chart] = [*_throughput(offline), *_searches(offline), *_latency(serve), *_ratios(peers)]
    points = [*_offline_work(offline), *_peer_work(peers)]
    if points:
        charts.append(RooflineChart("Roofline position", tuple(points), _apart(_cases(offline))))
    apart = _apart([*_cases(offline), *_probes(_all_searches(offline))])
    left_out = tuple(filter(None, (apart, *_unplaced(serve), _timeless(serve, "ttft", "tpot"))))
    if not charts:
        why = "; ".join(left_out) or "none of their cases came through"
        raise UsageError(f"the records hold no figures that can be plotted: {why}")
    return Selection(tuple(charts), left_out)


def _names(paths: Sequence[Path]) -> list[str]:
    """The files' names without their suffix, or whole paths where names are not enough."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def _throughput(bodies: Sequence[tuple[Given, OfflineBody]]) -> Iterator[LineChart]:
    """Rates by batch, a series for each pair of lengths; end to end with the spread over rounds."""
    after_first = [
        Series(name, tuple(Point(case.batch, case.non_first_token_throughput) for case in cases), name)
        for name, cases in _by_lengths(bodies, lambda case: not case.apart)
        if any(case.non_first_token_throughput for case in cases)
    ]
    whole = [
        Series(name, tuple(spread(case.batch, case.e2e_throughput, case.e2e_rounds) for case in cases), name)
        for name, cases in _by_lengths(bodies)
    ]
    note = _apart(_cases(bodies))
    for title, series in (("Throughput after the first token", after_first), ("End-to-end throughput", whole)):
        if series:
            yield LineChart(f"{title} against batch", "batch", "tokens/s", tuple(series), "log", note=note)


def _by_lengths(
    bodies: Sequence[tuple[Given, OfflineBody]], shown: Callable[[OfflineCase], bool] = lambda case: True
) -> Iterator[tuple[str, list[OfflineCase]]]:
    for given, body in bodies:
        lengths = dict.fromkeys((case.input, case.output) for case in filter(shown, body.cases))
        for pair in lengths:
            cases = [case for case in filter(shown, body.cases) if (case.input, case.output) == pair]
            yield given.named(cases[0].name), sorted(cases, key=lambda case: case.batch)


def _cases(bodies: Sequence[tuple[Given, OfflineBody]]) -> list[tuple[Given, OfflineCase]]:
    return [(given, case) for given, body in bodies for case in body.cases]


def _apart(cases: Iterable[tuple[Given, OfflineCase]]) -> str:
    """Cases without a time per token."""
    names = [given.named(case.label) for given, case in cases if case.apart]
    return _told(names, "not all sequences ran at once, so there is no time per token")


def _told(names: Iterable[str], what: str) -> str:
    """Something about some names, each of which is said once; empty where there are none."""
    listed = ", ".join(dict.fromkeys(names))
    return f"{listed}: {what}" if listed else ""


def _all_searches(bodies: Sequence[tuple[Given, OfflineBody]]) -> list[tuple[Given, OfflineSearch]]:
    return [(given, search) for given, body in bodies for search in body.searches]


def _probes(searches: Iterable[tuple[Given, OfflineSearch]]) -> list[tuple[Given, OfflineCase]]:
    return [(given, probe) for given, search in searches for probe in search.probes]


def _searches(bodies: Sequence[tuple[Given, OfflineBody]]) -> Iterator[LineChart]:
    """A chart for each limit of latency that was searched under."""
    searches = _all_searches(bodies)
    for limit in dict.fromkeys(search.under_ms for _, search in searches):
        found = [(one, search) for one, search in searches if search.under_ms == limit]
        series = tuple(_search_series(one, search) for one, search in found if search.times)
        if series:
            title = f"Time per token against batch, {limit:g} ms allowed"
            note = _apart(_probes(found))
            yield LineChart(title, "batch", "ms per token after the first", series, "log", limit, note)


def _search_series(given: Given, search: OfflineSearch) -> Series:
    name = given.named(f"[{search.input},{search.output}]")
    return Series(name, tuple(Point(batch, 1e3 * seconds) for batch, seconds in search.times), name)


def _latency(bodies: Sequence[tuple[Given, ServeBody]]) -> Iterator[LineChart]:
    loads: tuple[tuple[str, Scale, Callable[[Level], float | None]], ...] = (
        ("requests/s offered", "linear", lambda level: level.rate),
        ("clients at once", "log", lambda level: level.concurrency),
    )
    titles = {"ttft": "Time to the first token", "tpot": "Time per token after the first"}
    for x_label, scale, load in loads:
        for metric, measure in titles.items():
            series = [found for one, body in bodies for found in _percentiles(one, body.levels, metric, load)]
            if series:
                note = "; ".join(filter(None, (_failures(bodies, load), *_unplaced(bodies), _timeless(bodies, metric))))
                yield LineChart(f"{measure} against {x_label}", x_label, "ms", tuple(series), scale, note=note)


def _failures(bodies: Sequence[tuple[Given, ServeBody]], load: Callable[[Level], float | None]) -> str:
    """Levels whose times leave requests out, since those failed."""
    told = [
        f"{level.figures.failed} at {name}"
        for name, level in _levels(bodies)
        if level.figures.failed and load(level) is not None and not level.interrupted
    ]
    return f"failed requests, which have no times: {', '.join(told)}" if told else ""


def _unplaced(bodies: Sequence[tuple[Given, ServeBody]]) -> Iterator[str]:
    """Levels that no chart shows."""
    whole = [(name, level) for name, level in _levels(bodies) if not level.interrupted]
    names = (name for name, level in whole if level.rate is None and level.concurrency is None)
    yield _told(names, "sent all at once, which has no place on an axis")
    yield _told((name for name, level in _levels(bodies) if level.interrupted), "interrupted, and not drawn")


def _timeless(bodies: Sequence[tuple[Given, ServeBody]], *metrics: str) -> str:
    """Levels that have none of some times."""
    names = [
        name
        for name, level in _levels(bodies)
        if not level.interrupted and all(getattr(level.figures, metric) is None for metric in metrics)
    ]
    return _told(names, "none of these times" if len(metrics) == 1 else "no times")


def _levels(bodies: Sequence[tuple[Given, ServeBody]]) -> list[tuple[str, Level]]:
    return [(given.named(level.name), level) for given, body in bodies for level in body.levels]


def _percentiles(
    given: Given, levels: Iterable[Level], metric: str, load: Callable[[Level], float | None]
) -> Iterator[Series]:
    found: list[tuple[float, Times]] = []
    for level in levels:
        x, times = load(level), getattr(level.figures, metric)
        if x is not None and times is not None and not level.interrupted:
            found.append((x, times))
    found.sort(key=lambda pair: pair[0])
    for point in ("p50", "p99") if found else ():
        points = tuple(Point(x, getattr(times, point)) for x, times in found)
        yield Series(given.named(point), points, given.name, dashed=point == "p99")


def _ratios(bodies: Sequence[tuple[Given, PeersBody]]) -> Iterator[RatioChart]:
    for given, body in bodies:
        subject = body.engines[0].name
        ratios = [
            Ratio(case.name, engine.name, tuple(values))
            for case in body.cases
            for engine in body.engines[1:]
            if (values := case.ratios(engine.name, subject))
        ]
        if ratios:
            title = f"{subject} beside other engines" + (f", {given.name}" if given.name else "")
            yield RatioChart(title, subject, tuple(ratios))


def _roof(given: Given) -> Roof | None:
    machine = given.record.machine
    if machine is None or not machine.bandwidth or not machine.peak:
        return None
    dtype = given.record.model.dtype if given.record.model else ""
    return Roof(", ".join(filter(None, (machine.hardware, machine.cpu, dtype))), machine.bandwidth, machine.peak)


def _offline_work(bodies: Sequence[tuple[Given, OfflineBody]]) -> Iterator[WorkPoint]:
    for given, body in bodies:
        roof = _roof(given)
        for case in body.cases if roof else ():
            label, floors = given.named(case.label), [("prefill", case.prefill, case.prefill_s)]
            if case.decode and case.non_first_token_s and not case.apart:
                floors.append(("decode", case.decode, case.non_first_token_s * (case.output - 1)))
            for phase, floor, seconds in floors:
                assert roof is not None
                yield WorkPoint(label, phase, floor.operations / floor.bytes, floor.operations / seconds, roof)


def _peer_work(bodies: Sequence[tuple[Given, PeersBody]]) -> Iterator[WorkPoint]:
    """Cases whose figure is a rate of tokens, each engine by the median of its rounds."""
    for given, body in bodies:
        roof = _roof(given)
        for case in body.cases if roof else ():
            work = case.work
            if work is None or not work.tokens or case.unit != "tokens/s":
                continue
            for engine in body.engines:
                rates = [found[engine.name] for found in case.rounds if engine.name in found]
                if rates:
                    achieved = work.operations * statistics.median(rates) / work.tokens
                    assert roof is not None
                    yield WorkPoint(given.named(case.name), engine.name, work.operations / work.bytes, achieved, roof)
