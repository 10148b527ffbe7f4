"""``npu-zoo plan``: for any row, without a device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npu_zoo.cli import main
from npu_zoo.cli.plan import PLAN_KEYS
from npu_zoo.registry import get_registry
from npu_zoo.testing.checkpoints import write_checkpoint


def lines(text: str, first: str) -> list[list[str]]:
    return [line.split("  ") for line in text.splitlines() if line.startswith(first)]


def test_every_split_and_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "deepseek_coder:33b", "--hardware", "atlas_800i_a2"]) == 0
    captured = capsys.readouterr()
    assert "33.3 billion" in captured.out
    assert len(lines(captured.out, "4  ")) == len(lines(captured.out, "8  ")) == 2
    assert "estimated" in captured.err


def test_the_split_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", "deepseek_coder:33b", "--hardware", "atlas_800i_a2", "--tp", "8", "--memory", "40GiB"]
    assert main(["plan", *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(s["tp"], s["world_size"]) for s in found["splits"]] == [(8, 8)]
    assert found["memory"] == [40 << 30]
    assert set(found) == {key for key in PLAN_KEYS if "[" not in key}
    batches = found["splits"][0]["devices"][0]["batch"]
    tokens = found["splits"][0]["devices"][0]["cache_tokens"]
    assert {int(n): tokens // int(n) for n in batches} == {int(n): count for n, count in batches.items()}


def test_what_does_not_fit_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    asked = ["plan", "--model", "deepseek_coder:33b", "--hardware", "atlas_800i_a2", "--memory", "9GiB"]
    assert main(asked) == 0
    assert "does not fit" in capsys.readouterr().out
    assert main([*asked, "--json"]) == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    assert [bool(split["devices"][0]["cache_tokens"]) for split in splits] == [False, True]


def test_replicas_count_their_caches_together(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--model", "deepseek_moe:16b", "--hardware", "cpu", "--memory", "256GiB", "--ep", "4", "--json"]
    found = []
    for sizes in (["--dp", "1"], ["--dp", "2"]):
        assert main([*asked, *sizes]) == 0
        found += json.loads(capsys.readouterr().out)["splits"]
    assert [(s["tp"], s["pp"], s["ep"], s["dp"], s["world_size"]) for s in found] == [(4, 1, 4, 1, 4), (2, 1, 4, 2, 4)]
    (room,) = found[1]["devices"]
    left = (256 << 30) // 4 - found[1]["weights"] - found[1]["activations"]
    assert room["cache_tokens"] == 2 * (left // 2 // found[1]["cache_per_token"])
    assert room["batch"]["4096"] == 2 * (room["cache_tokens"] // 2 // 4096)


def test_a_split_that_the_shape_does_not_allow(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "deepseek_coder:1.3b", "--hardware", "cpu", "--tp", "3"]) == 3
    told = capsys.readouterr().err
    assert "tensor_parallel_size=3 does not divide deepseek_coder:1.3b's 16 attention heads" in told
    assert "sizes that do: 1, 2, 4, 8, 16" in told


def test_a_checkpoint_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = write_checkpoint(tmp_path / "weights", tokenizer=False)
    assert main(["plan", "--model", "deepseek_coder:custom", "--weights", str(weights), "--hardware", "cpu"]) == 0
    assert "KiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "deepseek_coder:custom", "--hardware", "cpu"], 5, "--weights DIR"),
        (["--model", "deepseek_coder:1.3b", "--hardware", "cuda", "--allow-experimental"], 4, "give --memory SIZE"),
        (["--model", "deepseek_coder:1.3b", "--hardware", "atlas_300i_duo"], 3, "hardware=atlas_300i_duo"),
        (["--model", "deepseek_coder:1.3b", "--hardware", "cpu", "--memory", "much"], 2, "--memory='much' is no size"),
    ],
)
def test_bad_input(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == code
    assert words in capsys.readouterr().err


def test_every_supported_row_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    for family in get_registry().families.values():
        for variant in family.variants:
            for row in family.matrix.of_size(variant.size, experimental=False) if variant.config else ():
                if row.hardware[0] == "cpu":
                    continue
                asked = ["--hardware", row.hardware[0], "--dtype", row.dtype[0], "--quantization", row.quantization[0]]
                asked += ["--attention", row.attention[0], "--json"]
                assert main(["plan", "--model", f"{family.name}:{variant.name}", *asked]) == 0
                splits = json.loads(capsys.readouterr().out)["splits"]
                assert {s["world_size"] for s in splits} >= set(row.world_size)
