"""Multi-token prediction: one more layer, which guesses the token after the next (arXiv:2412.19437, section 2.2).

At place i the layer is given t[i+1] and the model's output at i, and what it puts out goes through the model's head as
the scores of t[i+2]. The report leaves open whether that output is taken before or after the model's last norm. vLLM
and SGLang both take it *after* (the family that has the layer names their modules), and so does this. Applied again to
its own output and to its guess, the layer guesses one token more; its own output is then taken behind
``shared_head.norm``, as SGLang does, so that both are normed alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npu_zoo.core.errors import EngineError, WeightsError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.nn.context import BuildContext, ForwardContext
from npu_zoo.nn.decoder import DecoderLayer, MoEForCausalLM
from npu_zoo.nn.linear import Linear
from npu_zoo.nn.norm import RMSNorm

_SHARED = ("embed_tokens.weight", "shared_head.head.weight")
"""The checkpoint's copies of the model's own embedding and head, which serve here."""


class _Projection(Linear):
    """Of both inputs together; released quantized checkpoints leave it plain."""

    quantizable = False


class _SharedHead(nn.Module):
    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)


class MTPLayer(DecoderLayer):
    """A decoder layer behind a projection of two inputs, each normed, and before a norm of its own.

    Its keys and values are those of a layer behind the model's last. Parameters have the checkpoint's names.

    Args:
        attention, mlp: see :class:`DecoderLayer`.
    """

    def __init__(self, config: ModelConfig, attention: nn.Module, mlp: nn.Module, context: BuildContext) -> None:
        super().__init__(config, attention, mlp, context)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        self.eh_proj = _Projection(2 * config.hidden_size, {"eh_proj": config.hidden_size}, context)
        self.shared_head = _SharedHead(config, context)

    def predict(
        self, embedded: Tensor, hidden: Tensor, rotation: tuple[Tensor, Tensor], context: ForwardContext
    ) -> Tensor:
        """What the head takes for the tokens after the next.

        Args:
            embedded: [T, hidden_size], of the token behind each place.
            hidden: [T, hidden_size], the model's normed output at each place, or this layer's own.
            rotation: cosines and sines of the places.
        """
        both = torch.cat((self.enorm(embedded)[0], self.hnorm(hidden)[0]), dim=-1)
        x, residual = self(self.eh_proj(both), None, rotation, context)
        normed: Tensor = self.shared_head.norm(x, residual)[0]
        return normed


class MTPForCausalLM(MoEForCausalLM):
    """A decoder with experts whose checkpoint may hold layers that predict further tokens, behind the model's last.

    The first of them is built where the context asks for it; otherwise, and of further ones, nothing is read. Its
    copies of embedding and head are never read: the report has both shared with the model, a copy that differed could
    change drafts only and no output, and V3's would take 3.7 GB.

    Raises:
        WeightsError: the layer is asked for, and config.json names none.
    """

    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__(config, context)
        first, stored = config.num_hidden_layers, config.num_mtp_layers
        self._mtp: list[MTPLayer] = []  # a list, so that the layer has its place in the module tree only once
        unread = [f"model.layers.{number}.*" for number in range(first, first + stored)]
        if context.mtp:
            if not stored:
                raise WeightsError("config.json names no layer that predicts further tokens (num_nextn_predict_layers)")
            attention, mlp = self.make_attention(first, context), self.make_mlp(first, context)
            self._mtp = [MTPLayer(config, attention, mlp, context)]
            self.model.add_behind(first, self._mtp[0])
            unread[0:1] = [f"model.layers.{first}.{name}" for name in _SHARED]
        self.ignored_tensors = (*self.ignored_tensors, *unread)

    def predict_further(self, hidden: Tensor, next_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """What the head takes for the tokens after the next.

        Args:
            hidden: [T, hidden_size], what :meth:`forward` gave, or this method.
            next_ids: [T], the tokens behind those that ``hidden`` is of.
            positions: [T], of the tokens that ``hidden`` is of.
        """
        if not self._mtp or self.model.embed_tokens is None:
            raise EngineError("the layer that predicts further tokens was not built, or its embedding is elsewhere")
        embedded = self.model.embed_tokens(next_ids)
        return self._mtp[0].predict(embedded, hidden, self.model.rotary(positions), context)
