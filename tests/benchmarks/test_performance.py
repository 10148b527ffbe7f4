"""From records to docs/performance.md, and whether the committed page is what the committed records say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import performance
import pytest
from harness.bounds import bound_of
from harness.notes import UNEXPLAINED, Notes, read_notes
from harness.page import page
from harness.pictures import CONTEXTS, ROOFLINES, digest, pictures
from harness.records import read_records

from npu_zoo.evaluation.floor import Floor
from npu_zoo.evaluation.offline.results import CaseResult as ContextCase
from npu_zoo.evaluation.offline.results import OfflineBody, Sample
from npu_zoo.evaluation.peers.result import ComparisonBody
from npu_zoo.evaluation.record import ResultRecord, write_record

Make = Callable[..., ResultRecord]
SAMPLES = {"npu-zoo": [30.0, 25.0, 26.0], "vllm": [20.0, 25.0, 20.0]}


def _line(text: str, start: str) -> list[str]:
    """The cells of the first table row that begins so."""
    found = next(line for line in text.splitlines() if line.startswith("|") and start in line)
    return [cell.strip() for cell in found.strip("|").split("|")]


@pytest.fixture
def show(tmp_path: Path) -> Callable[..., str]:
    """The page of some records."""

    def write(*records: ResultRecord, notes: Notes | None = None) -> str:
        for number, record in enumerate(records):
            write_record(record, tmp_path / f"{number}.json")
        return page(read_records(sorted(tmp_path.glob("*.json"))), notes or {}, tmp_path)

    return write


def test_a_case_has_its_engines_floor_target_and_bound(make_record: Make, show: Callable[..., str]) -> None:
    text = show(make_record({"decode-1": SAMPLES}))
    # 100 bytes at 100 bytes/s are a second for 50 tokens; 26 tokens/s take 1.92 s, a quarter of which is the host's.
    assert _line(text[text.index("### ") :], "decode, batch 1") == [
        *("decode, batch 1", "npu-zoo", "26.0 tokens/s", "52%", "", "3", "", "bandwidth; host 25%"),
    ]
    assert _line(text, "| vllm") == ["", "vllm", "20.0 tokens/s", "40%", "1.30 (1.00..1.50)", "3", ">= 1.15: met", ""]
    assert _line(text, "| floor") == ["", "floor", "50.0 tokens/s", "", "", "", "", "memory"]
    assert "1 of 1 are met." in text


@pytest.mark.parametrize(
    ("work", "model_seconds", "name"),
    [
        ((100, 10, 30), 0.9, "bandwidth"),
        ((1, 1000, 30), 0.9, "operations"),
        ((10, 10, 30), 0.1, "host"),
        ((10, 10, 30), 0.9, "kernels"),
        ((10, 10, 30), None, "rest"),
    ],
)
def test_what_bounds_a_case_is_the_largest_part_of_its_time(
    work: tuple[int, int, int], model_seconds: float | None, name: str, make_record: Make
) -> None:
    record = make_record({"decode-1": {"npu-zoo": [26.0]}}, work=work, model_seconds=model_seconds)
    assert record.machine is not None
    bound = bound_of(ComparisonBody.model_validate(record.body).cases[0], record.machine)
    assert bound is not None
    assert bound.name == name
    assert bound.floor + (bound.host or 0) + bound.rest == pytest.approx(1)


def test_what_is_missed_is_told_with_its_reason(make_record: Make, show: Callable[..., str]) -> None:
    samples = {"npu-zoo": [10.0], "vllm": [10.0], "llama.cpp": [20.0]}
    text = show(make_record({"decode-1": samples}, cpu="A"), notes={"A": {"1.3b/decode-1/vllm": "Because."}})
    assert "On A 0 of 2 are met. Missed:" in text
    assert "- 1.3b, decode, batch 1: 1.00 of vllm instead of 1.15 (13% below): Because." in text
    assert f"0.50 of llama.cpp instead of 1 (50% below): {UNEXPLAINED}" in text
    assert _line(text, "| vllm")[-2] == ">= 1.15: **missed**"


def test_a_peer_with_fewer_rounds_says_so(make_record: Make, show: Callable[..., str]) -> None:
    text = show(make_record({"mixed": {"npu-zoo": [4.0, 5.0, 6.0], "llama.cpp": [2.0]}}))
    assert _line(text, "| llama.cpp")[4:6] == ["2.00 (2.00..2.00)", "1"]


def test_two_days_on_one_machine_stand_side_by_side(make_record: Make, show: Callable[..., str]) -> None:
    first = {
        "decode-1": SAMPLES,
        "decode-8": SAMPLES,
        "mixed": {"npu-zoo": [2.0, 4.0], "vllm": [1.0, 1.0]},
        "shared-prefix": {"npu-zoo": [2.0, 4.0], "vllm": [1.0]},
    }
    second = {
        "decode-1": {"npu-zoo": [1.2, 1.3, 1.4], "vllm": [1.0, 1.0, 1.0]},
        "decode-8": {"npu-zoo": [3.0, 3.1, 3.2], "vllm": [1.0, 1.0, 1.0]},
        "mixed": {"npu-zoo": [3.2, 3.3], "vllm": [1.0, 1.0]},
        "shared-prefix": {"npu-zoo": [2.0, 4.0], "vllm": [1.0]},
    }
    text = show(make_record(first), make_record(second, date="2026-01-02"))
    assert "1.3b on 2026-01-01 and 2026-01-02" in text
    days = text[text.index("## On two days") :]
    assert _line(days, "decode, batch 1")[1:] == [
        *("decode, batch 1", "vllm", "1.30 (1.00..1.50)", "1.30 (1.20..1.40)", "+0%", "both"),
    ]
    assert _line(days, "decode, batch 8")[-2:] == ["+138%", "**neither**"]  # 3.1 / 1.3
    # 3.0 is not within 3.2 to 3.3, and 3.25 is within 2 to 4.
    assert _line(days, "64 requests")[-1] == "one"
    assert _line(days, "32 requests")[-1] == "one pair"
    told = " ".join(days.split())
    assert "Of 3 rows 1 have both within, 1 one; 1 of one pair a day have no spread; half of all medians" in told
    assert "changed by at most 4%. Of the targets 4 of 4 are met on the first day, 4 of 4 on the second." in told
    assert text.index("## 1.3b, 2026-01-02") > 0
    assert "## 1.3b, 2026-01-01" not in text


def test_an_overview_has_the_closest_peer_of_each_case_and_shape(make_record: Make, show: Callable[..., str]) -> None:
    cases = {"decode-1": SAMPLES | {"llama.cpp": [1.0, 1.0, 1.0]}, "start": {"npu-zoo": [4.0], "vllm": [2.0]}}
    quantized = {"decode-1": {"npu-zoo": [3.0], "llama.cpp": [2.0]}}
    text = show(
        make_record(cases, cpu="A"),
        make_record(quantized, cpu="A", group="w8a16"),
        make_record({"decode-1": {"npu-zoo": [1.0], "vllm": [1.0]}}, cpu="A", shape="moe-1b"),
    )
    overview = text[text.index("## On A") : text.index("### ")]
    assert _line(overview, "case") == ["case", "1.3b", "moe-1b"]
    assert _line(overview, "| decode, batch 1 ") == ["decode, batch 1", "1.30 of vllm", "1.00 of vllm"]
    assert _line(overview, "w8a16") == ["decode, batch 1, w8a16", "1.50 of llama.cpp", ""]
    assert _line(overview, "start")[1:] == ["0.50 of vllm", ""]  # half as good: twice the seconds


def test_processors_have_their_own_tables_targets_and_days(make_record: Make, show: Callable[..., str]) -> None:
    cases, slow = {"decode-1": SAMPLES}, {"decode-1": {"npu-zoo": [1.0], "vllm": [1.0]}}
    days = [make_record(cases, cpu="A", date=f"2026-01-0{day}") for day in (1, 2)]
    text = show(*days, make_record(slow, cpu="B", date="2026-01-03"), notes={"B": {"1.3b/decode-1/vllm": "Because."}})
    targets = text[text.index("## Targets") : text.index("## On A")]
    assert "On A 1 of 1 are met.\n\nOn B 0 of 1 are met. Missed:" in targets
    assert "Because." in targets
    one, other = text[text.index("## On A") : text.index("## On B")], text[text.index("## On B") :]
    assert _line(one, "| vllm")[4] == "1.30 (1.00..1.50)"
    assert _line(other, "| vllm")[4] == "1.00 (1.00..1.00)"
    assert "On two days" in one
    assert "On two days" not in other


def test_charts_are_of_one_processor_each(make_record: Make, tmp_path: Path) -> None:
    given = {
        "0": make_record({"decode-1": SAMPLES}, cpu="A"),
        "1": make_record({"decode-1": SAMPLES}, cpu="B"),
        "2": _context_record("paged", 2e-6, "A"),
        "3": _context_record("paged", 2e-6, "B"),
    }
    for name, record in given.items():
        write_record(record, tmp_path / f"{name}.json")
    found = pictures(read_records(sorted(tmp_path.glob("*.json"))))
    assert [chart.title for chart in found[ROOFLINES]] == ["1.3b on A", "1.3b on B"]
    assert [chart.title.rpartition(" on ")[2] for chart in found[CONTEXTS]] == ["A", "B"]


@pytest.mark.parametrize("more", [{"date": "2026-01-01"}, {"date": "2026-01-02", "cpu": "another"}])
def test_one_day_or_another_machine_is_no_second_run(
    more: dict[str, str], make_record: Make, show: Callable[..., str]
) -> None:
    cases = {"decode-1": SAMPLES}
    assert "On two days" not in show(make_record(cases), make_record(cases, **more))


def test_all_records_of_a_machine_s_day_have_its_best_roofs(make_record: Make, show: Callable[..., str]) -> None:
    cases = {"decode-1": SAMPLES}
    text = show(make_record(cases), make_record(cases, shape="moe-1b", bandwidth=200.0, peak=500.0))
    for name in ("## 1.3b", "## moe-1b"):
        assert _line(text[text.index(name) :], "| floor")[2] == "100 tokens/s"


def test_a_device_has_its_own_place_and_no_targets(make_record: Make, show: Callable[..., str]) -> None:
    cases = {"decode-1": {"npu-zoo": [1.0], "transformers": [2.0]}}
    assert "No such device was at hand" in show(make_record(cases, shape="moe-1b"))
    text = show(make_record(cases, hardware="cuda", devices={"device": "a device"}))
    assert "No such device" not in text
    section = text[text.index("## On a CUDA device") :]
    assert "### 1.3b" in section
    assert "Machine: a device" in section
    assert "## Targets" not in text


def _context_record(cache: str, seconds: float, cpu: str = "A") -> ResultRecord:
    steps = (1.0, 1.0 + seconds, 1.0 + 2 * seconds)
    sample = Sample(first_tokens=(1.0,), steps=steps, tokens=(1, 1, 1))
    cases = tuple(
        ContextCase(
            input=tokens,
            output=3,
            batch=1,
            total_s=2.0,
            prefill_s=1.0,
            prefill_average_s=1.0,
            non_first_token_s=seconds * tokens,
            together=True,
            non_first_token_throughput=1.0,
            e2e_throughput=1.0,
            prefill=Floor(bytes=1, operations=1),
            decode=Floor(bytes=2 * tokens, operations=1),
            samples=(sample,),
        )
        for tokens in (2048, 1024)
    )
    from npu_zoo.evaluation.machine import describe_machine

    return ResultRecord(
        kind="bench offline",
        machine=describe_machine("cpu", 2).model_copy(update={"bandwidth": 1e6, "peak": 1e9, "cpu": cpu}),
        arguments={"benchmark": "long context", "cache": cache},
        body=OfflineBody(cases=cases, complete=True).model_dump(mode="json"),
    )


def test_long_contexts_have_a_table_and_a_chart(show: Callable[..., str], tmp_path: Path) -> None:
    text = show(_context_record("paged", 2e-6), _context_record("latent", 1e-6))
    assert _line(text[text.index("### paged") :], "2,048") == ["2,048", "4.10", "1", "2.05", "50%", "2,048"]
    assert _line(text[text.index("### paged") :], "| 1,024 ") == ["1,024", "2.05", "1", "1.02", "50%", ""]
    (chart,) = pictures(read_records(sorted(tmp_path.glob("*.json"))))[CONTEXTS]
    rows = [row[:3] for row in chart.rows()]
    assert ("paged", "2,048", "4.096") in rows
    assert ("paged, floor", "2,048", "2.048") in rows


def test_records_of_another_kind_show_their_figures(show: Callable[..., str]) -> None:
    text = show(ResultRecord(kind="bench serve", figures={"tokens/s": 12.5}))
    assert _line(text, "tokens/s") == ["tokens/s", "12.5"]


def test_the_command_writes_a_page_whose_charts_tell_when_they_are_stale(
    make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, notes, docs = tmp_path / "record.json", tmp_path / "notes.json", tmp_path / "docs"
    docs.mkdir()
    notes.write_text("{}")
    write_record(make_record({"decode-1": SAMPLES}, cpu="A"), record)
    command = [str(record), "--notes", str(notes), "--docs", str(docs)]
    assert performance.main([*command, "--check"]) == 1
    assert performance.main(command) == 0
    assert performance.main([*command, "--check"]) == 0
    write_record(make_record({"decode-1": SAMPLES}, work=(100, 20, 50)), record)
    capsys.readouterr()
    assert performance.main([*command, "--check"]) == 1
    assert ROOFLINES in capsys.readouterr().err
    notes.write_text(json.dumps({"A": {"1.3b/decode-1/vllm": "Because."}}))
    assert performance.main(command) == 1
    assert "miss no target" in capsys.readouterr().err
    notes.write_text("{}")
    write_record(make_record({"decode-1": {"npu-zoo": [1.0], "vllm": [1.0]}}, cpu="A"), record)
    assert performance.main(command) == 0
    assert "nothing on 1.3b/decode-1/vllm on A: 1.3b, decode, batch 1: 1.00 of vllm" in capsys.readouterr().err


def test_charts_digests_are_of_what_they_show(make_record: Make, tmp_path: Path) -> None:
    found = []
    for number, value in enumerate((30.0, 30.0, 31.0)):
        file = tmp_path / f"{number}" / "record.json"
        write_record(make_record({"decode-1": {"npu-zoo": [value], "vllm": [20.0]}}), file)
        found.append(digest(pictures(read_records([file]))[ROOFLINES]))
    assert found[0] == found[1] != found[2]


def test_a_missing_record_is_an_error_and_not_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert performance.main([str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err


def test_the_committed_page_is_what_the_committed_records_say() -> None:
    assert performance.main(["--check"]) == 0


def test_every_missed_target_is_explained() -> None:
    text = (performance.DOCS / performance.PAGE).read_text(encoding="utf-8")
    assert UNEXPLAINED not in text
    assert read_notes(performance.NOTES) is not None
