"""Conversions: round trips byte by byte, independent readers, interruptions, and everything that can be wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from npu_zoo.core.errors import NpuZooError, UsageError, WeightsError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.registry import get_registry
from npu_zoo.testing.shapes import rank_shape, write_random_model
from npu_zoo.weights import convert as converting
from npu_zoo.weights.convert import convert, partial_directory
from npu_zoo.weights.manifest import read_manifest, verify
from npu_zoo.weights.plan import ConvertOptions, open_source, plan_conversion
from npu_zoo.weights.quantize import Scheme, dequantize_rows
from npu_zoo.weights.reading import Reader

Tensors = dict[str, torch.Tensor]


def run(source: Path, destination: Path, to: str, **options: Any) -> Path:
    convert(plan_conversion(source, ConvertOptions(to, **options)), destination, threads=3)
    return destination


def plain(directory: Path) -> Tensors:
    """All tensors of a directory of safetensors files, read by the format's own library."""
    found: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def values_of(directory: Path) -> Tensors:
    """All tensors of a directory of any format, dequantized."""
    _, source, _ = open_source(directory)
    found = {}
    with Reader() as reader:
        for name, tensor in source.tensors.items():
            rows = source.read(name, 0, tensor.num_rows, reader)
            found[name] = rows.values if rows.scales is None else dequantize_rows(rows.values, rows.scales)
    return found


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def config_of(family: str) -> ModelConfig:
    """A small model of a family, of which 8 ranks share everything."""
    variants = get_registry().families[family].variants
    return rank_shape(next(v.config for v in variants if v.config and v.config.num_attention_heads % 16 == 0), Split(2))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("models") / family
            config = config_of(family)
            if config.moe:
                config = config.model_copy(update={"moe": config.moe.model_copy(update={"n_routed_experts": 16})})
            heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
            config = config.model_copy(update=heads)
            if config.moe:
                few = {"n_group": 4, "topk_group": 2} if config.moe.n_group > 1 else {}
                config = config.model_copy(update={"moe": config.moe.model_copy(update=few)})
            write_random_model(folder, get_registry().families[family], config)
            (folder / "tokenizer.json").write_text("{}")
            (folder / "modeling_own.py").write_text("print('code')\n")
            made[family] = folder
        return made[family]

    return make


# Round trips


def test_through_mindspore_and_back(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("deepseek_coder")
    there = run(source, tmp_path / "ms", "mindspore-ckpt")
    assert [path.name for path in there.glob("*.ckpt")] == ["checkpoint.ckpt"]
    assert same(plain(run(there, tmp_path / "hf", "hf-safetensors")), plain(source))


@pytest.mark.parametrize("family", ["deepseek_coder", "deepseek_moe", "deepseek_v3"])
def test_through_eight_ranks_and_back(family: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models(family)
    there = run(source, tmp_path / "mp", "ascend-mp", tp=8)
    assert sorted(p.name for p in there.glob("*.safetensors")) == [f"model{n}-mp8.safetensors" for n in range(8)]
    assert same(plain(run(there, tmp_path / "hf", "hf-safetensors")), plain(source))


def test_eight_ranks_to_two_and_back(models: Callable[[str], Path], tmp_path: Path) -> None:
    eight = run(models("deepseek_v3"), tmp_path / "8", "ascend-mp", tp=8)
    two = run(eight, tmp_path / "2", "ascend-mp", tp=2)
    again = run(two, tmp_path / "again", "ascend-mp", tp=8)
    for path in sorted(eight.glob("*.safetensors")):
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_ranks_of_mindspore_are_merged(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("deepseek_coder")
    four = run(source, tmp_path / "4", "mindspore-ckpt", tp=4)
    assert sorted(path.parent.name for path in four.rglob("*.ckpt")) == [f"rank_{n}" for n in range(4)]
    two = run(four, tmp_path / "2", "mindspore-ckpt", tp=2)
    assert same(plain(run(two, tmp_path / "hf", "hf-safetensors")), plain(source))


def test_pickled_files_are_what_torch_loads(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("deepseek_moe")
    there = run(source, tmp_path / "bin", "hf-bin", shard_size=1_000_000)
    files = sorted(there.glob("*.bin"))
    assert len(files) > 2
    index = json.loads((there / "pytorch_model.bin.index.json").read_text())
    loaded: Tensors = {}
    for path in files:
        part = torch.load(path, weights_only=True)
        assert {index["weight_map"][name] for name in part} == {path.name}
        loaded |= part
    assert same(loaded, plain(source))
    assert same(plain(run(there, tmp_path / "hf", "hf-safetensors")), plain(source))


def test_shards_and_their_index(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("deepseek_moe")
    there = run(source, tmp_path / "hf", "hf-safetensors", shard_size=1_000_000)
    index = json.loads((there / "model.safetensors.index.json").read_text())
    assert same(plain(there), plain(source))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in plain(source).values())
    assert set(index["weight_map"].values()) == {path.name for path in there.glob("*.safetensors")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype(dtype: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("deepseek_v3")
    found = plain(run(source, tmp_path / "out", "hf-safetensors", dtype=dtype))
    for name, tensor in plain(source).items():
        kept = name.endswith("e_score_correction_bias")
        assert torch.equal(found[name], tensor if kept else tensor.to(getattr(torch, dtype)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


# Quantization


@pytest.mark.parametrize("scheme", [Scheme.of("w8a16"), Scheme.of("w4a16"), Scheme.of("w4a16", 16), Scheme.of("w8a8")])
def test_codes_do_not_depend_on_the_number_of_ranks(
    scheme: Scheme, models: Callable[[str], Path], tmp_path: Path
) -> None:
    source = models("deepseek_v3")
    one = values_of(run(source, tmp_path / "1", "ascend-mp", scheme=scheme, dtype="bfloat16"))
    two = values_of(run(source, tmp_path / "2", "ascend-mp", scheme=scheme, dtype="bfloat16", tp=2))
    whole = values_of(run(source, tmp_path / "hf", "hf-safetensors", scheme=scheme, dtype="bfloat16"))
    assert same(one, two)
    assert same(one, whole)


def test_int8_codes_are_equal_on_one_and_eight_ranks(models: Callable[[str], Path], tmp_path: Path) -> None:
    source, scheme = models("deepseek_v3"), Scheme.of("w8a16")
    one = run(source, tmp_path / "1", "ascend-mp", scheme=scheme)
    eight = run(source, tmp_path / "8", "ascend-mp", scheme=scheme, tp=8)
    whole = safetensors.torch.load_file(one / "model0-mp1.safetensors")
    ranks = [safetensors.torch.load_file(eight / f"model{n}-mp8.safetensors") for n in range(8)]
    wo, w1 = "layers.0.attn.wo.weight", "layers.0.ffn.w1.weight"
    assert torch.equal(torch.cat([rank[wo] for rank in ranks], 0), whole[wo])
    assert torch.equal(torch.cat([rank[w1] for rank in ranks], 1), whole[w1])
    assert all(torch.equal(rank["layers.0.attn.wo.scale"], whole["layers.0.attn.wo.scale"]) for rank in ranks)
    experts = {name for rank in ranks for name in rank if ".experts." in name}
    assert experts == {name for name in whole if ".experts." in name}
    assert all(torch.equal(rank[name], whole[name]) for rank in ranks for name in rank if ".experts." in name)


def test_what_is_quantized_and_what_stays(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("deepseek_v3")
    there = run(source, tmp_path / "q", "hf-safetensors", scheme=Scheme.of("w4a16", 32), dtype="bfloat16")
    stored = plain(there)
    quantized = {name.removesuffix("_packed") for name in stored if name.endswith("weight_packed")}
    left = set(plain(source)) - quantized
    assert not {n for n in left if n.endswith(("o_proj.weight", "down_proj.weight", "q_proj.weight", "up_proj.weight"))}
    ends = ("embed_tokens.weight", "lm_head.weight", "norm.weight", "gate.weight", "kv_b_proj.weight", "bias")
    assert all(name.endswith((*ends, "layernorm.weight")) for name in left)
    config = json.loads((there / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert (group["weights"]["num_bits"], group["weights"]["group_size"], group["input_activations"]) == (4, 32, None)
    name = "model.layers.0.mlp.down_proj.weight"
    assert stored[f"{name}_shape"].tolist() == list(plain(source)[name].shape)
    error = (values_of(there)[name] - plain(source)[name]).abs()
    assert (error <= stored[f"{name}_scale"].float().repeat_interleave(32, 1) * 0.51).all()


def test_dynamic_tokens_are_told(models: Callable[[str], Path], tmp_path: Path) -> None:
    there = run(models("deepseek_coder"), tmp_path / "q", "hf-safetensors", scheme=Scheme.of("w8a8"))
    config = json.loads((there / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    assert plain(there)["model.layers.0.mlp.down_proj.weight"].dtype is torch.int8


def float8_model(source: Path, folder: Path) -> tuple[Path, Tensors]:
    """A copy whose matrices are stored as float8 with a scale per block of 128 x 128, and what they stand for."""
    shutil.copytree(source, folder)
    stored, due = {}, {}
    for name, tensor in plain(source).items():
        if tensor.dim() != 2 or "embed" in name or "lm_head" in name or name.endswith("gate.weight"):
            stored[name] = due[name] = tensor.bfloat16()
            continue
        rows, columns = (-(-size // 128) for size in tensor.shape)
        scales = torch.rand(rows, columns, generator=torch.Generator().manual_seed(len(stored))) + 0.5
        wide = scales.repeat_interleave(128, 0)[: len(tensor)].repeat_interleave(128, 1)[:, : tensor.shape[1]]
        stored[name] = (tensor / wide).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
        due[name] = stored[name].float() * wide
    safetensors.torch.save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, due


def test_float8_in_blocks_becomes_plain(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder, due = float8_model(models("deepseek_v3"), tmp_path / "fp8")
    there = run(folder, tmp_path / "bf16", "hf-safetensors")
    assert same(plain(there), {name: tensor.bfloat16() for name, tensor in due.items()})
    config = json.loads((there / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "bfloat16"


def test_float8_is_quantized_without_a_rounding_between(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder, due = float8_model(models("deepseek_v3"), tmp_path / "fp8")
    found = plain(run(folder, tmp_path / "int8", "hf-safetensors", scheme=Scheme.of("w8a8")))
    name = "model.layers.0.mlp.down_proj.weight"
    scales = (due[name].abs().amax(1) / 127).bfloat16()
    assert torch.equal(found[f"{name}_scale"][:, 0], scales)
    assert torch.equal(found[name], (due[name] / scales.float()[:, None]).round().to(torch.int8))


# What comes along


def test_files_that_come_along(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("deepseek_coder")
    there = run(source, tmp_path / "plain", "hf-bin")
    assert (there / "tokenizer.json").read_text() == "{}"
    assert not (there / "modeling_own.py").exists()
    assert not list(there.glob("*.safetensors"))
    assert (run(source, tmp_path / "code", "hf-bin", include_code=True) / "modeling_own.py").exists()


def test_layers_that_predict_further_tokens(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "mtp"
    shutil.copytree(models("deepseek_v3"), source)
    tensors = plain(source)
    extra = {f"model.layers.2.{name}": torch.ones(4, 4) for name in ("eh_proj.weight", "enorm.weight")}
    safetensors.torch.save_file(tensors | extra, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    kept = run(source, tmp_path / "kept", "hf-safetensors")
    assert same(plain(kept), tensors | extra)
    dropped = run(source, tmp_path / "dropped", "hf-safetensors", mtp="drop")
    assert same(plain(dropped), tensors)
    assert json.loads((dropped / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert set(read_manifest(dropped).dropped) == set(extra)
    with pytest.raises(WeightsError, match=r"model\.layers\.2\.eh_proj\.weight: ascend-mp has no name for it"):
        plan_conversion(source, ConvertOptions("ascend-mp"))
    assert plan_conversion(source, ConvertOptions("ascend-mp", mtp="drop")).dropped


def test_the_manifest_finds_a_changed_byte(models: Callable[[str], Path], tmp_path: Path) -> None:
    there = run(models("deepseek_coder"), tmp_path / "out", "hf-safetensors", shard_size=2_000_000)
    assert verify(there).faults == ()
    files = sorted(there.glob("*.safetensors"))
    raw = bytearray(files[0].read_bytes())
    raw[-7] ^= 1
    files[0].write_bytes(raw)
    (fault,) = verify(there).faults
    assert "another checksum" in fault
    assert files[0].name in fault
    files[1].unlink()
    files[0].write_bytes(raw[:-1])
    assert [fault.split(" ", 1)[1] for fault in verify(there).faults][:1] == [
        f"has {len(raw) - 1} bytes; {len(raw)} are due"
    ]
    with pytest.raises(WeightsError, match="has no npu-zoo-manifest"):
        verify(models("deepseek_coder"))


def test_the_source_is_as_it_was(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("deepseek_coder")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.rglob("*") if path.is_file()}
    run(source, tmp_path / "out", "ascend-mp", tp=4, scheme=Scheme.of("w8a16"))
    assert before == {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.rglob("*") if path.is_file()
    }


# Interruptions


def content(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_an_interrupted_conversion_goes_on(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = models("deepseek_v3")
    whole = run(source, tmp_path / "whole", "ascend-mp", tp=2)
    plan = plan_conversion(source, ConvertOptions("ascend-mp", tp=2))
    original = converting._Conversion.run
    seen: list[str] = []

    def fail(self: Any, name: str) -> None:
        seen.append(name)
        if len(seen) > 20:
            raise KeyboardInterrupt
        original(self, name)

    monkeypatch.setattr(converting._Conversion, "run", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(plan, tmp_path / "out", threads=2)
    assert not (tmp_path / "out").exists()
    again: list[str] = []
    monkeypatch.setattr(converting._Conversion, "run", lambda self, name: (again.append(name), original(self, name))[1])
    result = convert(plan, tmp_path / "out", threads=2)
    assert result.resumed >= 15
    assert len(again) == len(plan.placed) - result.resumed
    assert content(tmp_path / "out") == content(whole)


SLOW = """
import sys, time
from npu_zoo.weights import convert as converting
original = converting._Conversion._place
def slow(self, *arguments):
    time.sleep(0.004)
    original(self, *arguments)
converting._Conversion._place = slow
from npu_zoo.cli import main
sys.exit(main(sys.argv[1:]))
"""


def size_of(path: Path) -> int:
    """Bytes of a file that another process may rename at any moment."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def kill_and_resume(source: Path, tmp_path: Path, whole: Path, rounds: int) -> None:
    command = [
        sys.executable,
        "-c",
        SLOW,
        "convert",
        str(source),
        str(tmp_path / "out"),
        "--to",
        "ascend-mp",
        "--tp",
        "2",
    ]
    command += ["--quantize", "w8a16"]
    clock = random.Random(3)
    kills = 0
    while kills < rounds:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        journal = partial_directory(tmp_path / "out") / "journal.jsonl"
        before = size_of(journal)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if size_of(journal) > before:
                break  # it is at work, not starting
            time.sleep(0.005)
        time.sleep(clock.random() * 0.3)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        if (tmp_path / "out").exists():
            assert content(tmp_path / "out") == content(whole)
            shutil.rmtree(tmp_path / "out")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(whole)
    assert not partial_directory(tmp_path / "out").exists()


def test_killed_at_random_moments(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("deepseek_v3")
    whole = run(source, tmp_path / "whole", "ascend-mp", tp=2, scheme=Scheme.of("w8a16"))
    kill_and_resume(source, tmp_path, whole, rounds=2)


@pytest.mark.long
def test_killed_at_many_random_moments(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("deepseek_v3")
    whole = run(source, tmp_path / "whole", "ascend-mp", tp=2, scheme=Scheme.of("w8a16"))
    kill_and_resume(source, tmp_path, whole, rounds=50)


def test_a_torn_journal_costs_one_tensor(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("deepseek_coder")
    plan = plan_conversion(source, ConvertOptions("hf-bin"))
    whole = run(source, tmp_path / "whole", "hf-bin")
    work = partial_directory(tmp_path / "out")
    shutil.copytree(whole, work)
    for name in ("npu-zoo-manifest.json", "config.json"):
        (work / name).unlink()
    with pytest.raises(WeightsError, match="is in the way"):
        convert(plan, tmp_path / "out")
    (work / "journal.jsonl").write_text('{"conversion": "' + plan.digest + '", "boot": "another"}\n{"name": "lm_h')
    assert convert(plan, tmp_path / "out").resumed == 0
    assert content(tmp_path / "out") == content(whole)


def test_what_did_not_reach_the_disk_is_written_again(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("deepseek_coder")
    plan = plan_conversion(source, ConvertOptions("hf-safetensors"))
    work, kept = partial_directory(tmp_path / "out"), tmp_path / "kept"

    def stop(tensors: int, *_: int) -> None:
        if tensors:
            shutil.copytree(work, kept)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan, tmp_path / "out", stop)
    journal = work / "journal.jsonl"
    lines = journal.read_text().splitlines()
    head = json.loads(lines[0]) | {"boot": "before the power failed"}
    journal.write_text("\n".join([json.dumps(head), *lines[1:]]) + "\n")
    file = work / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-4096:] = bytes(4096)
    file.write_bytes(raw)
    convert(plan, tmp_path / "out")
    assert same(plain(tmp_path / "out"), plain(source))


def test_a_full_disk_leaves_no_result(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = models("deepseek_coder")
    plan = plan_conversion(source, ConvertOptions("hf-bin"))
    real, room = os.pwrite, [2_000_000]

    def full(descriptor: int, data: Any, offset: int) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WeightsError, match=r"No space left on device; make room and give the same command again"):
        convert(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(os, "pwrite", real)
    convert(plan, tmp_path / "out")
    assert torch.load(tmp_path / "out" / "pytorch_model.bin").keys() == plain(source).keys()


def test_a_disk_that_is_too_small_is_refused_first(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_conversion(models("deepseek_coder"), ConvertOptions("hf-bin"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(WeightsError, match=r"the result takes .* GB, and .* has 0\.0 GB free"):
        convert(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_write_one_result(models: Callable[[str], Path], tmp_path: Path) -> None:
    plan = plan_conversion(models("deepseek_coder"), ConvertOptions("hf-bin"))

    def second(tensors: int, *_: int) -> None:
        with pytest.raises(WeightsError, match="another process writes into"):
            convert(plan, tmp_path / "out")

    convert(plan, tmp_path / "out", second)


# Bad input


def test_another_conversions_leftovers_are_not_taken(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("deepseek_coder")

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan_conversion(source, ConvertOptions("hf-bin")), tmp_path / "out", stop)
    with pytest.raises(WeightsError, match="unfinished result of another conversion"):
        run(source, tmp_path / "out", "hf-bin", dtype="float16")


def test_destinations_that_are_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("deepseek_coder")
    (tmp_path / "there").mkdir()
    with pytest.raises(WeightsError, match="exists; delete it or name another"):
        run(source, tmp_path / "there", "hf-bin")
    with pytest.raises(WeightsError, match="which is only read"):
        run(source, source / "inside", "hf-bin")
    with pytest.raises(WeightsError, match="is no directory; make it first"):
        run(source, tmp_path / "no" / "where", "hf-bin")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(WeightsError, match="exists"):
        run(source, tmp_path / "link", "hf-bin")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "gguf"}, r"unknown format 'gguf' for --to; formats that can be written: ascend-mp, hf-safetensors"),
        ({"to": "hf-bin", "tp": 2}, "hf-bin holds whole tensors"),
        ({"to": "ascend-mp", "tp": 4, "ep": 2}, r"--ep 2: the ranks that share the experts are those of --tp 4"),
        ({"to": "ascend-mp", "tp": 4, "ep": 4}, "config.json names no routed experts"),
    ],
)
def test_options_that_contradict(options: dict[str, Any], words: str, models: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=words):
        plan_conversion(models("deepseek_coder"), ConvertOptions(**options))


def test_ranks_that_do_not_divide_name_the_tensor(models: Callable[[str], Path]) -> None:
    with pytest.raises(WeightsError, match=r"tensor \S+ has \d+ (rows|columns), which 7 ranks do not divide"):
        plan_conversion(models("deepseek_coder"), ConvertOptions("ascend-mp", tp=7))
    with pytest.raises(WeightsError, match="16 experts do not divide among 3 ranks"):
        plan_conversion(models("deepseek_moe"), ConvertOptions("ascend-mp", tp=3))


def test_int4_of_an_odd_width_names_the_tensor(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "odd"
    shutil.copytree(models("deepseek_coder"), source)
    tensors = plain(source)
    name = "model.layers.0.mlp.down_proj.weight"
    safetensors.torch.save_file(tensors | {name: torch.randn(36, 192)}, source / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"{name} has 36 output channels a rank, of which 8 go into a word"):
        plan_conversion(source, ConvertOptions("ascend-mp", scheme=Scheme.of("w4a16")))
    with pytest.raises(WeightsError, match=r"has \d+ input values a channel, which groups of 100 do not divide"):
        plan_conversion(source, ConvertOptions("hf-safetensors", scheme=Scheme.of("w4a16", 100)))


def test_a_model_that_a_format_has_no_names_for(models: Callable[[str], Path]) -> None:
    with pytest.raises(WeightsError, match=r"tensor model\.\S+: mindspore-ckpt has no name for it"):
        plan_conversion(models("deepseek_v3"), ConvertOptions("mindspore-ckpt"))


def test_what_is_quantized_is_not_quantized_again(models: Callable[[str], Path], tmp_path: Path) -> None:
    there = run(models("deepseek_coder"), tmp_path / "q", "hf-safetensors", scheme=Scheme.of("w8a16"))
    with pytest.raises(WeightsError, match="is quantized already"):
        plan_conversion(there, ConvertOptions("hf-safetensors", scheme=Scheme.of("w4a16")))
    with pytest.raises(WeightsError, match="mindspore-ckpt holds no quantized tensors"):
        plan_conversion(there, ConvertOptions("mindspore-ckpt"))


def damaged(source: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(source, folder)
    change(folder)
    return folder


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def drop(folder: Path, suffix: str) -> None:
    tensors = plain(folder)
    gone = next(name for name in tensors if name.endswith(suffix))
    safetensors.torch.save_file({n: t for n, t in tensors.items() if n != gone}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), "quantized by 'gptq'"),
        (lambda f: edit_config(f, quantization_config=[1]), "quantization_config is no object"),
        (lambda f: edit_config(f, quantization_config={"quant_method": "compressed-tensors"}), "is not understood"),
        (lambda f: drop(f, "weight_scale"), r"weight_scale is missing beside"),
        (lambda f: drop(f, "weight_shape"), r"weight_shape is missing beside"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), "model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
    ],
    ids=["method", "no object", "nothing in it", "no scales", "no shape", "truncated", "no config"],
)
def test_damaged_sources_name_what_is_wrong(
    change: Callable[[Path], None], words: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    there = run(models("deepseek_coder"), tmp_path / "q", "hf-safetensors", scheme=Scheme.of("w8a16"))
    with pytest.raises(NpuZooError, match=words):
        plan_conversion(damaged(there, tmp_path / "bad", change), ConvertOptions("hf-bin"))


def test_ranks_that_are_missing_or_contradict(models: Callable[[str], Path], tmp_path: Path) -> None:
    there = run(models("deepseek_coder"), tmp_path / "mp", "ascend-mp", tp=4)
    lost = damaged(there, tmp_path / "lost", lambda f: (f / "model2-mp4.safetensors").unlink())
    with pytest.raises(WeightsError, match=r"model2-mp4\.safetensors is missing"):
        open_source(lost)

    def add(folder: Path) -> None:
        shutil.copy(folder / "model0-mp4.safetensors", folder / "model0-mp2.safetensors")

    two = damaged(there, tmp_path / "two", add)
    with pytest.raises(WeightsError, match=r"ranks' files of \[2, 4\] mp sizes"):
        open_source(two)

    def cut(folder: Path) -> None:
        path = folder / "model1-mp4.safetensors"
        tensors = safetensors.torch.load_file(path)
        del tensors["layers.0.attn.wq.weight"]
        safetensors.torch.save_file(tensors, path)

    with pytest.raises(WeightsError, match=r"layers\.0\.attn\.wq\.weight is on 3 of 4 ranks"):
        open_source(damaged(there, tmp_path / "cut", cut))

    def strange(folder: Path) -> None:
        path = folder / "model1-mp4.safetensors"
        safetensors.torch.save_file(safetensors.torch.load_file(path) | {"odd.name": torch.ones(1)}, path)

    with pytest.raises(WeightsError, match=r"tensor odd\.name is none of ascend-mp's names"):
        open_source(damaged(there, tmp_path / "strange", strange))
    ranks = run(models("deepseek_coder"), tmp_path / "ms", "mindspore-ckpt", tp=4)
    gone = damaged(ranks, tmp_path / "gone", lambda f: shutil.rmtree(f / "rank_1"))
    with pytest.raises(WeightsError, match="rank_1 is missing"):
        open_source(gone)


def test_a_link_out_of_the_directory_is_not_followed(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "linked"
    shutil.copytree(models("deepseek_coder"), source)
    (tmp_path / "secret.txt").write_text("secret")
    (source / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(WeightsError, match="is a link out of the directory"):
        run(source, tmp_path / "out", "hf-bin")
    assert not (tmp_path / "out").exists()
