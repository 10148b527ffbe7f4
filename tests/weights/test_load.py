from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from npu_zoo.core.errors import EngineError, WeightsError
from npu_zoo.core.weights import Shard
from npu_zoo.weights.load import compare_shapes, load_weights
from npu_zoo.weights.safetensors import SafetensorsLoader


def loader(directory: Path, tensors: dict[str, Tensor]) -> SafetensorsLoader:
    save_file(tensors, directory / "model.safetensors")
    return SafetensorsLoader(directory)


def test_tensors_reach_their_views_of_a_fused_parameter(tmp_path: Path) -> None:
    parts = {name: torch.randn(2, 3) for name in ("q", "k", "v")}
    packed = torch.nn.Parameter(torch.zeros(6, 3))
    views = dict(zip(parts, packed.split(2), strict=True))
    report = load_weights(views, loader(tmp_path, parts))
    assert torch.equal(packed, torch.cat(list(parts.values())))
    assert (report.tensors, report.bytes, report.absent, report.ignored) == (3, 72, (), ())


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("due", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_are_converted(tmp_path: Path, stored: torch.dtype, due: torch.dtype) -> None:
    source, destination = torch.randn(5).to(stored), torch.zeros(5, dtype=due)
    load_weights({"w": destination}, loader(tmp_path, {"w": source}))
    assert torch.equal(destination, source.to(due))


@pytest.mark.parametrize("stored", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_quantized_storage_is_refused_for_floats(tmp_path: Path, stored: torch.dtype) -> None:
    name = str(stored).removeprefix("torch.")
    source = torch.ones(2).to(stored)
    with pytest.raises(WeightsError, match=f"tensor w is stored as {name} and cannot be loaded as bfloat16"):
        load_weights({"w": torch.zeros(2, dtype=torch.bfloat16)}, loader(tmp_path, {"w": source}))
    same = torch.zeros(2).to(stored)
    load_weights({"w": same}, loader(tmp_path, {"w": source}))
    assert torch.equal(same.view(torch.uint8), source.view(torch.uint8))


def test_floats_are_refused_for_integers(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="stored as float32 and cannot be loaded as int8"):
        load_weights({"w": torch.zeros(2, dtype=torch.int8)}, loader(tmp_path, {"w": torch.ones(2)}))


def test_all_differences_are_reported_at_once_and_nothing_is_read(tmp_path: Path) -> None:
    destinations = {"good": torch.zeros(1), "missing": torch.zeros(1), "wide": torch.zeros(2, 4)}
    checkpoint = loader(tmp_path, {"good": torch.ones(1), "wide": torch.ones(2, 3), "extra": torch.ones(1)})
    with pytest.raises(WeightsError) as caught:
        load_weights(destinations, checkpoint)
    lines = str(caught.value).splitlines()
    assert str(tmp_path) in lines[0]
    assert lines[1:7] == [
        "  1 missing:",
        "    missing",
        "  1 unexpected:",
        "    extra",
        "  1 of another shape:",
        "    wide: [2, 3] in the checkpoint, [2, 4] due",
    ]
    assert destinations["good"].item() == 0.0


def test_long_lists_are_cut_with_their_count() -> None:
    comparison = compare_shapes({f"w{i:02}": torch.zeros(1) for i in range(25)}, {})
    lines = comparison.describe().splitlines()
    assert lines[0] == "  25 missing:"
    assert lines[20:] == ["    w19", "    … and 5 more"]


def test_optional_and_ignored_names_are_kept_in_the_report(tmp_path: Path) -> None:
    destinations = {"w": torch.zeros(1), "lm_head": torch.full((1,), 7.0), "a.inv_freq": torch.zeros(1)}
    tensors = {name: torch.ones(1) for name in ("w", "a.inv_freq", "b.inv_freq")}
    report = load_weights(dict(destinations), loader(tmp_path, tensors), optional=["lm_head"], ignored=["*.inv_freq"])
    assert (report.tensors, report.absent, report.ignored) == (2, ("lm_head",), ("b.inv_freq",))
    assert [float(tensor) for tensor in destinations.values()] == [1.0, 7.0, 1.0]


def test_an_optional_name_of_the_wrong_shape_is_still_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"w: \[2\] in the checkpoint, \[1\] due"):
        load_weights({"w": torch.zeros(1)}, loader(tmp_path, {"w": torch.ones(2)}), optional=["w"], ignored=["*"])


def test_shapes_are_compared_on_the_meta_device_and_loading_there_is_refused(tmp_path: Path) -> None:
    destinations = {"w": torch.empty(2, 3, device="meta")}
    checkpoint = loader(tmp_path, {"w": torch.ones(2, 3)})
    assert compare_shapes(destinations, checkpoint.shapes()).fits
    with pytest.raises(EngineError, match="w is on the meta device"):
        load_weights(destinations, checkpoint)


def test_progress_counts_bytes_to_the_end(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    tensors = {"a": torch.ones(1), "b": torch.ones(3)}
    load_weights(
        {name: torch.zeros_like(tensor) for name, tensor in tensors.items()},
        loader(tmp_path, tensors),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(4, 16), (16, 16)]


def test_a_filled_destination_is_given_up_when_its_loading_is_told(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(1), "b": torch.ones(3)}
    destinations = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    told: list[tuple[str, bool]] = []
    load_weights(
        destinations, loader(tmp_path, tensors), on_loaded=lambda name: told.append((name, name in destinations))
    )
    assert sorted(told) == [("a", False), ("b", False)]
    assert destinations == {}


@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_loads_its_part(tmp_path: Path, dim: int) -> None:
    whole = torch.arange(24.0).view(4, 6)
    checkpoint = loader(tmp_path, {"w": whole, "n": torch.ones(3)})
    half = whole.shape[dim] // 2
    for rank in range(2):
        shard = Shard(dim, rank * half, (rank + 1) * half, whole.shape[dim])
        part, norm = torch.zeros_like(whole.chunk(2, dim)[rank]), torch.zeros(3)
        load_weights({"w": part, "n": norm}, checkpoint, shards={"w": shard})
        assert torch.equal(part, whole.chunk(2, dim)[rank])
        assert norm.all()


def test_a_part_of_another_whole_is_misshapen(tmp_path: Path) -> None:
    checkpoint = loader(tmp_path, {"w": torch.ones(4, 6)})
    comparison = compare_shapes({"w": torch.zeros(2, 6)}, checkpoint.shapes(), shards={"w": Shard(0, 0, 2, 8)})
    assert comparison.misshapen == (("w", (4, 6), (8, 6)),)


def test_what_is_adopted_is_not_copied(tmp_path: Path) -> None:
    source = {"a": torch.randn(3), "b": torch.randn(2)}
    taken: dict[str, Tensor] = {}
    storage = {"b": torch.zeros(2)}

    def adopt(name: str, tensor: Tensor) -> bool:
        return name == "a" and taken.setdefault(name, tensor) is tensor

    destinations = {name: tensor.to("meta") for name, tensor in source.items()}
    report = load_weights(destinations, loader(tmp_path, source), adopt=adopt, storage=storage.__getitem__)
    assert report.tensors == 2
    assert torch.equal(taken["a"], source["a"])
    assert torch.equal(storage["b"], source["b"])


def test_what_does_not_last_is_not_offered(tmp_path: Path) -> None:
    checkpoint = loader(tmp_path, {"a": torch.ones(3)})
    checkpoint.tensors_last = False
    storage = torch.zeros(3)
    load_weights(
        {"a": torch.ones(3, device="meta")}, checkpoint, adopt=lambda name, tensor: True, storage=lambda name: storage
    )
    assert storage.tolist() == [1, 1, 1]
