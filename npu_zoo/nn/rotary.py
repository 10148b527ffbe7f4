"""Rotary position embedding and its scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from npu_zoo.core.errors import WeightsError
from npu_zoo.core.model_config import ModelConfig, RopeScaling, YarnParameters
from npu_zoo.nn.context import BuildContext
from npu_zoo.nn.kernels.table import rotary_tables
from npu_zoo.nn.layer import Layer


class RotaryEmbedding(Layer):
    """Tables of cosines and sines for every position of the run.

    Angles are computed in float32 and stored in the model's dtype, as transformers does.
    """

    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__()
        self._config = config
        self._length = context.max_model_len
        self._dtype = context.dtype
        kernels = context.kernels
        self._kernel: object = kernels.interleaved_rotary_embedding if config.mla else kernels.rotary_embedding
        self._tables: tuple[Tensor, Tensor] | None = None
        _check_rotates_all(config)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of [T] positions, [T, rotary_dim / 2] each or as the kernel takes them."""
        if self._tables is None or self._tables[0].device != positions.device:
            self._tables = self._build(positions.device)
        cos, sin = self._tables
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def _build(self, device: torch.device) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(self._length).float(), inverse_frequencies(self._config, self._length))
        scale = attention_factor(self._config.rope_scaling)
        cos, sin = (table.to(self._dtype) for table in (angles.cos() * scale, angles.sin() * scale))
        cos, sin = rotary_tables(self._kernel, cos, sin)
        return cos.to(device), sin.to(device)


def _check_rotates_all(config: ModelConfig) -> None:
    for found in (config.rope_scaling.parameters, config.extra):
        part = found.get("partial_rotary_factor")
        if part not in (None, 1):
            raise WeightsError(f"config.json holds partial_rotary_factor {part}; this version rotates whole heads only")


def rotary_dim(config: ModelConfig) -> int:
    """Values of a head that are rotated: all of them, or with latent attention those of the shared key."""
    return config.mla.qk_rope_head_dim if config.mla else config.head_dim


def inverse_frequencies(config: ModelConfig, max_model_len: int) -> Tensor:
    """[rotary_dim / 2] radians per position, in float32, as transformers' ``ROPE_INIT_FUNCTIONS`` give them.

    ``linear`` divides positions by the factor (position interpolation, arXiv:2306.15595; MindFormers' "PI"), and
    ``yarn`` only those of low frequencies (arXiv:2309.00071), whatever the length. ``dynamic`` (NTK) is fixed for a run
    by its longest sequence, not by each sequence's own length, since a cached key is not rotated again and must be the
    same whichever sequence computed it.

    Args:
        config: the checkpoint's hyperparameters.
        max_model_len: the longest sequence of the run, in tokens.
    """
    dim, scaling = rotary_dim(config), config.rope_scaling
    periods = _theta(config, max_model_len) ** (torch.arange(0, dim, 2).float() / dim)
    if scaling.yarn is not None:
        kept = _kept_share(scaling.yarn, dim, config.rope_theta)
        return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept
    return 1.0 / periods / scaling.factor if scaling.kind == "linear" else 1.0 / periods


def _theta(config: ModelConfig, max_model_len: int) -> float:
    """The base of the frequencies, which dynamic scaling raises for lengths beyond the model's."""
    trained, dim, scaling = config.max_position_embeddings, rotary_dim(config), config.rope_scaling
    if scaling.kind != "dynamic" or max_model_len <= trained:
        return config.rope_theta
    stretch = scaling.factor * max_model_len / trained - (scaling.factor - 1)
    return float(config.rope_theta * stretch ** (dim / (dim - 2)))


def _kept_share(yarn: YarnParameters, dim: int, theta: float) -> Tensor:
    """[dim / 2]: 1 where yarn keeps a frequency, 0 where it divides it by the factor, and a ramp between."""

    def dimension(turns: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    return 1 - torch.clamp((torch.arange(dim // 2).float() - low) / width, 0, 1)


def attention_factor(scaling: RopeScaling) -> float:
    """What cosines and sines are multiplied by; 1 but for yarn."""
    yarn = scaling.yarn
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(scaling.factor, yarn.mscale) / _mscale(scaling.factor, yarn.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def softmax_scale(config: ModelConfig) -> float:
    """What attention's scores are multiplied by.

    Latent attention with yarn takes ``mscale_all_dim`` into it, twice, for query and key.
    """
    if config.mla is None:
        return float(config.head_dim**-0.5)
    scale, yarn = float(config.mla.qk_head_dim**-0.5), config.rope_scaling.yarn
    if yarn is not None and yarn.mscale_all_dim:
        scale *= _mscale(config.rope_scaling.factor, yarn.mscale_all_dim) ** 2
    return scale


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
