"""The torch-free surface for plugin authors."""

from npu_zoo.core.config import FimFormat, ModelConfig, PromptFormat, RopeScaling
from npu_zoo.core.errors import (
    ConfigError,
    EngineError,
    HardwareError,
    NpuZooError,
    PluginError,
    PromptError,
    TokenizerError,
    UnknownModelError,
    UnsupportedError,
    UsageError,
    WeightsError,
)
from npu_zoo.core.features import Attention, Conflict, Denial, FeatureMatrix, FeatureRow
from npu_zoo.core.hardware import DType
from npu_zoo.core.hookspecs import hookimpl
from npu_zoo.core.specs import (
    AttentionBackendSpec,
    EngineSpec,
    FamilySpec,
    KernelSpec,
    QuantizationSpec,
    VariantSpec,
    WeightFormatSpec,
)

__all__ = [
    "Attention",
    "AttentionBackendSpec",
    "ConfigError",
    "Conflict",
    "DType",
    "Denial",
    "EngineError",
    "EngineSpec",
    "FamilySpec",
    "FeatureMatrix",
    "FeatureRow",
    "FimFormat",
    "HardwareError",
    "KernelSpec",
    "ModelConfig",
    "NpuZooError",
    "PluginError",
    "PromptError",
    "PromptFormat",
    "QuantizationSpec",
    "RopeScaling",
    "TokenizerError",
    "UnknownModelError",
    "UnsupportedError",
    "UsageError",
    "VariantSpec",
    "WeightFormatSpec",
    "WeightsError",
    "hookimpl",
]
