"""``npu-zoo convert`` and ``npu-zoo weights`` as they are typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from npu_zoo.cli.convert import CONVERT_KEYS
from npu_zoo.cli.weights import INSPECT_KEYS, PACKED_KEYS, VERIFY_KEYS
from npu_zoo.testing.checkpoints import write_checkpoint
from npu_zoo.weights.packed import PackedRequest, list_packed, write_packed


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "weights")


def test_a_conversion_says_what_it_does(source: Path, tmp_path: Path, cli: Callable) -> None:
    ran = cli("convert", str(source), str(tmp_path / "out"), "--to", "mindspore-ckpt", "--dtype", "bf16")
    assert ran.code == 0, ran.err
    text = " ".join(ran.out.split())
    assert "(hf-safetensors)" in text
    assert "(mindspore-ckpt)" in text
    assert text.endswith("out is complete")
    assert "written in" in ran.err
    assert cli("weights", "verify", str(tmp_path / "out")).code == 0
    again = cli("convert", str(source), str(tmp_path / "out"), "--to", "mindspore-ckpt")
    assert again.code == 5
    assert "exists; delete it or name another directory" in again.err


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path, cli: Callable) -> None:
    asked = ["--to", "ascend-mp", "--tp", "2", "--quantize", "w4a16", "--dry-run", "--json"]
    found = json.loads(cli("convert", str(source), str(tmp_path / "out"), *asked).out)
    assert set(found) == set(CONVERT_KEYS)
    assert found["files"] == ["model0-mp2.safetensors", "model1-mp2.safetensors"]
    assert found["resumed"] is None
    assert list(tmp_path.iterdir()) == []


def test_inspect_tells_what_there_is(source: Path, tmp_path: Path, cli: Callable) -> None:
    asked = ["--to", "hf-safetensors", "--quantize", "w4a16", "--group-size", "16"]
    assert cli("convert", str(source), str(tmp_path / "out"), *asked).code == 0
    found = json.loads(cli("weights", "inspect", str(tmp_path / "out"), "--json").out)
    assert set(found) == {key for key in INSPECT_KEYS if "[" not in key}
    assert (found["format"], found["quantization"], found["group_size"]) == ("hf-safetensors", "w4a16", 16)
    assert found["manifest"] is True
    assert found["dtypes"]["w4a16"]["tensors"] == 14
    shown = " ".join(cli("weights", "inspect", str(tmp_path / "out")).out.split())
    assert "w4a16, groups of 16" in shown


def test_verify_names_what_is_damaged(source: Path, tmp_path: Path, cli: Callable) -> None:
    assert cli("convert", str(source), str(tmp_path / "out"), "--to", "hf-safetensors").code == 0
    path = tmp_path / "out" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 255
    path.write_bytes(raw)
    ran = cli("weights", "verify", str(tmp_path / "out"), "--json")
    assert ran.code == 5
    assert "has another checksum" in ran.err
    assert set(json.loads(ran.out)) == set(VERIFY_KEYS)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--to", "gguf"], 2, "unknown format 'gguf'"),
        (["--to", "ascend-mp", "--tp", "2", "--merge"], 2, "--merge makes one file"),
        (["--to", "ascend-mp", "--tp", "0"], 2, "there is 1 rank at least"),
        (["--to", "ascend-mp", "--tp", "3"], 5, "ranks do not divide"),
        (["--to", "hf-bin", "--group-size", "32"], 2, "goes with --quantize"),
        (["--to", "hf-bin", "--quantize", "w3a3"], 2, "known: w8a16, w4a16, w8a8"),
        (["--to", "hf-bin", "--dtype", "int4"], 2, "unknown dtype 'int4'"),
        (["--to", "hf-bin", "--mtp", "both"], 2, "both"),
        (["--to", "hf-bin", "--shard-size", "large"], 2, "--shard-size='large' is no size"),
    ],
)
def test_bad_input(options: list[str], code: int, words: str, source: Path, tmp_path: Path, cli: Callable) -> None:
    ran = cli("convert", str(source), str(tmp_path / "out"), *options)
    assert ran.code == code
    assert words in " ".join(ran.err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_not_there(tmp_path: Path, cli: Callable) -> None:
    ran = cli("convert", str(tmp_path / "gone"), str(tmp_path / "out"), "--to", "hf-bin")
    assert ran.code == 5
    assert "config.json" in ran.err


def test_packed_weights_are_listed_and_removed(
    source: Path, tmp_path: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "a run with --packed-weights keep writes some" in cli("weights", "packed").out
    split = {"tp": 2, "pp": 1, "ep": 1, "dp": 1}
    made_of = {"dtype": "bfloat16", "quantization": "w8a16", "mtp": True, "split": split, "part": [0, 1]}
    for weights in (source, tmp_path / "elsewhere"):
        write_packed(PackedRequest(str(weights.resolve()), json.dumps(made_of)), "", {"a": torch.zeros(64)})
    listed = cli("weights", "packed").out
    assert all(word in listed for word in ("bfloat16", "w8a16", "with MTP", "part 0-1"))
    assert listed.count("(gone)") == 1
    found = json.loads(cli("weights", "packed", str(source), "--json").out)
    assert set(found) == {key for key in PACKED_KEYS if "[" not in key}
    assert [(file["weights"], file["exists"]) for file in found["files"]] == [(str(source.resolve()), True)]
    assert {f"files[].{key}" for key in found["files"][0]} == {key for key in PACKED_KEYS if "[" in key}
    assert found["removed"] is False
    removed = cli("weights", "packed", str(source), "--remove")
    assert "removed 1 of them" in removed.err
    assert [file.request and file.request.weights for file in list_packed()] == [
        str((tmp_path / "elsewhere").resolve())
    ]


def test_packed_weights_that_nobody_can_read_are_removed_too(
    tmp_path: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for made_of in ("{}", '{"split": {}, "of another version": 1}'):
        write_packed(PackedRequest("/nowhere", made_of), "", {"a": torch.zeros(64)})
    path = list_packed()[0].path
    path.write_bytes(path.read_bytes()[:9])
    path.with_name(f"{path.name}.new-abandoned").write_bytes(b"half of it")
    listed = cli("weights", "packed").out
    assert listed.count("cannot be read") == listed.count("(gone)") == 1
    assert "removed 2 of them" in cli("weights", "packed", "--remove").err
    assert list(path.parent.iterdir()) == []
