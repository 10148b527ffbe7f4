from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from npu_zoo import dispatch
from npu_zoo.cli.matrix import VERDICT_KEYS
from npu_zoo.core.features import AXES, FeatureRow

DUO = ("--hardware", "atlas_300i_duo")
A2 = ("--model", "deepseek_coder:33b", "--hardware", "atlas_800i_a2")


def test_a_supported_request_shows_its_row(cli: Callable) -> None:
    ran = cli("check", *A2, "--dtype", "bf16", "--world-size", "4", "--json")
    data = json.loads(ran.out)
    assert ran.code == 0
    assert data["supported"] is True
    assert data["reasons"] == []
    row = FeatureRow.model_validate(data["row"])
    assert (row.status, row.evidence) == ("supported", "simulated")
    assert "MindIE" in row.source
    assert "source       DeepSeek-Coder README of the MindIE" in cli("check", *A2, "--dtype", "bf16").out


def test_a_refusal_gives_every_reason_and_alternatives_that_pass(cli: Callable) -> None:
    ran = cli("check", *A2, "--dtype", "float16", "--world-size", "2", "--quantization", "w8a8", "--json")
    data = json.loads(ran.out)
    assert ran.code == 3
    assert data["supported"] is False
    assert data["row"] is None
    assert [reason["axis"] for reason in data["reasons"]] == ["dtype", "world_size", "quantization"]
    assert {key for reason in data["reasons"] for key in reason} == {"axis", "value", "supported", "message"}
    assert next(r for r in data["reasons"] if r["axis"] == "world_size")["supported"] == [4, 8]
    assert data["alternatives"]
    for alternative in data["alternatives"]:
        assert set(alternative) == set(AXES)
        flags = [
            ("--" + axis.replace("_", "-"), str(alternative[axis])) for axis in ("hardware", "dtype", "world_size")
        ]
        assert cli("check", "--model", "deepseek_coder:33b", *sum(flags, ())).code == 0


def test_the_keys_of_check_are_those_that_are_documented(cli: Callable) -> None:
    supported = json.loads(cli("check", *A2, "--dtype", "bf16", "--json").out)
    refused = json.loads(cli("check", *A2, "--dtype", "fp32", "--json").out)
    reasons = {f"reasons[].{key}" for reason in refused["reasons"] for key in reason}
    for data in (supported, refused):
        assert {*data, *reasons} == set(VERDICT_KEYS)
    assert VERDICT_KEYS["request"].endswith(": " + ", ".join(supported["request"]) + ".")
    assert VERDICT_KEYS["row"].endswith(": " + ", ".join(supported["row"]) + ".")
    text = cli("check", "--help").out
    assert [key for key in VERDICT_KEYS if f"\n  {key} " not in text] == []


def test_a_refusal_in_words_goes_to_standard_output(cli: Callable) -> None:
    ran = cli("check", *A2, "--dtype", "bf16", "--world-size", "2")
    assert ran.code == 3
    assert ran.err == ""
    assert (
        "world_size=2 is not supported by deepseek_coder:33b on atlas_800i_a2 with bfloat16; supported: 4, 8" in ran.out
    )
    assert "nearest supported requests:" in ran.out


@pytest.mark.parametrize(("short", "full"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_short_dtypes_are_accepted(cli: Callable, short: str, full: str) -> None:
    ran = cli("check", "--model", "deepseek_coder", "--hardware", "cpu", "--dtype", short, "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["request"]["dtype"] == full


def test_an_experimental_row_needs_its_flag(cli: Callable) -> None:
    arguments = ("check", "--model", "deepseek_coder", "--hardware", "cuda")
    refused = cli(*arguments)
    assert refused.code == 3
    assert "--allow-experimental" in refused.out
    assert cli(*arguments, "--allow-experimental", "--json").code == 0


def test_check_reads_the_settings_of_every_layer(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.toml").write_text('model = "deepseek_coder:33b"\nhardware = "atlas_800i_a2"\nworld_size = 2\n')
    monkeypatch.setenv("NPU_ZOO_CONFIG", str(tmp_path / "a.toml"))
    assert cli("check").code == 3
    monkeypatch.setenv("NPU_ZOO_WORLD_SIZE", "4")
    assert cli("check").code == 0
    assert cli("check", "--world-size", "2").code == 3


def test_explain_without_weights_says_what_does_not_depend_on_them(cli: Callable) -> None:
    ran = cli("explain", "--model", "deepseek_coder:1.3b", "--hardware", "cpu")
    assert ran.code == 0
    assert "not looked at" in ran.out
    data = json.loads(cli("explain", "--model", "deepseek_coder:1.3b", "--hardware", "cpu", "--json").out)
    assert data["weights"] is None
    assert "--weights DIR" in data["obstacle"]
    assert {"rms_norm", "linear"} <= {kernel["operation"] for kernel in data["kernels"]}
    assert data["attention"]["block_size"] > 0


def test_explain_knows_the_head_size_of_the_demo_where_the_engine_cannot_start(
    cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "is_importable", lambda module: module != "torch")
    ran = cli("explain", "--model", "deepseek_coder", "--hardware", "cpu", "--json")
    assert ran.code == 4
    assert "needs torch" in ran.err
    assert json.loads(ran.out)["attention"]["block_size"] > 0


def test_explain_names_engine_backend_block_size_and_kernels(cli: Callable) -> None:
    arguments = ("explain", "--model", "deepseek_coder:demo", "--hardware", "cpu", "--attention", "paged")
    data = json.loads(cli(*arguments, "--block-size", "16", "--json").out)
    assert data["engine"] == "native"
    assert data["attention"]["block_size"] == 16
    assert data["obstacle"] is None
    for kernel in data["kernels"]:
        assert kernel["kernel"]
        assert kernel["reason"]
        assert kernel["kernel"] in cli(*arguments).out


def test_explain_refuses_what_the_matrix_refuses(cli: Callable) -> None:
    ran = cli("explain", "--model", "deepseek_coder:33b", *DUO)
    assert ran.code == 3
    assert ran.err.startswith("error: hardware=atlas_300i_duo is not supported by deepseek_coder:33b")
    assert ran.out == ""


def test_explain_of_what_no_engine_runs_shows_the_matrix_row_and_fails(cli: Callable) -> None:
    ran = cli(
        "explain", "--model", "deepseek_coder:demo", "--hardware", "cpu", "--engine", "native", "--block-size", "7"
    )
    assert ran.code == 4
    assert "evidence" in ran.out
    assert "block size 7" in ran.err
