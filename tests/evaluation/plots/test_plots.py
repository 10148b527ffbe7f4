"""Which charts records give, with which numbers, and the files that they are drawn into."""

from __future__ import annotations

import builtins
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from npu_zoo.cli.app import run_app
from npu_zoo.core.errors import ConfigError, UsageError
from npu_zoo.evaluation.plots import drawing
from npu_zoo.evaluation.plots.charts import Chart, LineChart, Point, RatioChart, RooflineChart
from npu_zoo.evaluation.plots.selection import read_given, select

Record = Callable[..., Path]


def charts(*paths: Path) -> dict[str, Chart]:
    return {chart.title: chart for chart in select(read_given(paths)).charts}


def test_throughput_is_shown_by_batch_with_a_series_for_each_pair_of_lengths(record: Record) -> None:
    path = record("bench offline")
    found = charts(path)
    chart = found["End-to-end throughput against batch"]
    assert isinstance(chart, LineChart)
    assert [series.name for series in chart.series] == ["[2048,2048]", "[1024,1024]", "[512,512]", "[256,256]"]
    case = next(c for c in read_given([path])[0].record.body["cases"] if (c["input"], c["batch"]) == (512, 4))  # type: ignore[union-attr, index, call-overload]
    rounds = [4 * 512 / sample["steps"][-1] for sample in case["samples"]]  # type: ignore[index, union-attr, call-overload]
    assert chart.series[2].points[2] == Point(4, case["e2e_throughput"], min(rounds), max(rounds))  # type: ignore[index, call-overload, arg-type]
    search = found["Time per token against batch, 250 ms allowed"]
    assert isinstance(search, LineChart)
    assert [point.x for point in search.series[0].points] == [1, 2, 4, 5, 6, 8]
    assert search.limit == 250


def test_latency_is_shown_by_load_open_and_closed_loops_apart(record: Record) -> None:
    found = charts(record("bench serve"))
    assert {chart.x_label for chart in found.values() if isinstance(chart, LineChart)} == {
        "requests/s offered",
        "clients at once",
    }
    chart = found["Time to the first token against requests/s offered"]
    assert isinstance(chart, LineChart)
    p50, p99 = chart.series
    assert (p50.name, p99.name, p50.dashed, p99.dashed) == ("p50", "p99", False, True)
    assert [point.x for point in p50.points] == [0.5, 1, 2, 4, 8]
    assert p50.points[2].y == pytest.approx(80 + 9 * 8)
    assert p99.points[2].y == pytest.approx(2.1 * (80 + 9 * 8))
    assert chart.note == "rate inf: sent all at once, which has no place on an axis"
    closed = found["Time to the first token against clients at once"]
    assert isinstance(closed, LineChart)
    assert closed.note.startswith("failed requests, which have no times: 1 at 64 clients; rate inf: ")


def test_levels_that_are_not_drawn_are_named(
    record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body: Any = read_given([record("bench serve")])[0].record.body
    body["levels"][4]["interrupted"] = True
    body["levels"][0]["figures"]["tpot"] = None
    path = record("bench serve", body=body)
    ttft, tpot = list(charts(path).values())[:2]
    assert isinstance(ttft, LineChart)
    assert isinstance(tpot, LineChart)
    assert [point.x for point in ttft.series[0].points] == [0.5, 1, 2, 4]
    assert ttft.note.endswith("rate 8: interrupted, and not drawn")
    assert [point.x for point in tpot.series[0].points] == [1, 2, 4]
    assert tpot.note.endswith("; rate 0.5: none of these times")
    assert run_app(["bench", "plot", str(path), "--png", str(tmp_path / "p.png")]) == 0
    assert "note: rate 8: interrupted, and not drawn" in capsys.readouterr().err
    path = record("bench serve", body={"levels": body["levels"][-1:]})
    with pytest.raises(UsageError, match="can be plotted: rate inf: sent all at once"):
        charts(path)


def test_cases_whose_sequences_did_not_run_at_once_have_no_time_per_token(
    record: Record, offline_body: Callable[..., Any]
) -> None:
    body = offline_body(batches=(1, 4))
    probes = body["searches"][0]["probes"]
    for case in (body["cases"][1], probes[3], probes[4]):  # [2048,2048] x4, [512,512] x8 and x6
        case["together"] = False
    one_token = {**body["cases"][0], "output": 1, "together": False, "non_first_token_throughput": 0, "decode": None}
    body["cases"].append(one_token)  # has no later token
    whole, after, search, roofline = charts(record("bench offline", body=body)).values()
    whole, after = sorted((whole, after), key=lambda chart: chart.title)
    assert isinstance(whole, LineChart)
    assert isinstance(after, LineChart)
    assert isinstance(search, LineChart)
    assert isinstance(roofline, RooflineChart)
    reason = ": not all sequences ran at once, so there is no time per token"
    assert whole.note == after.note == roofline.note == f"[2048,2048] x4{reason}"
    assert [[point.x for point in chart.series[0].points] for chart in (whole, after)] == [[1, 4], [1]]
    assert [point.x for point in search.series[0].points] == [1, 2, 4, 5]
    assert search.note == f"[512,512] x8, [512,512] x6{reason}"
    found = [point.group for point in roofline.points if point.label == "[2048,2048] x4"]
    assert found == ["prefill"]


def test_ratios_are_of_rounds_and_above_1_where_ours_is_better(record: Record) -> None:
    chart = charts(record("bench compare"))["npu-zoo beside other engines"]
    assert isinstance(chart, RatioChart)
    assert "broken" not in chart.cases
    found = {(ratio.case, ratio.engine): ratio for ratio in chart.ratios}
    assert found["batch-16", "transformers"].median == pytest.approx(5)
    assert found["start", "transformers"].median == pytest.approx(3)
    assert found["start", "llama.cpp"].median == pytest.approx(1 / 3)


def test_points_lie_under_the_measured_roof_by_what_they_need(record: Record) -> None:
    chart = charts(record("bench offline"), record("bench compare", "b"))["Roofline position"]
    assert isinstance(chart, RooflineChart)
    assert [(roof.bandwidth, roof.peak) for roof in chart.roofs] == [(20e9, 300e9)]
    point = next(p for p in chart.points if (p.label, p.group) == ("[512,512] x8", "decode"))
    assert point.intensity == 8
    seconds = 0.14 + 0.02 * 8 + 1e-5 * 512 * 8
    assert point.operations_per_s == pytest.approx(8 * 2.7e9 / seconds)
    assert point.share == pytest.approx(8 * 2.7e9 / seconds / (8 * 20e9))
    decode = next(p for p in chart.points if (p.label, p.group) == ("decode-1", "npu-zoo"))
    assert (decode.intensity, decode.operations_per_s) == (1, pytest.approx(2.7e9 * 6))
    assert "start" not in {p.label for p in chart.points}


def test_without_a_measured_machine_there_is_no_roof(record: Record) -> None:
    assert "Roofline position" not in charts(record("bench offline", machine=None))


def test_records_of_one_kind_are_told_apart_by_their_files(record: Record) -> None:
    both = [record("bench serve", name) for name in ("one", "two")]
    chart = charts(*both, record("bench compare", "c"))["Time to the first token against clients at once"]
    assert isinstance(chart, LineChart)
    assert [series.name for series in chart.series] == ["one p50", "one p99", "two p50", "two p99"]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("eval", {}, "a.json is of `npu-zoo eval`; plots are of bench offline, bench serve, bench compare"),
        ("bench offline", {"body": {"cases": [{}]}}, "a.json is no whole record of `npu-zoo bench offline`: cases"),
        ("bench serve", {"body": {"levels": []}}, "the records hold no figures that can be plotted"),
    ],
)
def test_what_has_no_plot_is_refused(record: Record, kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        charts(record(kind, **changes))


class Page(HTMLParser):
    """What a page loads, and the text of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [
            str(v) for name, v in attrs if name in ("src", "href", "xlink:href") and not str(v).startswith("#")
        ]
        self.loads += [tag] * (tag in ("script", "link", "iframe", "img", "object"))
        self._in_cell = tag == "td"

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False


def test_the_command_draws_a_picture_and_a_page_that_needs_nothing_else(
    tmp_path: Path, record: Record, offline_body: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    small = record("bench offline", "<small>", body=offline_body(batches=(1, 4)))
    paths = [small, record("bench compare", "peers")]
    png, page = tmp_path / "out" / "p.png", tmp_path / "out" / "p.html"
    assert run_app(["bench", "plot", *map(str, paths), "--png", str(png), "--html", str(page)]) == 0
    assert f"wrote {page}" in capsys.readouterr().err
    with Image.open(io.BytesIO(png.read_bytes())) as image:
        image.load()
        assert image.height > image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 100
    text = page.read_text(encoding="utf-8")
    read = Page(text)
    assert read.loads == []
    assert "url(" not in re.sub(r"url\(#", "", text)
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    shown = charts(*paths)
    assert len(pictures) == len(shown) == 5
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert "currentColor" in picture
        assert drawing._INK not in picture
    assert {cell for chart in shown.values() for row in chart.rows() for cell in row if cell} <= set(read.cells)
    assert "<small>.json" in read.cells


def test_other_files_stay(tmp_path: Path, record: Record) -> None:
    path = record("bench serve")
    mine = tmp_path / "mine.png"
    Image.new("RGB", (4, 4)).save(mine)
    before = mine.read_bytes()
    for arguments in (["--png", str(mine)], ["--html", str(path)], ["--png", str(tmp_path)], []):
        assert run_app(["bench", "plot", str(path), *arguments]) == 2
    assert run_app(["bench", "plot", str(path), "--png", "x", "--html", "x"]) == 2
    assert mine.read_bytes() == before
    assert read_given([path])


def test_a_write_that_fails_leaves_the_earlier_plot(
    tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = record("bench compare"), tmp_path / "p.html"
    command = ["bench", "plot", str(path), "--html", str(page)]
    for _ in range(2):  # its own file is replaced
        assert run_app(command) == 0
    before = page.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    assert run_app(command) == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert page.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "p.html"]


def test_without_matplotlib_the_extra_is_named(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(charts(record("bench compare")).values())
    load = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return load(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'npu-zoo\[plots\]'"):
        drawing.png(found)


def test_labels_of_a_roofline_cover_neither_each_other_nor_a_point(record: Record) -> None:
    from matplotlib.text import Text

    chart = charts(record("bench offline"))["Roofline position"]
    assert isinstance(chart, RooflineChart)
    with drawing._style():
        figure = drawing._figure(drawing._height(chart))
        drawing._draw(chart, figure)
        figure.draw_without_rendering()
        (axes,) = figure.axes
        named = [text for text in axes.texts if text.get_text().startswith("[")]
        boxes = [Text.get_window_extent(text) for text in named]  # without the line to the point
        spots = [axes.transData.transform((point.intensity, point.operations_per_s)) for point in chart.points]
    assert sorted(text.get_text() for text in named) == sorted(point.label for point in chart.points)
    assert not [(i, j) for i, one in enumerate(boxes) for j, other in enumerate(boxes) if i < j and one.overlaps(other)]
    assert not [i for i, box in enumerate(boxes) for x, y in spots if box.contains(x, y)]
