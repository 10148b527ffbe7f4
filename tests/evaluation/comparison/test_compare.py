"""Two records of an evaluation: what is shared, what is told, what is refused, and the command's exit code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.stats import binomtest, norm

from npu_zoo.cli.app import run_app
from npu_zoo.core.errors import NpuZooError, UsageError
from npu_zoo.evaluation.comparison import logits as logits_module
from npu_zoo.evaluation.comparison.compare import compare
from npu_zoo.evaluation.comparison.divergence import kl_divergence
from npu_zoo.evaluation.comparison.proportions import Contingency, Interval
from npu_zoo.evaluation.comparison.report import ComparisonBody
from npu_zoo.evaluation.comparison.results import read_result
from npu_zoo.evaluation.record import ResultRecord, read_record, write_record

Logits = Mapping[str, np.ndarray[Any, Any]]


def sample(number: int, *, correct: bool | None = True, answer: Any = "yes", **more: Any) -> dict[str, Any]:
    given = {"task": "boolq", "id": str(number), "prompt_hash": f"p{number}", "answer": answer, **more}
    return given if correct is None else {**given, "correct": correct}


def write(
    path: Path,
    *samples: dict[str, Any],
    task: str = "boolq",
    data: Any = None,
    logits: Logits | None = None,
    **more: Any,
) -> Path:
    result = {"task": task, "metrics": {}, "data": data or {"path": str(path), "sha256": {"f": "d"}}, "notes": []}
    body: dict[str, Any] = {"tasks": [result], "samples": samples, **more}
    if logits is not None:
        file = path.with_suffix(".safetensors")
        save_file(dict(logits), file)
        body |= {"logits_file": file.name, "logits_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    write_record(ResultRecord(kind="eval", body=json.loads(json.dumps(body))), path)
    return path


def compared(a: Path, b: Path, **options: Any) -> ComparisonBody:
    return compare(read_result(a), read_result(b), **options)


def drawn(positions: int, noise: float, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    draws = np.random.default_rng(seed)
    a = draws.normal(0, 3, (positions, 60)).astype(np.float32)
    return a, (a + draws.normal(0, noise, a.shape)).astype(np.float32)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """60 samples with logits: 6 right in A alone, 2 in B alone."""
    right_a = [number < 46 for number in range(60)]
    right_b = [6 <= number < 48 for number in range(60)]
    same = drawn(9, 1e-4)
    a = [sample(n, correct=right_a[n], answer="yes" if right_a[n] else "no") for n in range(60)]
    b = [sample(n, correct=right_b[n], answer="yes" if right_b[n] else "no") for n in range(60)]
    return (
        write(tmp_path / "a.json", *a, logits={f"boolq/{n}": same[0] for n in range(60)}),
        write(tmp_path / "b.json", *b, logits={f"boolq/{n}": same[1] for n in range(60)}),
    )


def test_answers_and_accuracy(pair: tuple[Path, Path]) -> None:
    body = compared(*pair)
    (task,) = body.tasks
    assert task.agreement is not None
    assert (task.samples, task.agreement.value) == (60, 52 / 60)
    assert task.differing == [*map(str, range(6)), "46", "47"]
    assert task.judged == Contingency(both=40, only_a=6, only_b=2, neither=12)
    assert task.accuracy_a is not None
    assert task.accuracy_b is not None
    expected = binomtest(46, 60).proportion_ci(method="wilson")
    assert task.accuracy_a == Interval(46 / 60, pytest.approx(expected.low), pytest.approx(expected.high))
    assert task.difference is not None
    assert task.difference.value == pytest.approx(-4 / 60)
    assert task.mcnemar_p == pytest.approx(binomtest(2, 8).pvalue)
    assert (body.partial, body.passes, body.remarks) == (False, True, [])
    assert not compared(*pair, min_agreement=0.9).passes
    assert compared(*pair, min_agreement=52 / 60).passes


def test_logits_are_compared_in_chunks_of_positions(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compared(*pair).logits
    assert whole is not None
    assert (whole.samples, whole.positions, whole.top1_agreement, whole.passes) == (60, 540, 1.0, True)
    kl = kl_divergence(*drawn(9, 1e-4))
    assert (whole.largest, whole.mean) == (kl.max(), pytest.approx(kl.mean()))
    read: list[int] = []
    rows = logits_module.LogitsFile.rows

    def counted(self: logits_module.LogitsFile, name: str, start: int, stop: int) -> Any:
        found = rows(self, name, start, stop)
        read.append(len(found))
        return found

    monkeypatch.setattr(logits_module.LogitsFile, "rows", counted)
    monkeypatch.setattr(logits_module.paired_chunks, "__defaults__", (2 * 60 * 4,))
    assert compared(*pair).logits == whole
    assert max(read) == 2


def test_what_one_result_alone_has_is_named(tmp_path: Path) -> None:
    ours, theirs = drawn(4, 0.0)
    long = np.concatenate([ours, ours])
    a = write(
        tmp_path / "a.json",
        *(sample(n) for n in range(5)),
        logits={"boolq/0": ours, "boolq/1": ours, "boolq/2": ours, "boolq/3": ours},
    )
    b = write(
        tmp_path / "b.json",
        *(sample(n, prompt_hash="other" if n == 2 else f"p{n}") for n in range(1, 6)),
        logits={"boolq/1": theirs, "boolq/2": theirs, "boolq/3": long, "boolq/5": theirs},
    )
    body = compared(a, b)
    (task,) = body.tasks
    assert (task.samples, task.only_in_a, task.only_in_b, task.other_prompts) == (4, ["0"], ["5"], ["2"])
    assert body.logits is not None
    assert body.logits.left_out == {
        "boolq/0": "in A alone",
        "boolq/2": "other prompts",
        "boolq/3": "4 and 8 positions",
        "boolq/5": "in B alone",
    }
    assert (body.logits.samples, body.partial, body.passes) == (1, True, True)
    assert "boolq: 1 samples in A alone: 0" in body.remarks
    assert "boolq: prompts differ in 1 samples, so answers alone compare: 2" in body.remarks


def test_one_result_s_logits_are_not_compared(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", sample(1), logits={"boolq/1": drawn(2, 0)[0]})
    b = write(tmp_path / "b.json", sample(1))
    body = compared(a, b)
    assert (body.logits, body.partial, body.passes) == (None, True, True)
    assert body.remarks == ["B has no logits, so no KL is compared; eval --save-logits FILE keeps them"]
    assert compared(b, b).remarks == [
        "neither result has logits, so no KL is compared; eval --save-logits FILE keeps them"
    ]


def test_other_settings_of_a_task_are_told(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", sample(1), data={"path": "a", "num_fewshot": 0})
    b = write(tmp_path / "b.json", sample(1), data={"path": "b", "num_fewshot": 5})
    assert "boolq: num_fewshot is 0 in A and 5 in B" in compared(a, b).remarks


def test_samples_that_are_neither_right_nor_wrong_compare_by_their_figures(tmp_path: Path) -> None:
    draws = np.random.default_rng(1)
    values = draws.normal(-50, 9, 200)
    moved = values + draws.normal(0.3, 0.2, 200)
    files = [
        write(
            tmp_path / name,
            *(
                sample(n, correct=None, answer=None, loglikelihood=value, tokens=9)
                for n, value in enumerate(found.tolist())
            ),
        )
        for name, found in (("a.json", values), ("b.json", moved))
    ]
    (task,) = compared(*files, confidence=0.9).tasks
    assert (task.judged, task.agreement) == (None, None)
    assert compared(*files, min_agreement=1.0).passes
    figure = task.figures["loglikelihood"]
    differences = moved - values
    expected = norm.interval(0.9, differences.mean(), differences.std(ddof=1) / np.sqrt(200))
    assert figure.difference is not None
    assert (figure.difference.low, figure.difference.high) == pytest.approx(expected)
    assert figure.largest_difference == pytest.approx(np.abs(differences).max())
    assert (task.figures["tokens"].a, task.figures["tokens"].largest_difference) == (9, 0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"task": "piqa"}, "share no task: boolq and piqa"),
        ({"data": {"sha256": {"f": "e"}}}, "of other data, with SHA-256 {'f': 'd'} and {'f': 'e'}"),
        ({"ids": [7, 8]}, "share no sample of task boolq"),
        ({"ids": [1, 1]}, "two samples with id 1"),
        ({"logits": {"boolq/1": np.zeros((2, 61), np.float32)}}, "logits over 60 and 61 tokens"),
        ({"logits": {"boolq/1": np.zeros((2, 60), np.float16)}}, "logits are F32"),
        ({"logits": {"boolq/9": np.zeros((2, 60), np.float32)}}, "logits of no sample that both results have"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    a = write(tmp_path / "a.json", sample(1), logits={"boolq/1": np.zeros((2, 60), np.float32)})
    name = other.get("task", "boolq")
    samples = [sample(n, task=name) for n in other.pop("ids", [1])]
    b = write(tmp_path / "b.json", *samples, **other)
    with pytest.raises(UsageError, match=message):
        compared(a, b)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "rubbish"])
def test_damaged_logits_are_refused(pair: tuple[Path, Path], damage: str) -> None:
    file = pair[1].with_suffix(".safetensors")
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:-4], "changed": content[:-1] + b"x", "rubbish": b"\xff" * 64}[damage])
    with pytest.raises(UsageError, match=r"b\.safetensors (are not the logits of the record|cannot be read)"):
        compared(*pair)
    if damage != "gone":
        with pytest.raises(UsageError, match="cannot be read"), logits_module.open_logits(file.with_name("none")):
            pass


def test_a_file_that_is_no_file_of_tensors_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}      "[:12]):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read"), logits_module.open_logits(tmp_path / "x"):
            pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"kind": "eval"}', '{"kind": "bench serve", "figures": {}}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(NpuZooError, match=r"a\.json"):
        read_result(tmp_path / "a.json")


def test_the_command_says_what_it_found_and_ends_with_1_where_the_rule_is_missed(
    tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert run_app(["eval", "compare", *map(str, pair), "--json", str(out)]) == 0
    told = capsys.readouterr().out
    assert "86.7 %" in told
    assert "right in both 40, in A alone 6, in B alone 2, in neither 12; McNemar's exact p = 0.289" in told
    assert "the rule for logits holds" in told
    body = ComparisonBody.model_validate(read_record(out, "eval compare").body)
    assert body.tasks[0].differing[-1] == "47"
    ours, theirs = drawn(9, 1e-4)
    theirs[3, 0] = np.nan
    theirs[4, ours[4].argmax()] = -np.inf
    samples = [sample(n) for n in range(60)]
    missed = write(tmp_path / "c.json", *samples, logits={"boolq/7": theirs})
    assert run_app(["eval", "compare", str(pair[0]), str(missed), "--json", str(out), "--min-agreement", "0.99"]) == 1
    told = capsys.readouterr().out
    assert "the rule for logits is missed" in told
    assert "boolq/7 at 4 (inf)" in told
    assert "1 positions are no logits (NaN or infinite) and have no KL, in boolq/7" in told
    assert "agreement is below 0.99 in boolq" in told
    found = ComparisonBody.model_validate(read_record(out, "eval compare").body).logits
    assert found is not None
    assert (found.largest, found.invalid, found.passes) == (np.inf, {"boolq/7": 1}, False)
    assert run_app(["eval", "compare", str(pair[0]), str(tmp_path / "none.json")]) == 2
