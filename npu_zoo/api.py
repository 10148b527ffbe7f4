"""The torch-free surface for plugin authors."""

from npu_zoo.core.attention import AttentionBackend, AttentionMetadata, CacheLayout, SequenceSlice
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import CompletionOutput, Engine, EngineStats, Logprob, RequestMetrics, RequestOutput
from npu_zoo.core.errors import (
    ConfigError,
    EngineError,
    HardwareError,
    NpuZooError,
    PluginError,
    PromptError,
    PromptLengthError,
    TokenizerError,
    UnknownModelError,
    UnsupportedError,
    UsageError,
    WeightsError,
    WorkerError,
)
from npu_zoo.core.evidence import EvidenceRecord, proven, read_records
from npu_zoo.core.features import (
    EXPERT_LAYOUTS_OF_FOUR,
    LAYOUTS_OF_FOUR,
    Attention,
    Conflict,
    Denial,
    FeatureMatrix,
    FeatureRow,
)
from npu_zoo.core.hardware import DType
from npu_zoo.core.hookspecs import hookimpl
from npu_zoo.core.model_config import (
    FimFormat,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    PromptFormat,
    ReasoningFormat,
    RopeScaling,
    ToolFormat,
)
from npu_zoo.core.quantization import QuantizationConfig
from npu_zoo.core.sampling import SamplingParams, StructuredOutputs
from npu_zoo.core.specs import (
    AttentionBackendSpec,
    EngineSpec,
    FamilySpec,
    KernelSpec,
    QuantizationSpec,
    VariantSpec,
    WeightFormatSpec,
)
from npu_zoo.core.weights import Shard, WeightLoader

__all__ = [
    "EXPERT_LAYOUTS_OF_FOUR",
    "LAYOUTS_OF_FOUR",
    "Attention",
    "AttentionBackend",
    "AttentionBackendSpec",
    "AttentionMetadata",
    "CacheLayout",
    "CompletionOutput",
    "ConfigError",
    "Conflict",
    "DType",
    "Denial",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineSpec",
    "EngineStats",
    "EvidenceRecord",
    "FamilySpec",
    "FeatureMatrix",
    "FeatureRow",
    "FimFormat",
    "HardwareError",
    "KernelSpec",
    "Logprob",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "NpuZooError",
    "PluginError",
    "PromptError",
    "PromptFormat",
    "PromptLengthError",
    "QuantizationConfig",
    "QuantizationSpec",
    "ReasoningFormat",
    "RequestMetrics",
    "RequestOutput",
    "RopeScaling",
    "SamplingParams",
    "SequenceSlice",
    "Shard",
    "StructuredOutputs",
    "TokenizerError",
    "ToolFormat",
    "UnknownModelError",
    "UnsupportedError",
    "UsageError",
    "VariantSpec",
    "WeightFormatSpec",
    "WeightLoader",
    "WeightsError",
    "WorkerError",
    "hookimpl",
    "proven",
    "read_records",
]
