"""The shared decoder's parameters and where a checkpoint's tensors go."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM as TheirLlama

from npu_zoo.checkpoint import read_config
from npu_zoo.core.config import KernelChoice
from npu_zoo.core.errors import EngineError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.nn.context import BuildContext
from npu_zoo.nn.decoder import LlamaForCausalLM
from npu_zoo.nn.kernels.table import Kernels, bind_kernels
from npu_zoo.nn.linear import Linear
from npu_zoo.nn.model import build_on_meta
from npu_zoo.testing.checkpoints import write_checkpoint


@pytest.fixture(params=[{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1, "head_dim": 24}], ids=str)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    options: dict[str, Any] = request.param
    return write_checkpoint(tmp_path / "weights", tokenizer=False, **options)


def reference_kernels() -> Kernels:
    names = [name for name in Kernels.__dataclass_fields__ if name != "more"]
    where = "npu_zoo.nn.kernels.reference:"
    return bind_kernels(
        KernelChoice(name, name, where + ("Linear" if name == "linear" else name), "", True) for name in names
    )


def build(directory: Path, kernels: Kernels | None = None) -> LlamaForCausalLM:
    context = BuildContext(kernels or reference_kernels(), torch.float32, 64)
    model = build_on_meta(LlamaForCausalLM, ModelConfig.from_hf(read_config(directory)), context)
    assert isinstance(model, LlamaForCausalLM)
    return model


def test_names_and_shapes_are_transformers(directory: Path) -> None:
    theirs = TheirLlama.from_pretrained(directory).state_dict()
    ours = build(directory).checkpoint_tensors()
    assert {name: tuple(t.shape) for name, t in ours.items()} == {name: tuple(t.shape) for name, t in theirs.items()}


def test_a_tied_head_need_not_be_stored(directory: Path) -> None:
    model = build(directory)
    assert model.optional_tensors() == ({"lm_head.weight"} if model.config.tie_word_embeddings else set())


def test_the_parts_of_a_layer_fill_it_without_gap_or_overlap(directory: Path) -> None:
    model = build(directory).to_empty(device="cpu")
    for number, tensor in enumerate(model.checkpoint_tensors().values()):
        tensor.fill_(number + 1)
    for parameter in model.parameters():
        assert (parameter > 0).all()
    attention = model.model.layers["1"].self_attn
    blocks = attention.qkv_proj.weight[:, 0].unique_consecutive()
    names = list(model.checkpoint_tensors())
    assert blocks.tolist() == [names.index(f"model.layers.1.self_attn.{n}_proj.weight") + 1 for n in "qkv"]


class Transposed:
    """A kernel that keeps the weight in a layout of its own."""

    @staticmethod
    def packs(dtype: torch.dtype) -> bool:
        return True

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        return weight.t().contiguous()

    @staticmethod
    def apply(x: Tensor, packed: Tensor) -> Tensor:
        return x @ packed


@pytest.mark.parametrize("own_layout", [False, True])
def test_packing_keeps_the_values_and_drops_the_first_copy(own_layout: bool) -> None:
    kernels = dataclasses.replace(reference_kernels(), **({"linear": Transposed} if own_layout else {}))
    layer = Linear(3, {"a": 2, "b": 1}, BuildContext(kernels, torch.float32, 8))
    weight = torch.arange(9.0).reshape(3, 3)
    for view, part in zip(layer.checkpoint_views().values(), weight.split((2, 1)), strict=True):
        view.copy_(part)
    x = torch.tensor([[1.0, 2.0, 3.0]])
    before = layer(x) if not own_layout else x @ weight.t()
    layer.pack()
    assert torch.equal(layer(x), before)
    assert torch.equal(before, x @ weight.t())
    assert layer.weight.numel() == (0 if own_layout else 9)


@pytest.mark.parametrize("own_layout", [False, True])
def test_a_tied_head_multiplies_with_the_embedding(tmp_path: Path, own_layout: bool) -> None:
    """Even where the checkpoint stores a head too."""
    directory = write_checkpoint(tmp_path / "weights", tokenizer=False, tie_word_embeddings=True)
    kernels = dataclasses.replace(reference_kernels(), **({"linear": Transposed} if own_layout else {}))
    model = build(directory, kernels)
    model.allocate(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.checkpoint_tensors().items():
        (model.storage_of(name) if tensor.is_meta else tensor).normal_(generator=generator)
        model.tensor_loaded(name)
    model.finish_loading()
    hidden = torch.ones(1, 64)
    assert torch.allclose(model.compute_logits(hidden), hidden @ model.model.embed_tokens.weight.t(), atol=1e-4)
    assert model.model.embed_tokens.weight.shape == (320, 64)


def test_a_layer_is_packed_once_all_its_parts_are_in(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "weights", tokenizer=False)
    kernels = dataclasses.replace(reference_kernels(), linear=Transposed)
    model = build(directory, kernels)
    model.allocate(torch.device("cpu"))
    first, second = (model.model.layers[n].self_attn.qkv_proj for n in "01")
    buffer = 0
    for part in "kvq":
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        model.storage_of(name).fill_(ord(part))
        buffer = first.weight.data_ptr()
        assert first.weight.shape == (128, 64)
        model.tensor_loaded(name)
    assert first.weight.numel() == 0
    values = first(torch.eye(64))[0].tolist()
    assert values == [ord("q")] * 64 + [ord("k")] * 32 + [ord("v")] * 32
    assert second.weight.is_meta
    model.storage_of("model.layers.1.self_attn.q_proj.weight")
    assert second.weight.data_ptr() == buffer
    assert first(torch.eye(64))[0].tolist() == values


class TransposedParts(Transposed):
    """One that takes the parts of a weight from where they are; remembers where."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def pack_parts(self, parts: Sequence[Tensor]) -> Tensor:
        self.seen += [part.data_ptr() for part in parts]
        return torch.cat(list(parts)).t().contiguous()


def test_parts_are_packed_from_where_they_are(tmp_path: Path) -> None:
    kernel = TransposedParts()
    kernels = dataclasses.replace(reference_kernels(), linear=kernel)
    model = build(write_checkpoint(tmp_path / "weights", tokenizer=False), kernels)
    model.allocate(torch.device("cpu"))
    parts = {part: torch.full((64 if part == "q" else 32, 64), float(ord(part))) for part in "kvq"}
    for part, tensor in parts.items():
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        assert model.adopt(name, tensor)
        model.tensor_loaded(name)
    layer = model.model.layers["0"].self_attn.qkv_proj
    assert kernel.seen == [parts[part].data_ptr() for part in "qkv"]
    assert layer(torch.eye(64))[0].tolist() == [ord("q")] * 64 + [ord("k")] * 32 + [ord("v")] * 32
    assert layer.weight.numel() == 0


@pytest.mark.parametrize(
    "other", [torch.ones(32, 64, dtype=torch.float64), torch.ones(64, 32).t()], ids=["dtype", "order"]
)
def test_parts_of_a_layer_are_all_copied_where_one_must_be(tmp_path: Path, other: Tensor) -> None:
    kernel = TransposedParts()
    kernels = dataclasses.replace(reference_kernels(), linear=kernel)
    model = build(write_checkpoint(tmp_path / "weights", tokenizer=False), kernels)
    model.allocate(torch.device("cpu"))
    layer = model.model.layers["0"].self_attn.qkv_proj
    names = {part: f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"}
    assert model.adopt(names["q"], torch.full((64, 64), 2.0))
    model.tensor_loaded(names["q"])
    for part in "kv":
        assert not model.adopt(names[part], other)
        model.storage_of(names[part]).copy_(other)
        model.tensor_loaded(names[part])
    assert not kernel.seen
    assert layer(torch.eye(64))[0].tolist() == [2.0] * 64 + [1.0] * 64


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_kernel_that_keeps_the_weight_as_it_is_gets_a_copy(tmp_path: Path, device: str) -> None:
    """It would hold a mapped file otherwise; and what is not in this host's memory must be brought there."""
    kernels = dataclasses.replace(reference_kernels(), **({"linear": TransposedParts()} if device == "meta" else {}))
    model = build(write_checkpoint(tmp_path / "weights", tokenizer=False), kernels)
    model.allocate(torch.device(device))
    assert not model.adopt("model.layers.0.self_attn.o_proj.weight", torch.ones(64, 64))


def test_storage_is_only_for_what_waits_for_it(tmp_path: Path) -> None:
    model = build(write_checkpoint(tmp_path / "weights", tokenizer=False))
    with pytest.raises(EngineError, match=r"there is no storage for lm_head.weight"):
        model.storage_of("lm_head.weight")
    model.allocate(torch.device("cpu"))
    assert not any(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(EngineError, match=r"there is no storage for model.norm.weight"):
        model.storage_of("model.norm.weight")
