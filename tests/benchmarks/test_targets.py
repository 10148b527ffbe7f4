"""What is asked of each case and peer, and what notes may say of what was missed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.notes import read_notes, require_matching
from harness.targets import verdicts

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.record import ResultRecord

Make = Callable[..., ResultRecord]


def _targets(record: ResultRecord) -> dict[str, float]:
    return {verdict.key: verdict.target for verdict in verdicts(record)}


def test_the_dense_shape_has_a_target_of_each_peer(make_record: Make) -> None:
    samples = {"npu-zoo": [2.0], "vllm": [1.0], "llama.cpp": [1.0]}
    names = ("decode-1", "decode-32", "prefill-8x512", "mixed", "shared-prefix")
    assert _targets(make_record(dict.fromkeys(names, samples))) == {
        "1.3b/decode-1/vllm": 1.15,
        "1.3b/decode-32/vllm": 1.2,
        "1.3b/prefill-8x512/vllm": 1.0,
        "1.3b/mixed/vllm": 1.2,
        "1.3b/shared-prefix/vllm": 1.2,
        **{f"1.3b/{name}/llama.cpp": 1.0 for name in names},
    }


@pytest.mark.parametrize(
    ("shape", "group", "key"),
    [
        ("1.3b", "w8a16", "1.3b-w8a16/decode-1/llama.cpp"),
        ("1.3b", "w4a16", "1.3b-w4a16/decode-1/llama.cpp"),
        ("moe-1b", "plain", "moe-1b/decode-1/llama.cpp"),
        ("mla-1b", "plain", "mla-1b/decode-1/llama.cpp"),
    ],
)
def test_a_fifth_is_asked_elsewhere(shape: str, group: str, key: str, make_record: Make) -> None:
    record = make_record({"decode-1": {"npu-zoo": [2.0], "llama.cpp": [1.0]}}, shape=shape, group=group)
    assert _targets(record) == {key: 1.2}


def test_start_and_memory_have_limits_of_their_own(make_record: Make) -> None:
    samples = {"npu-zoo": [3.5], "vllm": [70.0]}
    record = make_record({"start": samples, "memory-1": samples, "memory": samples}, weight_bytes=2**31)
    found = {verdict.key: (verdict.target, verdict.held) for verdict in verdicts(record)}
    assert found == {"1.3b/start": (3.0, False), "1.3b/memory-1": (1.4 * 2, False)}
    assert [verdict.sentence for verdict in verdicts(record)] == [
        "1.3b, process start to first token: 3.50 s instead of at most 3.00 (17% above)",
        "1.3b, peak memory, 1 x 128 prompt, 64 new: 3.50 GiB instead of at most 2.80 (25% above)",
    ]


def test_a_start_that_packs_its_weights_has_no_target(make_record: Make) -> None:
    assert verdicts(make_record({"start": {"npu-zoo": [9.0], "llama.cpp": [1.0]}}, group="unpacked")) == []


def test_a_ratio_is_the_median_of_pairs_and_not_of_medians(make_record: Make) -> None:
    record = make_record({"decode-1": {"npu-zoo": [10.0, 30.0, 40.0], "vllm": [10.0, 10.0, 20.0]}})
    (verdict,) = verdicts(record)
    assert (verdict.found, verdict.held) == (2.0, True)


def test_what_is_missed_says_by_how_much(make_record: Make) -> None:
    (verdict,) = verdicts(make_record({"decode-8": {"npu-zoo": [0.9], "vllm": [1.0]}}))
    assert not verdict.held
    assert verdict.sentence == "1.3b, decode, batch 8: 0.90 of vllm instead of 1.2 (25% below)"


def test_small_shapes_and_devices_have_no_targets(make_record: Make) -> None:
    cases = {"decode-1": {"npu-zoo": [0.1], "vllm": [1.0]}, "start": {"npu-zoo": [9.0]}}
    assert verdicts(make_record(cases, shape="tiny")) == []
    assert verdicts(make_record(cases, hardware="cuda")) == []


def test_a_note_belongs_to_a_case_that_misses(make_record: Make) -> None:
    found = verdicts(make_record({"decode-1": {"npu-zoo": [1.0], "vllm": [1.0], "llama.cpp": [0.5]}}))
    require_matching({"A": {"1.3b/decode-1/vllm": "why"}}, {"A": found, "B": []})
    told = r"miss no target: 1.3b/decode-1/llama.cpp on A; those that do: 1.3b/decode-1/vllm on A"
    with pytest.raises(UsageError, match=told):
        require_matching({"A": {"1.3b/decode-1/llama.cpp": "why"}}, {"A": found})
    with pytest.raises(UsageError, match=r"miss no target: 1.3b/decode-1/vllm on B;"):
        require_matching({"B": {"1.3b/decode-1/vllm": "why"}}, {"A": found, "B": []})


@pytest.mark.parametrize("content", ["[]", '{"a": "b"}', '{"a": {"b": 1}}', '{"a": {"b": ""}}', "{"])
def test_notes_are_sentences_by_processor_and_case(content: str, tmp_path: Path) -> None:
    file = tmp_path / "notes.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=r"notes\.json"):
        read_notes(file)
    file.write_text(json.dumps({"a": {"b": "c"}}))
    assert read_notes(file) == {"a": {"b": "c"}}
