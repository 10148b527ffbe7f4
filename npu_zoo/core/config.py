"""What was asked (:class:`EngineArgs`) and what was checked (:class:`EngineConfig`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from npu_zoo.core.errors import ConfigError
from npu_zoo.core.features import Attention, FeatureRow
from npu_zoo.core.hardware import DType
from npu_zoo.core.model_config import FimFormat, ModelConfig, PromptFormat, ReasoningFormat, ToolFormat
from npu_zoo.core.parallel import Split
from npu_zoo.core.quantization import QuantizationConfig

DEFAULT_MAX_NUM_SEQS = 64
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
DEFAULT_KV_CACHE_FRACTION = {"cpu": 0.5, "cuda": 0.9, "npu": 0.9}
"""By device: a CPU's memory is shared with everything else on the machine."""
DEFAULT_COLLECTIVE_TIMEOUT_S = 300.0

ExpertDispatch = Literal["all_gather", "all_to_all"]
"""``all_gather``: ranks compute all tokens' share of their own experts, and the shares are summed. ``all_to_all``:
each token travels to its experts' ranks and back."""


PackedWeights = Literal["auto", "keep", "off"]
"""Of weights as kernels lay them out: take those that an earlier run kept, keep them as well, or do neither."""

SpeculativeMethod = Literal["none", "prompt_lookup", "mtp"]
"""Where drafts of next tokens come from: earlier text of the same sequence, or the checkpoint's own further layers."""

DEFAULT_NUM_SPECULATIVE_TOKENS = 3
DEFAULT_MTP_TOKENS = 1
DEFAULT_PROMPT_LOOKUP = 2, 4
"""Tokens of the shortest and of the longest n-gram that is looked up."""


class EngineArgs(BaseModel):
    """What was asked for; ``None`` is unset. Everything is checked by :func:`npu_zoo.dispatch.resolve`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(None, description="FAMILY or FAMILY:VARIANT, as `npu-zoo list` shows them.")
    weights: str | None = Field(None, description="Checkpoint directory (config.json, *.safetensors, tokenizer.json).")
    hardware: str | None = Field(None, description="Product to run on; detected when unset.")
    dtype: str | None = Field(None, description="Compute dtype: float32, bfloat16 (bf16), float16 (fp16).")
    tensor_parallel_size: int | None = Field(None, ge=1, description="Ranks that share every layer.")
    pipeline_parallel_size: int | None = Field(None, ge=1, description="Stages that share the stack of layers.")
    expert_parallel_size: int | None = Field(
        None, ge=1, description="Groups of ranks that each hold some whole experts; divides dp x tp."
    )
    data_parallel_size: int | None = Field(
        None, ge=1, description="Replicas of the attention, each with sequences of its own; they share the experts."
    )
    world_size: int | None = Field(None, ge=1, description="Devices in all (dies on a Duo card).")
    attention: Attention | None = Field(
        None, description="paged: blocks behind a block table; flash: contiguous per sequence."
    )
    quantization: str | None = Field(None, description="none, w8a8, w8a16, w4a16 …; the checkpoint's own when unset.")
    kv_cache_dtype: str | None = Field(None, description="auto (the compute dtype) or int8.")
    serving: str | None = Field(None, description="offline, openai, mindie_service or tgi.")
    engine: str | None = Field(None, description="Engine that runs the model; native when unset.")
    allow_experimental: bool | None = Field(None, description="Take experimental matrix rows too.")
    block_size: int | None = Field(None, ge=1, description="Tokens per KV block; the backend's choice when unset.")
    max_model_len: int | None = Field(None, ge=1, description="Longest prompt plus output, in tokens.")
    max_num_seqs: int | None = Field(None, ge=1, description="Most sequences that run at once.")
    max_num_batched_tokens: int | None = Field(None, ge=1, description="Most tokens of one step.")
    kv_cache_memory: int | str | None = Field(None, description="Memory for keys and values, such as 2GiB or 500MB.")
    kv_cache_fraction: float | None = Field(
        None, gt=0, le=1, description="Memory for keys and values as a share of what is free after loading."
    )
    prefault_kv_cache: bool | None = Field(
        None, description="On a CPU, take the memory of keys and values at the start instead of as they are written."
    )
    enable_prefix_caching: bool | None = Field(None, description="Share the KV blocks of equal prefixes.")
    enable_chunked_prefill: bool | None = Field(None, description="Split long prompts over several steps.")
    expert_dispatch: Literal["auto", "all_gather", "all_to_all"] | None = Field(
        None, description="How tokens reach experts of other ranks: auto (by the hardware), all_gather or all_to_all."
    )
    collective_timeout: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Seconds that a rank waits for the others in one operation."
    )
    speculative_method: SpeculativeMethod | None = Field(
        None, description="Where drafts of next tokens come from: none, prompt_lookup or mtp."
    )
    num_speculative_tokens: int | None = Field(None, ge=1, description="Most drafts of a sequence in one step.")
    prompt_lookup_min: int | None = Field(None, ge=1, description="Tokens of the shortest n-gram that is looked up.")
    prompt_lookup_max: int | None = Field(None, ge=1, description="Tokens of the longest one.")
    adaptive_speculation: bool | None = Field(None, description="Stop drafting where it does not pay; on by default.")
    seed: int | None = Field(None, description="Seed of requests that bring none.")
    threads: int | None = Field(None, ge=1, description="CPU threads; torch's choice when unset.")
    bind: str | None = Field(
        None, description="CPUs and memory near a rank's device: auto, none, or nodes by device such as 0-3:0,4-7:1."
    )
    enforce_eager: bool | None = Field(
        None, description="Launch every operator of a decode step by itself instead of a captured graph."
    )
    strict_kernels: bool | None = Field(None, description="Refuse to fall back to a reference kernel.")
    deterministic: bool | None = Field(
        None, description="Sum in the same order in every run, which takes longer; for comparisons of accuracy."
    )
    packed_weights: PackedWeights | None = Field(
        None, description="Weights as kernels lay them out, in a file: auto (where kept), keep (write them too) or off."
    )
    skip_tokenizer_init: bool | None = Field(None, description="Take and give token ids only; no tokenizer is read.")
    trust_remote_code: bool | None = Field(None, description="Allow the checkpoint's own Python code; off by default.")


@dataclass(frozen=True)
class KernelChoice:
    """One operation's kernel.

    Attributes:
        fallback: whether the plain reference was taken because the chip has none of its own.
        passed_over: ``name: reason`` of every other kernel of the operation.
    """

    operation: str
    kernel: str
    implementation: str
    reason: str
    fallback: bool
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionChoice:
    """The attention backend, its block size (None where it has no blocks), and the variables that it reads."""

    backend: str
    implementation: str
    block_size: int | None
    prefix_caching: bool
    reason: str
    passed_over: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class SpeculationConfig:
    """How next tokens are guessed.

    Attributes:
        num_tokens: most drafts of a sequence in one step.
        lookup_min, lookup_max: tokens of the n-grams that prompt lookup searches; unread by other methods.
        adaptive: whether an engine stops drafting where it does not pay.
    """

    method: SpeculativeMethod
    num_tokens: int
    lookup_min: int = DEFAULT_PROMPT_LOOKUP[0]
    lookup_max: int = DEFAULT_PROMPT_LOOKUP[1]
    adaptive: bool = True


_SEAL = object()


@dataclass(frozen=True)
class EngineConfig:
    """A request that the matrix has accepted. Only :func:`npu_zoo.dispatch.resolve` makes one.

    Attributes:
        model: ``family:variant``.
        model_class, engine_class: code references.
        bundled: whether the weights are the checkpoint that ships with the package.
        max_model_len_asked: whether the user set it; otherwise an engine may lower it to what its memory holds.
        row: the matrix row that offers the request.
        prompt: the variant's or family's prompt format, for checkpoints that bring no chat template.
        reasoning: what stands around the model's reasoning; None where it has no markers.
        tools: how the model calls tools; None where it does not.
        stop_token_ids: every id that ends a text.
        binding: where each rank of this machine runs and has its memory, in words.
        rank_bindings: the same as :class:`npu_zoo.parallel.numa.RankBinding`, one for each rank; none where nothing is
            to be bound.
        environment: variables that the vendor presets and the chosen backend reads, for those that the user left unset.
        quantization_config: how the checkpoint's linear layers are quantized; None where they are plain.
        quantization_method: the code reference of what reads them then.
        expert_dispatch: how tokens reach experts of other ranks in steps that are not captured.
        deterministic: whether operators are asked to sum in the same order in every run.
        packed_weights: whether weights are read as an earlier run's kernels laid them out, and kept so for later ones.
        prefault_kv_cache: whether a CPU's memory for keys and values is taken at the start; that of devices always is.
        collective_timeout: seconds that a rank waits for the others in one operation.
        speculation: how next tokens are guessed; None where they are not.
        notes: what the user should know, such as that the demo checkpoint runs.
    """

    model: str
    family: str
    variant: str
    model_class: str
    engine: str
    engine_class: str
    weights: str
    bundled: bool
    model_config: ModelConfig
    hardware: str
    chip: str
    device: str
    dtype: DType
    tensor_parallel_size: int
    pipeline_parallel_size: int
    expert_parallel_size: int
    world_size: int
    attention: Attention
    attention_choice: AttentionChoice
    kernels: tuple[KernelChoice, ...]
    quantization: str
    kv_cache_dtype: str
    serving: str
    row: FeatureRow
    max_model_len: int
    max_model_len_asked: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_memory: int | None
    kv_cache_fraction: float
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    seed: int
    threads: int | None
    binding: tuple[str, ...]
    rank_bindings: tuple[Any, ...]
    enforce_eager: bool
    strict_kernels: bool
    skip_tokenizer_init: bool
    trust_remote_code: bool
    chat: bool
    prompt: PromptFormat | None
    reasoning: ReasoningFormat | None
    tools: ToolFormat | None
    fim: FimFormat | None
    stop_token_ids: tuple[int, ...]
    quantization_config: QuantizationConfig | None = None
    quantization_method: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    data_parallel_size: int = 1
    expert_dispatch: ExpertDispatch = "all_gather"
    deterministic: bool = False
    packed_weights: PackedWeights = "auto"
    prefault_kv_cache: bool = False
    collective_timeout: float = DEFAULT_COLLECTIVE_TIMEOUT_S
    speculation: SpeculationConfig | None = None
    notes: tuple[str, ...] = ()
    seal: object = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.seal is not _SEAL:
            raise ConfigError("an EngineConfig is made by npu_zoo.dispatch.resolve(EngineArgs(...)) and nowhere else")
        object.__setattr__(self, "seal", None)

    @property
    def split(self) -> Split:
        """How ranks share the model."""
        return Split(
            self.tensor_parallel_size, self.pipeline_parallel_size, self.expert_parallel_size, self.data_parallel_size
        )

    @property
    def mtp(self) -> bool:
        """Whether the checkpoint's layer that predicts further tokens is loaded, to draft with it."""
        return self.speculation is not None and self.speculation.method == "mtp"

    @property
    def max_sampled_tokens(self) -> int:
        """The most positions of one step whose logits are needed: a sequence's last token and its drafts."""
        drafts = self.speculation.num_tokens if self.speculation else 0
        return min(self.max_num_seqs * (1 + drafts), max(self.max_num_seqs, self.max_num_batched_tokens))

    @property
    def head_layout(self) -> tuple[int, int, int]:
        """Query heads, key-value heads and head size of one rank."""
        config, tp = self.model_config, self.tensor_parallel_size
        return config.num_attention_heads // tp, max(1, config.num_key_value_heads // tp), config.head_dim
