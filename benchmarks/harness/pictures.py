"""The page's charts, each picture with a digest of what it shows, so that a stale one is found without drawing it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.records import Compared, Contexts, Records
from harness.tables import step_floor
from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.plots.charts import Chart, LineChart, RooflineChart, Series, spread
from npu_zoo.evaluation.plots.charts import Point as ChartPoint
from npu_zoo.evaluation.plots.drawing import png
from npu_zoo.evaluation.plots.selection import Given, select
from npu_zoo.testing.files import write_whole

ROOFLINES, CONTEXTS = "performance-rooflines.png", "performance-contexts.png"


def pictures(records: Records) -> dict[str, list[Chart]]:
    """Charts by the file that they are drawn into; only what there are records for."""
    found: dict[str, list[Chart]] = {ROOFLINES: list(_rooflines(records.newest)), CONTEXTS: _contexts(records.contexts)}
    return {name: charts for name, charts in found.items() if charts}


def _rooflines(compared: Sequence[Compared]) -> Iterator[Chart]:
    """A roof for each shape on each machine, with all its cases of all engines, quantized ones by their group."""
    for shape, hardware, machine in dict.fromkeys(map(_roof_of, compared)):
        own = [one for one in compared if _roof_of(one) == (shape, hardware, machine)]
        given = [Given(one.path, one.record, one.name.removeprefix(shape).removeprefix("-")) for one in own]
        try:
            charts = select(given).charts
        except UsageError:  # no case of it came through
            continue
        for chart in charts:
            if isinstance(chart, RooflineChart):
                yield dataclasses.replace(chart, title=f"{shape} on {machine}")


def _roof_of(compared: Compared) -> tuple[str, str, str]:
    """The shape, the kind of hardware, and which one it was."""
    machine = compared.machine
    return str(compared.shape["name"]), machine.hardware, machine.devices.get("device") or machine.cpu


def _contexts(contexts: Sequence[Contexts]) -> list[Chart]:
    """A chart for each processor."""
    found: list[Chart] = []
    for processor in dict.fromkeys(one.machine.cpu for one in contexts):
        own = [one for one in contexts if one.machine.cpu == processor]
        series = tuple(part for one in own for part in _context_series(one))
        if series:
            title = f"Decoding at long contexts on {processor}"
            found.append(LineChart(title, "tokens in the cache", "ms a step", series, "log"))
    return found


def _context_series(contexts: Contexts) -> Iterator[Series]:
    cases = sorted(contexts.body.cases, key=lambda case: case.input)
    timed = [case for case in cases if case.non_first_token_s is not None]
    points = []
    for case in timed:
        rounds = [1e3 * sample.non_first_token_s for sample in case.samples if sample.non_first_token_s is not None]
        points.append(spread(case.input, 1e3 * (case.non_first_token_s or 0.0), rounds))
    floors = [(case.input, floor) for case in timed if (floor := step_floor(case)) is not None]
    if points:
        yield Series(contexts.cache, tuple(points), contexts.cache)
    if floors:
        least = tuple(ChartPoint(tokens, 1e3 * floor) for tokens, floor in floors)
        yield Series(f"{contexts.cache}, floor", least, contexts.cache, dashed=True)


def digest(charts: Sequence[Chart]) -> str:
    """Of what charts show."""
    shown = [[chart.title, chart.columns, list(chart.rows())] for chart in charts]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def write_pictures(charts: dict[str, list[Chart]], folder: Path) -> None:
    """Draw what is not there already as it should be, and remove what has no records any more."""
    for name in (ROOFLINES, CONTEXTS):
        path = folder / name
        if name not in charts:
            path.unlink(missing_ok=True)
        elif read_digest(path) != digest(charts[name]):
            write_whole(path, png(charts[name], description=digest(charts[name])))


def read_digest(path: Path) -> str:
    """What a picture says that it shows; empty where there is none."""
    from PIL import Image

    if not path.exists():
        return ""
    with Image.open(path) as image:
        return str(image.info.get("Description", ""))
