"""Engines on weights that an earlier run packed: the same tokens, without reading the checkpoint's again."""

from __future__ import annotations

import py_compile
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_zoo import LLM, SamplingParams
from npu_zoo.compiled.library import library_folder, obstacle
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import WeightsError
from npu_zoo.core.parallel import Ranks, Split
from npu_zoo.dispatch import resolve
from npu_zoo.engine import packing, runner
from npu_zoo.engine.packing import packed_request
from npu_zoo.nn.kernels.compiled.linear import PanelLinear
from npu_zoo.nn.kernels.compiled.quantized import PanelInt4Linear, PanelInt8Linear
from npu_zoo.nn.kernels.quantized import QuantizedWeight
from npu_zoo.testing.checkpoints import write_checkpoint
from npu_zoo.testing.door import unchecked_config
from npu_zoo.weights.convert import convert
from npu_zoo.weights.loader import BinLoader
from npu_zoo.weights.packed import MappedTensors, list_packed
from npu_zoo.weights.plan import ConvertOptions, plan_conversion
from npu_zoo.weights.quantize import Scheme
from npu_zoo.weights.safetensors import SafetensorsLoader

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=f"the compiled kernels cannot serve: {obstacle()}")

FAMILIES = ["deepseek_coder", "deepseek_moe", "deepseek_v3", "wizardcoder"]
PROMPTS = ["def add(a, b):", "import os\n"]
NO_LAYOUT = "no kernel of this run has a layout that can be"
GREEDY = SamplingParams(temperature=0, max_tokens=16, logprobs=1, ignore_eos=True)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For processes of ranks as well; the compiled library stays where it is, beneath the same variable."""
    folder = tmp_path / "cache" / "npu-zoo"
    folder.mkdir(parents=True)
    (folder / "kernels").symlink_to(library_folder().parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent))


def run(mode: str, **options: Any) -> tuple[Any, str | None]:
    """What an engine writes, and the file of packed weights that it tells of."""
    with LLM(dtype="bfloat16", allow_experimental=True, packed_weights=mode, **options) as llm:
        written = [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in llm.generate(PROMPTS, GREEDY)]
        return written, llm.engine.explain()["packed_weights"]["file"]


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


@pytest.fixture
def left_out(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What loaders were told not to read."""
    told: list[set[str]] = []
    for loader in (SafetensorsLoader, BinLoader):
        plain = loader.tensors

        def spied(self: Any, shards: Any = None, without: Any = (), plain: Any = plain) -> Any:
            told.append(set(without))
            return plain(self, shards, without)

        monkeypatch.setattr(loader, "tensors", spied)
    return told


@pytest.mark.parametrize("form", ["hf-safetensors", "hf-bin"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_checkpoint_is_not_read_again(form: str, tied: bool, tmp_path: Path, left_out: list[set[str]]) -> None:
    """Of what was kept; the embedding and norms are."""
    source = write_checkpoint(tmp_path / "source", tie_word_embeddings=tied)
    convert(plan_conversion(source, ConvertOptions(form)), tmp_path / "weights")
    options = {"model": "deepseek_coder:custom", "weights": str(tmp_path / "weights")}
    due, path = run("keep", **options)
    assert run("auto", **options) == (due, path)
    assert run("off", **options) == (due, None)
    assert left_out[0] == left_out[2] == set()
    assert {name.split(".")[-2] for name in left_out[1]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    }


def test_drafts_of_a_layer_that_was_kept(packings: list[int]) -> None:
    """A run that drafts with the model's own layer has a file of its own."""
    options = {"model": "deepseek_v3", "speculative_method": "mtp"}
    plain, path = run("keep", model="deepseek_v3")
    due, drafting = run("keep", **options)
    assert path != drafting
    packings.clear()
    assert run("auto", **options) == (due, drafting)
    assert run("auto", model="deepseek_v3") == (plain, path)


def test_another_state_of_the_checkpoint_is_packed_anew(tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path / "weights")
    options = {"model": "deepseek_coder:custom", "weights": str(weights)}
    first, path = run("keep", **options)
    other = write_checkpoint(tmp_path / "other", seed=5)
    shutil.copy(other / "model.safetensors", weights / "model.safetensors")
    second, none = run("auto", **options)
    assert none is None
    assert second != first
    with LLM(dtype="bfloat16", allow_experimental=True, **options) as llm:
        assert "are out of date; --packed-weights keep renews them" in llm.engine.explain()["packed_weights"]["remark"]
    assert run("keep", **options) == (second, path)
    assert run("auto", **options) == (second, path)
    assert len(list_packed()) == 1


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
@pytest.mark.parametrize("family", ["deepseek_coder", "deepseek_moe"])
def test_quantized_weights(family: str, scheme: str, tmp_path: Path) -> None:
    config = resolve(EngineArgs(model=family, dtype="bfloat16"))
    weights = tmp_path / scheme
    plan = plan_conversion(Path(config.weights), ConvertOptions("hf-safetensors", scheme=Scheme.of(scheme)))
    convert(plan, weights)
    options = {"model": family, "weights": str(weights)}
    due, path = run("keep", **options)
    assert path is not None
    assert run("auto", **options) == (due, path)
    assert run("off", **options) == (due, None)


def test_kernels_without_a_layout_that_can_be_kept() -> None:
    with LLM(model="deepseek_coder", dtype="float32", packed_weights="keep") as llm:
        told = llm.engine.explain()["packed_weights"]
    assert told == {"file": None, "remark": f"no packed weights were kept: {NO_LAYOUT}"}
    assert list_packed() == []


def test_a_checkpoint_that_changes_while_it_is_loaded_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter(["before", "after"])
    monkeypatch.setattr(packing, "packed_state", lambda *_: next(states))
    with LLM(model="deepseek_coder", dtype="bfloat16", packed_weights="keep") as llm:
        told = llm.engine.explain()["packed_weights"]
    assert told["remark"] == "no packed weights were kept: the checkpoint changed while it was loaded"
    assert list_packed() == []


def test_code_that_cannot_be_watched_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packing._package_state("__main__") is None
    assert packing._package_state("no_such_package") is None
    monkeypatch.setattr(packing, "_package_state", lambda name: None)
    with LLM(model="deepseek_coder", dtype="bfloat16", packed_weights="keep") as llm:
        told = llm.engine.explain()["packed_weights"]
    assert told["remark"] == "no packed weights were kept: the sources of the model's code cannot be found"
    assert list_packed() == []


def test_code_that_changes_is_another_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "zoo_of_somebody"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "layers.py").write_text("LAYOUT = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = packing._package_state.__wrapped__("zoo_of_somebody")
    assert [name for name, *_ in before] == ["__init__.py", "layers.py"]
    (package / "layers.py").write_text("LAYOUT = 2\n")
    assert packing._package_state.__wrapped__("zoo_of_somebody") != before


def test_code_that_is_first_imported_is_no_other_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "zoo_of_another"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    before = packing._package_state.__wrapped__("zoo_of_another")
    assert py_compile.compile(str(package / "__init__.py"))
    assert list(package.glob("__pycache__/*.pyc"))
    assert packing._package_state.__wrapped__("zoo_of_another") == before


def test_mapped_weights_are_no_room_for_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the system counts their pages among those that it could give away."""
    monkeypatch.setattr(runner, "free_memory", lambda device: 24 << 20)
    options: dict[str, Any] = {"model": "deepseek_coder", "dtype": "bfloat16"}
    sizes = []
    for mode in ("off", "keep", "auto"):
        with LLM(packed_weights=mode, **options) as llm:
            sizes.append(llm.engine.explain()["kv_cache_bytes"])
            mapped = llm.engine.runner.packed_weights.mapped_bytes  # type: ignore[attr-defined]
    assert sizes[0] == sizes[1]
    assert mapped > 1 << 20
    assert sizes[0] - sizes[2] == pytest.approx(mapped / 2, rel=0.1)


def test_what_was_mapped_comes_to_huge_pages_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    due, path = run("keep", model="deepseek_coder")
    parts, plain, compute, done = [], packing.move_to_huge_pages, runner.ModelRunner._compute, threading.Event()
    computing = False

    def a_part(memory: torch.Tensor, offset: int) -> int:
        assert not computing
        parts.append(llm.engine.runner.num_steps)  # type: ignore[attr-defined]
        end = min(offset + (64 << 10), len(memory))
        if end == len(memory):
            assert plain(memory, 0) > 0
            done.set()
        return end

    def step(*arguments: Any) -> Any:
        nonlocal computing
        computing = True
        time.sleep(0.005)  # the thread waits for its turn by then
        try:
            return compute(*arguments)
        finally:
            computing = False

    monkeypatch.setattr(packing, "move_to_huge_pages", a_part)
    monkeypatch.setattr(runner.ModelRunner, "_compute", step)
    with LLM(model="deepseek_coder", dtype="bfloat16") as llm:
        packed = llm.engine.runner.packed_weights  # type: ignore[attr-defined]
        assert str(packed.file) == path
        written = [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in llm.generate(PROMPTS, GREEDY)]
        assert done.wait(60)
        assert llm.generate(PROMPTS, GREEDY)[0].outputs[0].token_ids == written[0][0]
    assert written == due
    assert len(parts) == -(-packed.mapped_bytes // (64 << 10))
    assert parts[0] >= 1
    assert len(set(parts)) > 1, "some parts are moved between steps"


def test_nothing_is_moved_of_an_engine_that_is_shut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    run("keep", model="deepseek_coder")
    ended, parts = threading.Event(), []

    def a_part(memory: torch.Tensor, offset: int) -> int:
        parts.append(offset)
        assert ended.wait(60)
        return offset + 1

    monkeypatch.setattr(packing, "move_to_huge_pages", a_part)
    with LLM(model="deepseek_coder", dtype="bfloat16") as llm:
        llm.generate(["a"], SamplingParams(max_tokens=1))
        (mover,) = [thread for thread in threading.enumerate() if thread.name == "huge pages"]
    ended.set()
    mover.join(60)
    assert not mover.is_alive()
    assert len(parts) == 1


def test_a_file_of_another_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run("keep", model="deepseek_coder")
    other = MappedTensors({"model.nothing.panels": torch.zeros(64)}, torch.zeros(64, dtype=torch.uint8))
    monkeypatch.setattr(packing, "read_packed", lambda *_: other)
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
        found = {packed_request(changed, Ranks(split.place(rank))).path for rank in range(split.world_size)}
        assert len(found) == due
        paths += found
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize(
    ("family", "split"),
    [
        ("deepseek_coder", {"tensor_parallel_size": 2}),
        ("deepseek_moe", {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
        ("deepseek_coder", {"data_parallel_size": 2}),
    ],
)
def test_ranks_take_what_they_kept(family: str, split: dict[str, int]) -> None:
    options = {"model": family, **split}
    due, none = run("off", **options)
    assert none is None
    assert run("keep", **options)[0] == due
    files = {file.path: file.path.stat().st_mtime_ns for file in list_packed()}
    assert len(files) == (1 if "data_parallel_size" in split else 2)
    written, path = run("auto", **options)
    assert written == due
    assert Path(path or "") in files
    # What was kept is what a later start finds, and not written anew.
    assert run("keep", **options)[0] == due
    assert {file.path: file.path.stat().st_mtime_ns for file in list_packed()} == files


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
