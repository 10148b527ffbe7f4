"""What every model class is: the interface between a family and the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from npu_zoo.core.config import ModelConfig
from npu_zoo.nn.context import BuildContext, ForwardContext
from npu_zoo.nn.linear import Linear


class CausalLM(nn.Module, ABC):
    """A causal language model.

    The module tree carries the checkpoint's names, except that a :class:`Linear` of several parts stands for its parts:
    ``self_attn.qkv_proj`` for ``self_attn.q_proj`` and so on. A subclass whose checkpoints have other names overrides
    :meth:`checkpoint_tensors`.
    """

    ignored_tensors: ClassVar[tuple[str, ...]] = ("*.rotary_emb.inv_freq",)
    """Patterns of checkpoint tensors that the model computes itself."""

    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__()
        self.config = config
        self._awaited: dict[str, tuple[Linear, set[str]]] = {}

    @abstractmethod
    def forward(self, input_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """[T] ids and positions of all rows of a step, one after the other, to [T, hidden_size]."""

    @abstractmethod
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden_size] to [N, vocab_size], in the model's dtype."""

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Where each of the checkpoint's tensors goes: its name and the storage that a loader fills."""
        found: dict[str, Tensor] = {}
        for path, module in self.named_modules():
            if isinstance(module, Linear):
                found.update(zip(_part_names(path, module), module.checkpoint_views(), strict=True))
            else:
                found.update({f"{path}.{n}": p.data for n, p in module.named_parameters(recurse=False)})
        return found

    def optional_tensors(self) -> frozenset[str]:
        """Names out of :meth:`checkpoint_tensors` that a checkpoint may lack."""
        return frozenset()

    def tensor_loaded(self, name: str) -> None:
        """Called with each of the checkpoint's tensors that is in; packs a layer once all of its parts are.

        So a layout that copies costs one layer's memory more, not the model's.
        """
        if not self._awaited:
            self._awaited = self._linear_parts()
        linear, missing = self._awaited.get(name, (None, set()))
        missing.discard(name)
        if linear is not None and not missing:
            linear.pack()

    def finish_loading(self) -> None:
        """Called once after the weights are in: packs what :meth:`tensor_loaded` has not."""
        self._awaited.clear()
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()

    def _linear_parts(self) -> dict[str, tuple[Linear, set[str]]]:
        """Every linear layer and the names it waits for, by each of those names."""
        found: dict[str, tuple[Linear, set[str]]] = {}
        for path, module in self.named_modules():
            if isinstance(module, Linear):
                names = _part_names(path, module)
                found.update(dict.fromkeys(names, (module, set(names))))
        return found

    def parameter_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(p.numel() * p.element_size() for p in self.parameters())


def _part_names(path: str, linear: Linear) -> list[str]:
    """The checkpoint's names of a linear layer's parts: they stand where the layer stands."""
    parent = path.rpartition(".")[0]
    return [f"{parent}.{part}.weight".lstrip(".") for part in linear.parts]


def build_on_meta(model_class: type[CausalLM], config: ModelConfig, context: BuildContext) -> CausalLM:
    """The model with its shapes and without storage."""
    with torch.device("meta"):
        return model_class(config, context)
