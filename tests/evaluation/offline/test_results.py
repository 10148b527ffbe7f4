"""Figures against what follows from the definitions, by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from npu_zoo.core.errors import UsageError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.evaluation.offline import mindie
from npu_zoo.evaluation.offline.cases import Case
from npu_zoo.evaluation.offline.mindie import COLUMNS, MindieCsv, csv_rows
from npu_zoo.evaluation.offline.results import CaseResult, OfflineBody, Sample, Search
from npu_zoo.evaluation.record import Machine
from npu_zoo.evaluation.work import ModelWork

HEADER = (
    "Model,Batchsize,In_seq,Out_seq,Total time(s),Prefill all time(ms),Prefill average time(ms),"
    "Non-first token time(ms),Non-first token Throughput(Tokens/s),E2E Throughput(Tokens/s),"
    "Non-first token Throughput Average(Tokens/s),E2E Throughput Average(Tokens/s)"
)
SHAPE = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
)
WORK = ModelWork(SHAPE, "float32")
MACHINE = Machine(hardware="cpu", cpu="", cores=1, memory_gib=1, system="", python="", bandwidth=1e6, peak=1e7)
# Two prompts in two steps: the first decodes once beside the second's prompt, both once together, the second alone.
STAGGERED = Sample(first_tokens=(1.0, 3.0), steps=(1.0, 3.0, 3.5, 3.75), tokens=(1, 2, 2, 1))


def result(case: Case, *samples: Sample) -> CaseResult:
    return CaseResult.of(case, samples, WORK)


def even(batch: int, prefill: float, step: float, output: int) -> Sample:
    ends = [prefill + number * step for number in range(output)]
    return Sample(first_tokens=(prefill,) * batch, steps=tuple(ends), tokens=(batch,) * output)


def test_the_header_is_mindies() -> None:
    assert ",".join(COLUMNS) == HEADER


def test_figures_of_one_round() -> None:
    figures = result(Case(5, 3, 2), STAGGERED)
    assert (figures.prefill_s, figures.prefill_average_s, figures.total_s) == (3.0, 1.5, 3.75)
    assert figures.non_first_token_s == 0.5
    assert figures.non_first_token_throughput == 4.0
    assert figures.e2e_throughput == 2 * 3 / 3.75
    assert figures.together


def test_without_a_step_of_all_it_is_the_mean_of_later_steps() -> None:
    figures = result(Case(5, 2, 2), Sample(first_tokens=(1.0, 3.0), steps=(1.0, 3.0, 3.5), tokens=(1, 2, 1)))
    assert (figures.non_first_token_s, figures.together) == (0.5, False)
    assert figures.non_first_token_throughput == 2.0
    assert figures.on(MACHINE).decode == figures.decode


def test_one_output_token_has_no_later_ones() -> None:
    figures = result(Case(5, 1, 2), Sample(first_tokens=(1.0, 3.0), steps=(1.0, 3.0), tokens=(1, 1)))
    assert (figures.non_first_token_s, figures.non_first_token_throughput, figures.decode) == (None, 0.0, None)
    assert csv_rows("m", [figures])[0][7:9] == ["0.0", "0.0"]


def test_rounds_are_told_by_their_medians() -> None:
    rounds = [even(1, 1.0, 0.5, 3), even(1, 9.0, 0.1, 3), even(1, 2.0, 0.2, 3)]
    figures = result(Case(4, 3, 1), *rounds)
    assert figures.prefill_s == 2.0
    assert figures.non_first_token_s == pytest.approx(0.2)
    assert figures.samples == tuple(rounds)


def test_shares_are_of_the_measured_machine() -> None:
    figures = result(Case(4, 3, 2), even(2, 2.0, 0.5, 3))
    measured = figures.on(MACHINE)
    assert measured.prefill.bandwidth_share == pytest.approx(WORK.prefill([4, 4]).bytes / 2.0 / 1e6)
    decode = WORK.decode([4, 4], 2)
    assert measured.decode is not None
    assert measured.decode.peak_share == pytest.approx(decode.operations / (2 * 0.5) / 1e7)
    assert measured.decode.seconds == pytest.approx(max(decode.bytes / 1e6, decode.operations / 1e7))
    assert figures.prefill.bandwidth_share is None


def test_the_csv_has_what_mindie_would_have_computed() -> None:
    results = [result(Case(8, 4, 2), even(2, 1.0, 0.25, 4)), result(Case(4, 2, 2), even(2, 0.5, 0.5, 2))]
    results.append(result(Case(8, 4, 3), even(3, 1.0, 0.25, 4)))
    first, second, third = csv_rows("family:variant", results)
    assert first == [
        "family:variant",
        "2",
        "8",
        "4",
        "1.75",
        "1000.0",
        "1000.0",
        "250.0",
        "8.0",
        "4.5714285714",
        "",
        "",
    ]
    assert second[4:] == ["1.0", "500.0", "500.0", "500.0", "4.0", "4.0", "6.0", str(round((8 / 1.75 + 4) / 2, 10))]
    assert third[-2:] == third[-4:-2]


def test_rows_grow_and_those_of_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    results = [result(Case(8, 4, 2), even(2, 1.0, 0.25, 4)), result(Case(4, 2, 2), even(2, 0.5, 0.5, 2))]
    first = MindieCsv(path)
    assert path.read_text() == HEADER + "\n"
    first.write(csv_rows("a", results[:1]))
    second = MindieCsv(path)
    second.write(csv_rows("b", results[:1]))
    first.write(csv_rows("a", results))
    second.write(csv_rows("b", results))
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [list(COLUMNS), *csv_rows("a", results), *csv_rows("b", results)]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", HEADER.replace("In_seq", "In") + "\n", "\0", "Model\n"])
def test_a_file_of_another_kind_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"results\.csv .*name another file"):
        MindieCsv(path)
    assert path.read_text() == text


def test_a_file_that_a_spreadsheet_saved_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(b"\xef\xbb\xbf" + HEADER.encode() + b"\r\nm,1,8,4,1,1,1,1,1,1,1,1")
    MindieCsv(path).write([["n"]])
    assert path.read_text() == HEADER + "\nm,1,8,4,1,1,1,1,1,1,1,1\nn\n"


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.csv"
    out = MindieCsv(path)
    out.write([["a"]])

    def fail(file: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mindie, "write_whole", fail)
    with pytest.raises(UsageError, match="No space left"):
        out.write([["a"], ["b"]])
    assert path.read_text() == HEADER + "\na\n"
    monkeypatch.undo()
    out.write([["a"], ["b"]])
    assert path.read_text() == HEADER + "\na\nb\n"


def test_figures_are_means_over_the_cases() -> None:
    results = (result(Case(8, 4, 2), even(2, 1.0, 0.25, 4)), result(Case(4, 2, 2), even(2, 0.5, 0.5, 2)))
    search = Search(input=8, output=4, under_ms=300, largest_batch=2, limited_by="latency", probes=results[:1])
    body = OfflineBody(cases=results, searches=(search,))
    figures = body.figures()
    assert figures["non_first_token_tokens_per_s"] == pytest.approx((8.0 + 4.0) / 2)
    assert figures["e2e_tokens_per_s"] == pytest.approx((8 / 1.75 + 4) / 2)
    assert figures["largest_batch_8_4_under_300_ms"] == 2
    assert OfflineBody.model_validate_json(body.model_dump_json()) == body
    assert OfflineBody().figures() == {}
