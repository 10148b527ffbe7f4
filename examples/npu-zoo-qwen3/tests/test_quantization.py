"""Checkpoints in the package's own layout, against plain ones whose weights are exactly ``code * scale``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from npu_zoo.api import UnsupportedError, WeightsError
from npu_zoo.testing.agreement import agree
from npu_zoo_qwen3.int8_rows import SCHEME, make_section, read_section
from npu_zoo_qwen3.weights import quantize_checkpoint, quantize_rows

from .conftest import Launch, Write, change_config

BOUND = {"float32": 1e-4, "bfloat16": 0.15, "float16": 0.02}
"""Of a natural-log probability; in halves the rounding of plain weights is what differs."""

PROMPTS = [list(range(3, 3 + length)) for length in (70, 17, 1)]
NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def source(write: Write) -> Path:
    return write(tie_word_embeddings=True)


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    target = source.parent / "quantized"
    assert quantize_checkpoint(source, target) == 2 * 7
    return target


@pytest.fixture(scope="module")
def restored(quantized: Path) -> Path:
    """The plain checkpoint that the quantized one stands for, written out."""
    target = quantized.parent / "restored"
    target.mkdir()
    tensors = load_file(quantized / "model.safetensors")
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(".scale")}
    for name in [name for name in tensors if name.endswith(".scale")]:
        layer, scale = name.removesuffix(".scale"), tensors[name]
        plain[f"{layer}.weight"] = tensors[f"{layer}.weight"].float() * scale.unsqueeze(1)
    save_file(plain, target / "model.safetensors", {"format": "pt"})
    config = json.loads((quantized / "config.json").read_text("utf-8"))
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    return change_config(target, quantization_config=None)


@pytest.mark.parametrize("dtype", BOUND)
def test_it_is_the_plain_model_with_its_weights(dtype: str, quantized: Path, restored: Path, launch: Launch) -> None:
    llm = launch(quantized, dtype=dtype)
    assert llm.engine.config.quantization == SCHEME
    found = agree(launch(restored, dtype=dtype), llm, PROMPTS)
    assert found.within(BOUND[dtype]), found


def test_on_two_ranks_and_contiguous(quantized: Path, restored: Path, launch: Launch) -> None:
    """A rank has all scales of the weights that it shares by columns, and some of those that it shares by rows."""
    with launch(quantized, tensor_parallel_size=2, attention="flash") as llm:
        found = agree(launch(restored), llm, PROMPTS)
    assert found.within(BOUND["float32"]), found


def test_quantizing_keeps_what_is_no_linear_layer(source: Path, quantized: Path) -> None:
    before, after = (load_file(directory / "model.safetensors") for directory in (source, quantized))
    for name, tensor in before.items():
        if name.endswith("_proj.weight"):
            codes, scale = after[name], after[name.removesuffix("weight") + "scale"]
            assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (len(tensor),))
            assert float((codes * scale.unsqueeze(1) - tensor).abs().max()) <= float(scale.max()) * 0.51
        else:
            assert torch.equal(after[name], tensor)


def test_rows_of_zeros_have_codes_of_zero() -> None:
    weight = torch.tensor([[0.0, 0.0], [-2.54, 1.27]])
    codes, scale = quantize_rows(weight)
    assert codes.tolist() == [[0, 0], [-127, 64]]
    assert scale.tolist() == pytest.approx([1.0, 0.02])


def test_shards_have_an_index_of_their_own(write: Write, launch: Launch, tmp_path: Path) -> None:
    directory = write(seed=7)
    tensors = load_file(directory / "model.safetensors")
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {name: files[number % 2] for number, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: t for n, t in tensors.items() if places[n] == file}, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    whole = tmp_path / "whole"
    whole.mkdir()
    (directory / "model.safetensors").rename(directory / "model.kept")
    quantize_checkpoint(directory, whole)
    assert len(list(whole.glob("*.safetensors"))) == 2
    output = launch(whole).generate(PROMPTS)[0]
    assert output.outputs[0].token_ids


def test_the_section_comes_back() -> None:
    found = read_section(make_section(["lm_head", "model.layers.0.mlp.up_proj"]))
    assert (found.scheme, found.weight_bits, found.activation_bits, found.group_size) == (SCHEME, 8, 16, None)
    assert found.ignores("model.layers.0.mlp.up_proj")
    assert not found.ignores("model.layers.1.mlp.up_proj")


def test_a_layer_that_is_named_stays_plain(quantized: Path, restored: Path, launch: Launch, tmp_path: Path) -> None:
    plain = load_file(restored / "model.safetensors")[f"{NAME}.weight"]

    def put_back(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{NAME}.scale"]
        tensors[f"{NAME}.weight"] = plain

    directory = changed(quantized, tmp_path, put_back)
    change_config(directory, quantization_config=make_section(["lm_head", NAME]))
    assert agree(launch(restored), launch(directory), PROMPTS).within(BOUND["float32"])


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"quant_method": "int8-rows", "bits": 4}, r"quant_method int8-rows: bits: input should be 8, given 4"),
        ({"quant_method": "int8-rows"}, r"bits: field required"),
        ({"quant_method": "int8-rows", "bits": 8, "group_size": 32}, r"group_size: extra inputs are not permitted"),
        ({"quant_method": "int8-columns", "bits": 8}, r"quant_method int8-columns\); use an unquantized checkpoint"),
    ],
)
def test_what_is_not_read_is_refused(
    quantized: Path, section: dict[str, Any], named: str, launch: Launch, tmp_path: Path
) -> None:
    directory = change_config(changed(quantized, tmp_path), quantization_config=section)
    with pytest.raises(WeightsError, match=named):
        launch(directory)


def lose_scale(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{NAME}.scale"]


def stack_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.scale"] = tensors[f"{NAME}.scale"].unsqueeze(1)


def widen_codes(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.weight"] = tensors[f"{NAME}.weight"].int()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lose_scale, rf"1 missing:\n    {NAME}.scale"),
        (stack_scale, rf"{NAME}.scale: \[64, 1\] in the checkpoint, \[64\] due"),
        (widen_codes, rf"{NAME}.weight is stored as int32 and cannot be loaded as int8"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    quantized: Path, change: Callable[[dict[str, Tensor]], None], named: str, launch: Launch, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=named):
        launch(changed(quantized, tmp_path, change))


def test_other_schemes_are_refused(quantized: Path, restored: Path, launch: Launch) -> None:
    with pytest.raises(UnsupportedError, match="quantization=w8a16 is not supported"):
        launch(quantized, quantization="w8a16")
    with pytest.raises(WeightsError, match=r"--quantization int8_rows was asked for.* is not quantized"):
        launch(restored, quantization=SCHEME)
    with pytest.raises(UnsupportedError, match="quantization=int8_rows is not supported"):
        launch(quantized, hardware="atlas_800i_a2", dtype="bfloat16", allow_experimental=True)


def test_the_command(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "npu_zoo", "qwen3", "quantize", str(source)]
    done = subprocess.run([*command, str(tmp_path / "made")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'made'}: 14 layers in int8_rows\n"), done.stderr
    assert (tmp_path / "made" / "model.safetensors").is_file()
    again = subprocess.run([*command, str(tmp_path / "made")], capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr) == (
        5,
        f"error: {tmp_path / 'made'} is there already; delete it or choose another directory\n",
    )


@pytest.mark.parametrize(
    ("prepare", "named"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json cannot be read"),
        (lambda d: (d / "model.safetensors").unlink(), r"holds no \*.safetensors"),
        (lambda d: change_config(d, quantization_config=make_section([])), "is quantized already"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    prepare: Callable[[Path], Any], named: str, write: Write, tmp_path: Path
) -> None:
    directory = write(seed=8)
    prepare(directory)
    with pytest.raises(WeightsError, match=named):
        quantize_checkpoint(directory, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def changed(quantized: Path, target: Path, change: Callable[[dict[str, Tensor]], None] | None = None) -> Path:
    """A copy of a checkpoint with other tensors."""
    tensors = load_file(quantized / "model.safetensors")
    if change is not None:
        change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text((quantized / "config.json").read_text("utf-8"), "utf-8")
    return target
