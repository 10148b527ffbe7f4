"""What every model class is: the interface between a family and the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from npu_zoo.core.errors import EngineError, WeightsError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.weights import Shard
from npu_zoo.nn.context import BuildContext, ForwardContext
from npu_zoo.nn.embedding import Embedding
from npu_zoo.nn.linear import Linear
from npu_zoo.nn.moe import MoE
from npu_zoo.nn.quantization import Quantization
from npu_zoo.nn.staging import Staging


@dataclass(frozen=True)
class _Awaited:
    """A tensor of a linear layer that is to be loaded; ``missing`` holds the names of all that are yet to come.

    ``view`` is its name among the layer's own.
    """

    linear: Linear
    view: str
    missing: set[str]


class CausalLM(nn.Module, ABC):
    """A causal language model.

    The module tree carries the checkpoint's names, except that a :class:`Linear` of several parts stands for its parts:
    ``self_attn.qkv_proj`` for ``self_attn.q_proj`` and so on. A subclass whose checkpoints have other names overrides
    :meth:`checkpoint_tensors`.
    """

    ignored_tensors: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    """Patterns of checkpoint tensors that the model computes itself, or has no use for."""

    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__()
        self.config = config
        self._awaited: dict[str, _Awaited] = {}
        self._staging: Staging | None = None
        self._on_packed: Callable[[dict[str, Tensor]], None] | None = None

    @abstractmethod
    def forward(self, x: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """[T] ids and positions of all rows of a step, one after the other, to [T, hidden_size].

        A later stage of a pipeline takes what the one before it gave in place of ids.
        """

    @abstractmethod
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden_size] to [N, vocab_size], in the model's dtype."""

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Where each of the checkpoint's tensors goes: its name and the storage that a loader fills."""
        found: dict[str, Tensor] = {}
        for path, module in self.named_modules():
            if isinstance(module, Linear):
                found.update({_beside(path, name): view for name, view in module.checkpoint_views().items()})
            elif isinstance(module, Embedding):
                found[f"{path}.weight"] = module.checkpoint_view()
            else:
                found.update({f"{path}.{n}": p.data for n, p in module.named_parameters(recurse=False)})
        return found

    def shards(self) -> dict[str, Shard]:
        """Of the tensors in :meth:`checkpoint_tensors` of which this rank holds a part, which part."""
        found: dict[str, Shard] = {}
        for path, module in self.named_modules():
            if isinstance(module, Linear):
                found.update({_beside(path, name): shard for name, shard in module.shards().items()})
            elif isinstance(module, Embedding) and module.shard.stop - module.shard.start < module.shard.size:
                found[f"{path}.weight"] = module.shard
        return found

    def held_elsewhere(self) -> frozenset[str]:
        """Of the checkpoint's tensors that other ranks hold altogether, what their names begin with, up to a dot."""
        return frozenset(
            f"{path}.{name}".lstrip(".")
            for path, module in self.named_modules()
            for name in getattr(module, "parts_elsewhere", ())
        )

    def optional_tensors(self) -> frozenset[str]:
        """Names out of :meth:`checkpoint_tensors` that a checkpoint may lack."""
        return frozenset()

    def allocate(self, device: torch.device) -> None:
        """Give parameters their storage; weights that a kernel lays out anew get it from :meth:`storage_of`.

        Buffers get none: what a model computes itself it computes on first use, as the rotary tables do.
        """
        self._staging, self._awaited = Staging(device), self._linear_parts()
        for module in self.modules():
            if isinstance(module, Linear) and module.packs:
                continue
            for name, parameter in module.named_parameters(recurse=False):
                storage = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                setattr(module, name, nn.Parameter(storage, requires_grad=False))

    def adopt(self, name: str, tensor: Tensor) -> bool:
        """Have a linear layer's part packed from where its loader has it, which is in this host's memory, until then.

        False where it must be copied to :meth:`storage_of`; see :meth:`Linear.adopt`.
        """
        awaited = self._awaited.get(name)
        if awaited is None or self._staging is None or self._staging.device.type != "cpu":
            return False
        return awaited.linear.adopt(awaited.view, tensor)

    def storage_of(self, name: str) -> Tensor:
        """Where a linear layer's part is loaded that has no storage yet; gone once :meth:`tensor_loaded` packs it.

        Raises:
            EngineError: nothing was allocated, or no linear layer waits for the name.
        """
        awaited = self._awaited.get(name)
        if awaited is None or self._staging is None:
            raise EngineError(f"there is no storage for {name}; call allocate() before loading")
        awaited.linear.stage(self._staging)
        return awaited.linear.checkpoint_views()[awaited.view]

    def tensor_loaded(self, name: str) -> None:
        """Called with each of the checkpoint's tensors that is in; packs a layer once all of its parts are.

        So a layout that copies costs one layer's memory more, not the model's.
        """
        awaited = self._awaited.get(name)
        if awaited is not None:
            awaited.missing.discard(name)
            if not awaited.missing:
                awaited.linear.pack()

    def restore_packed(self, tensors: Mapping[str, Tensor]) -> frozenset[str]:
        """Take linear layers' weights as :meth:`on_packed` gave them in an earlier run; called before loading.

        Returns:
            The names of the checkpoint's tensors that need not be loaded.

        Raises:
            WeightsError: they are not this model's.
        """
        by_layer: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            path, _, part = name.rpartition(".")
            by_layer.setdefault(path, {})[part] = tensor
        held: set[str] = set()
        for path, module in self.named_modules():
            parts = by_layer.pop(path, None)
            if parts is not None and isinstance(module, Linear):
                module.restore(parts)
                held.update(_beside(path, view) for view in module.checkpoint_views())
        if by_layer:
            raise WeightsError(f"there are packed weights of {', '.join(by_layer)}, which the model does not have")
        for name in held:
            self._awaited.pop(name, None)
        return frozenset(held)

    def on_packed(self, keep: Callable[[dict[str, Tensor]], None]) -> None:
        """Have linear layers' weights, by name and as kernels laid them out, given to a function once all are in.

        Layers whose kernels have no such form are left out.
        """
        self._on_packed = keep

    def finish_loading(self) -> None:
        """Called once after the weights are in: packs what :meth:`tensor_loaded` has not.

        A layer that does something with the packed weights of several has a ``finish_loading`` of its own.
        """
        self._awaited, self._staging = {}, None
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        if self._on_packed is not None:
            self._on_packed(self._packed_tensors())
        for module in self.modules():
            finish = getattr(module, "finish_loading", None)
            if finish is not None and module is not self:
                finish()

    def _packed_tensors(self) -> dict[str, Tensor]:
        return {
            f"{path}.{part}": tensor
            for path, module in self.named_modules()
            if isinstance(module, Linear)
            for part, tensor in module.packed_parts().items()
        }

    def _linear_parts(self) -> dict[str, _Awaited]:
        """Every linear layer and the names it waits for, by each of those names."""
        found: dict[str, _Awaited] = {}
        for path, module in self.named_modules():
            if isinstance(module, Linear):
                names = {_beside(path, view): view for view in module.checkpoint_views()}
                missing = set(names)
                found.update({name: _Awaited(module, view, missing) for name, view in names.items()})
        return found


def _beside(path: str, name: str) -> str:
    """The checkpoint's name of something of a linear layer's parts: they stand where the layer stands."""
    return f"{path.rpartition('.')[0]}.{name}".lstrip(".")


def build_on_meta(model_class: type[CausalLM], config: ModelConfig, context: BuildContext) -> CausalLM:
    """The model with its shapes and without storage, its linear layers quantized where the context says so.

    Raises:
        WeightsError: the checkpoint's quantization does not fit the model.
        HardwareError: a kernel does not take the shape of a quantized layer.
    """
    with torch.device("meta"):
        model = model_class(config, context)
        if context.quantization is not None:
            _quantize(model, context.quantization)
    return model


def _quantize(model: CausalLM, quantization: Quantization) -> None:
    for path, module in model.named_modules():
        if isinstance(module, Linear) and module.quantizable:
            names = [_beside(path, part) for part in module.parts]
            plain = [name for name in names if quantization.config.ignores(name)]
            if plain and len(plain) < len(names):
                rest = ", ".join(name for name in names if name not in plain)
                raise WeightsError(
                    f"config.json's quantization_config ignores {', '.join(plain)} and not {rest}; they are multiplied "
                    "together here, so the checkpoint must quantize all of them or none"
                )
            if not plain:
                module.quantize(quantization)
    for module in model.modules():
        if isinstance(module, MoE):
            module.check_quantization()
