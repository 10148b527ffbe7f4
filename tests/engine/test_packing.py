"""Engines on weights that an earlier run packed: the same tokens, without reading the checkpoint's again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_zoo import LLM, SamplingParams
from npu_zoo.compiled.library import obstacle
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import WeightsError
from npu_zoo.core.parallel import Ranks, Split
from npu_zoo.dispatch import resolve
from npu_zoo.engine.packing import packed_source
from npu_zoo.nn.kernels.compiled.linear import PanelLinear
from npu_zoo.nn.kernels.compiled.quantized import PanelInt4Linear, PanelInt8Linear
from npu_zoo.nn.kernels.quantized import QuantizedWeight
from npu_zoo.testing.checkpoints import write_checkpoint
from npu_zoo.testing.door import unchecked_config
from npu_zoo.weights import packed
from npu_zoo.weights.convert import convert
from npu_zoo.weights.header import read_safetensors_header
from npu_zoo.weights.packed import list_packed
from npu_zoo.weights.plan import ConvertOptions, plan_conversion
from npu_zoo.weights.quantize import Scheme

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=f"the compiled kernels cannot serve: {obstacle()}")

FAMILIES = ["deepseek_coder", "deepseek_moe", "deepseek_v3", "wizardcoder"]
PROMPTS = ["def add(a, b):", "import os\n"]
GREEDY = SamplingParams(temperature=0, max_tokens=16, logprobs=1, ignore_eos=True)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled library stays where it is, beneath the same variable."""
    monkeypatch.setattr(packed, "packed_folder", lambda: tmp_path / "packed")


def run(mode: str, **options: Any) -> tuple[Any, str | None]:
    """What an engine writes, and the file of packed weights that it tells of."""
    with LLM(dtype="bfloat16", allow_experimental=True, packed_weights=mode, **options) as llm:
        written = [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in llm.generate(PROMPTS, GREEDY)]
        return written, llm.engine.explain()["packed_weights"]


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for every weight that is packed."""
    made: list[int] = []
    original = PanelLinear.pack_parts

    def counted(parts: Any) -> Any:
        made.append(len(parts))
        return original(parts)

    monkeypatch.setattr(PanelLinear, "pack_parts", staticmethod(counted))
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_kept_gives_the_same_tokens_and_is_not_packed_again(family: str, packings: list[int]) -> None:
    plain, path = run("auto", model=family)
    assert path is None
    assert list_packed() == []
    count = len(packings)
    kept, path = run("keep", model=family)
    assert kept == plain
    assert [str(file.path) for file in list_packed()] == [path]
    packings.clear()
    taken, again = run("auto", model=family)
    assert (taken, again) == (plain, path)
    # Routers are small, and packed by each run.
    assert len(packings) < count / 4
    packings.clear()
    assert run("off", model=family) == (plain, None)
    assert len(packings) == count


def test_the_checkpoint_is_not_read_again(tmp_path: Path) -> None:
    """Of what was kept; the embedding and norms are."""
    weights = write_checkpoint(tmp_path / "weights")
    options = {"model": "deepseek_coder:custom", "weights": str(weights)}
    due, _ = run("keep", **options)
    file = weights / "model.safetensors"
    stat, data = file.stat(), bytearray(file.read_bytes())
    for entry in read_safetensors_header(file):
        if "_proj" in entry.name or "lm_head" in entry.name:
            data[entry.start : entry.stop] = bytes(entry.stop - entry.start)
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run("auto", **options)[0] == due
    assert run("off", **options)[0] != due


def test_another_state_of_the_checkpoint_is_packed_anew(tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path / "weights")
    options = {"model": "deepseek_coder:custom", "weights": str(weights)}
    first, path = run("keep", **options)
    other = write_checkpoint(tmp_path / "other", seed=5)
    shutil.copy(other / "model.safetensors", weights / "model.safetensors")
    second, none = run("auto", **options)
    assert none is None
    assert second != first
    assert run("keep", **options) == (second, path)
    assert run("auto", **options) == (second, path)
    assert len(list_packed()) == 1


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
def test_quantized_weights(scheme: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "plain")
    weights = tmp_path / scheme
    convert(plan_conversion(source, ConvertOptions("hf-safetensors", scheme=Scheme.of(scheme))), weights)
    options = {"model": "deepseek_coder:custom", "weights": str(weights)}
    due, path = run("keep", **options)
    assert path is not None
    assert run("auto", **options) == (due, path)
    assert run("off", **options) == (due, None)


def test_kernels_that_take_weights_as_they_are_keep_nothing() -> None:
    with LLM(model="deepseek_coder", dtype="float32", packed_weights="keep") as llm:
        assert llm.engine.explain()["packed_weights"] is None
    assert list_packed() == []


def test_a_file_of_another_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run("keep", model="deepseek_coder")
    monkeypatch.setattr("npu_zoo.engine.packing.read_packed", lambda *_: {"model.nothing.panels": torch.zeros(64)})
    with pytest.raises(WeightsError, match=r"packed weights of model\.nothing, which the model does not have; remove"):
        run("auto", model="deepseek_coder")


def test_every_part_of_a_model_has_a_file_and_replicas_share_it() -> None:
    config = resolve(EngineArgs(model="deepseek_coder", dtype="bfloat16"))
    splits = {Split(tp=2): 2, Split(dp=2): 1, Split(tp=2, dp=2): 2, Split(): 1}
    paths = []
    for split, due in splits.items():
        changed = unchecked_config(
            config, tensor_parallel_size=split.tp, data_parallel_size=split.dp, world_size=split.world_size
        )
        found = {packed_source(changed, Ranks(split.place(rank))).path for rank in range(split.world_size)}
        assert len(found) == due
        paths += found
    assert len(set(paths)) == len(paths)


def test_parts_of_another_size_are_refused() -> None:
    packed_weight = PanelLinear.pack(torch.zeros(32, 64, dtype=torch.bfloat16))
    parts = PanelLinear.packed_parts(packed_weight)
    assert PanelLinear.from_packed_parts(parts, 32, 64) == packed_weight
    with pytest.raises(WeightsError, match="4096 bytes of panels, and 8192"):
        PanelLinear.from_packed_parts(parts, 64, 64)
    with pytest.raises(WeightsError, match="no panels"):
        PanelLinear.from_packed_parts({}, 32, 64)


@pytest.mark.parametrize("kernel", [PanelInt8Linear, PanelInt4Linear])
@pytest.mark.parametrize("groups", [1, 3])
def test_codes_come_back_as_they_were(kernel: Any, groups: int) -> None:
    codes = torch.randint(-7, 8, (40, 192), dtype=torch.int8)
    weight = QuantizedWeight(codes, torch.rand(40, groups) / 10, kernel.bits, torch.bfloat16)
    stored = kernel.pack(weight)
    again = kernel.from_packed_parts(kernel.packed_parts(stored), 40, 192)
    assert (again.group_size, again.bits, again.channels, again.inputs) == (192 // groups, kernel.bits, 40, 192)
    x = torch.randn(3, 192).bfloat16()
    assert torch.equal(kernel.apply(x, again), kernel.apply(x, stored))
    with pytest.raises(WeightsError, match="scales"):
        kernel.from_packed_parts({"panels": stored.values}, 40, 192)
