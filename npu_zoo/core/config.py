"""What was asked (:class:`EngineArgs`), what was checked (:class:`EngineConfig`), and how to sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from npu_zoo.core.errors import ConfigError, UsageError, WeightsError, validation_lines
from npu_zoo.core.features import Attention, FeatureRow
from npu_zoo.core.hardware import DType


class RopeScaling(BaseModel):
    """How positions beyond the trained length are mapped.

    Attributes:
        kind: ``none``, ``linear`` (position / factor), ``dynamic`` (NTK) or ``yarn``.
        parameters: every further key of the checkpoint's ``rope_scaling``, such as yarn's ``mscale``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none", "linear", "dynamic", "yarn"] = "none"
    factor: float = Field(default=1.0, gt=0)
    parameters: dict[str, Any] = Field(default_factory=dict)


class ModelConfig(BaseModel):
    """Hyperparameters, under the names of Hugging Face's config.json.

    ``extra`` holds every key that this class has no field for, so that a family can read its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str = ""
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    torch_dtype: DType | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    extra: dict[str, Any] = Field(default_factory=dict)

    COMPARED: ClassVar[tuple[str, ...]] = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "rope_theta",
        "rope_scaling",
        "tie_word_embeddings",
    )
    """The fields that a checkpoint must share with the variant it is said to be."""

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json, in the spelling of transformers 4 (``rope_scaling``) or 5 (``rope_parameters``).

        Raises:
            WeightsError: a required key is missing or a value has the wrong form.
        """
        values = dict(raw)
        missing = [key for key in _REQUIRED if not isinstance(values.get(key), int)]
        if missing:
            raise WeightsError(f"config.json lacks {', '.join(missing)}; is this a causal language model's checkpoint?")
        heads = values["num_attention_heads"]
        known = {
            "architecture": _architecture(values.pop("architectures", None)),
            "num_key_value_heads": values.pop("num_key_value_heads", None) or heads,
            "head_dim": values.pop("head_dim", None) or values["hidden_size"] // max(heads, 1),
            "torch_dtype": values.pop("torch_dtype", None) or values.pop("dtype", None),
            "eos_token_id": _ids(values.pop("eos_token_id", None)),
            "rope_scaling": _rope(values),
        }
        if known["torch_dtype"] not in ("float32", "bfloat16", "float16"):
            known["torch_dtype"] = None
        for name in cls.model_fields:
            if name not in known and name != "extra" and values.get(name) is not None:
                known[name] = values.pop(name)
        try:
            return cls.model_validate({**known, "extra": values})
        except ValidationError as error:
            listed = "\n  ".join(validation_lines(error))
            raise WeightsError(f"config.json holds values of the wrong form:\n  {listed}") from None

    def differences(self, other: ModelConfig) -> list[str]:
        """Every compared field in which another config differs, as ``name: this, other``."""
        names = [name for name in self.COMPARED if getattr(self, name) != getattr(other, name)]
        return [f"{name}: {_brief(getattr(self, name))}, not {_brief(getattr(other, name))}" for name in names]


_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


def _architecture(names: Any) -> str:
    if names and not (isinstance(names, list) and isinstance(names[0], str)):
        raise WeightsError(f"config.json holds architectures {names!r} where a list of names is due")
    return names[0] if names else ""


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        found = values.pop(key, None) or {}
        if not isinstance(found, dict):
            raise WeightsError(f"config.json holds {key} {found!r} where an object is due")
        parameters |= found
    if "rope_theta" in parameters:
        values["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "none"
    parameters.pop("type", None)
    kind = "none" if kind == "default" else kind
    if kind not in ("none", "linear", "dynamic", "yarn"):
        raise WeightsError(f"config.json asks for rope scaling '{kind}'; known: none, linear, dynamic, yarn")
    return {"kind": kind, "factor": parameters.pop("factor", 1.0), "parameters": parameters}


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _brief(value: Any) -> str:
    return f"{value.kind} {value.factor:g}" if isinstance(value, RopeScaling) else str(value)


class PromptFormat(BaseModel):
    """How a conversation becomes text.

    Attributes:
        chat_template: a Jinja template with transformers' variables (``messages``, ``add_generation_prompt``,
            ``bos_token``, ``eos_token``); used where the checkpoint's tokenizer_config.json has none.
        adds_bos: whether the template's own output begins with the bos token; tokenizing then adds none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    chat_template: str
    adds_bos: bool


class FimFormat(BaseModel):
    """Fill in the middle, in prefix-suffix-middle order: ``begin prefix hole suffix end``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    begin: str
    hole: str
    end: str


class EngineArgs(BaseModel):
    """What was asked for; ``None`` is unset. Everything is checked by :func:`npu_zoo.dispatch.resolve`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(None, description="FAMILY or FAMILY:VARIANT, as `npu-zoo list` shows them.")
    weights: str | None = Field(None, description="Checkpoint directory (config.json, *.safetensors, tokenizer.json).")
    hardware: str | None = Field(None, description="Product to run on; detected when unset.")
    dtype: str | None = Field(None, description="Compute dtype: float32, bfloat16 (bf16), float16 (fp16).")
    tensor_parallel_size: int | None = Field(None, ge=1, description="Ranks that share every layer.")
    pipeline_parallel_size: int | None = Field(None, ge=1, description="Stages that share the stack of layers.")
    expert_parallel_size: int | None = Field(None, ge=1, description="Ranks that share the experts.")
    world_size: int | None = Field(None, ge=1, description="Devices in all (dies on a Duo card).")
    attention: Attention | None = Field(
        None, description="paged: blocks behind a block table; flash: contiguous per sequence."
    )
    quantization: str | None = Field(None, description="none, w8a8, w8a16, w4a16 …")
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
    enable_prefix_caching: bool | None = Field(None, description="Share the KV blocks of equal prefixes.")
    enable_chunked_prefill: bool | None = Field(None, description="Split long prompts over several steps.")
    seed: int | None = Field(None, description="Seed of requests that bring none.")
    threads: int | None = Field(None, ge=1, description="CPU threads; torch's choice when unset.")
    strict_kernels: bool | None = Field(None, description="Refuse to fall back to a reference kernel.")
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
    """The attention backend and its block size (None where it has no blocks)."""

    backend: str
    implementation: str
    block_size: int | None
    prefix_caching: bool
    reason: str
    passed_over: tuple[str, ...] = ()


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
        prompt: the family's prompt format, for checkpoints that bring no chat template.
        stop_token_ids: every id that ends a text.
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
    strict_kernels: bool
    skip_tokenizer_init: bool
    trust_remote_code: bool
    chat: bool
    prompt: PromptFormat | None
    fim: FimFormat | None
    stop_token_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()
    seal: object = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.seal is not _SEAL:
            raise ConfigError("an EngineConfig is made by npu_zoo.dispatch.resolve(EngineArgs(...)) and nowhere else")
        object.__setattr__(self, "seal", None)

    @property
    def head_layout(self) -> tuple[int, int, int]:
        """Query heads, key-value heads and head size of one rank."""
        config, tp = self.model_config, self.tensor_parallel_size
        return config.num_attention_heads // tp, max(1, config.num_key_value_heads // tp), config.head_dim


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, under vLLM's names.

    Attributes:
        n: completions per prompt.
        temperature: 0 is greedy.
        top_k: 0 or -1 keeps all tokens.
        min_p: keeps tokens of at least this share of the best token's probability.
        repetition_penalty: over prompt and output tokens (as in CTRL, arXiv:1909.05858).
        presence_penalty, frequency_penalty: over output tokens (as in OpenAI's API).
        seed: makes the request's draws independent of everything else that runs; unset takes the engine's seed.
        stop: strings that end the text and are not part of it, found across token borders too.
        logprobs: this many most likely tokens per position, the chosen one always among them.
        prompt_logprobs: the same for the prompt's tokens.

    Raises:
        UsageError: a value is out of its range; all such values are named at once.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple(self.stop_token_ids))
        faults = [fault for fault in _sampling_faults(self) if fault]
        if faults:
            raise UsageError("sampling parameters out of range: " + "; ".join(faults))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` in its normal form."""
        return tuple(self.stop)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else () if value is None else (value,)


def _sampling_faults(p: SamplingParams) -> list[str]:
    def number(name: str, low: float, high: float, *, open_low: bool = False) -> str:
        value = getattr(p, name)
        real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        inside = real and (low < value if open_low else low <= value) and value <= high
        bracket = "(" if open_low else "["
        return "" if inside else f"{name}={value!r} is not in {bracket}{low:g}, {high:g}]"

    def integer(name: str, low: int, *, high: float = math.inf, optional: bool = False) -> str:
        value = getattr(p, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if (optional and value is None) or (whole and low <= value <= high):
            return ""
        return f"{name}={value!r} is not an integer >= {low}" + ("" if high == math.inf else f" and <= {high}")

    faults = [
        integer("n", 1),
        number("temperature", 0.0, 1e6),
        number("top_p", 0.0, 1.0, open_low=True),
        integer("top_k", -1),
        number("min_p", 0.0, 1.0),
        number("repetition_penalty", 0.0, 1e6, open_low=True),
        number("presence_penalty", -2.0, 2.0),
        number("frequency_penalty", -2.0, 2.0),
        integer("max_tokens", 1, optional=True),
        integer("min_tokens", 0),
        integer("logprobs", 0, optional=True),
        integer("prompt_logprobs", 0, optional=True),
        integer("seed", -(2**63), high=2**64 - 1, optional=True),
    ]
    if not all(isinstance(s, str) and s for s in p.stop):
        faults.append("stop holds an empty string or something that is no string")
    if not all(isinstance(i, int) and i >= 0 for i in p.stop_token_ids):
        faults.append("stop_token_ids holds something that is no token id")
    if not any(faults) and p.max_tokens is not None and p.min_tokens > p.max_tokens:
        faults.append(f"min_tokens={p.min_tokens} exceeds max_tokens={p.max_tokens}")
    return faults
