"""A checkpoint's hyperparameters and formats of prompts, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from npu_zoo.core.errors import WeightsError, validation_lines
from npu_zoo.core.hardware import DType


class YarnParameters(BaseModel):
    """What YaRN (arXiv:2309.00071) takes besides its factor, under config.json's names and with transformers' defaults.

    Attributes:
        original_max_position_embeddings: positions that the model was trained on before it was extended.
        beta_fast, beta_slow: turns within those positions above which a frequency is kept, and below which it is
            divided by the factor.
        truncate: whether the range between the two is widened to whole dimensions.
        attention_factor: what cosines and sines are multiplied by; None where it follows from the factor and mscale.
        mscale, mscale_all_dim: weights of the factor's logarithm in that multiple and in latent attention's scale.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    original_max_position_embeddings: int = Field(gt=0, strict=True)
    beta_fast: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    beta_slow: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    truncate: bool = True
    attention_factor: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    mscale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    mscale_all_dim: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> YarnParameters:
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast:g} is below beta_slow {self.beta_slow:g}")
        return self


class RopeScaling(BaseModel):
    """How positions beyond the trained length are mapped.

    Attributes:
        kind: ``none``, ``linear`` (position / factor), ``dynamic`` (NTK) or ``yarn``.
        parameters: yarn's further keys, as in :class:`YarnParameters`, and ``partial_rotary_factor``. Keys that the
            kind does not read and values that are the default are dropped, so that equal scalings compare equal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none", "linear", "dynamic", "yarn"] = "none"
    factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    parameters: dict[str, Any] = Field(default_factory=dict, validate_default=True)

    @field_validator("parameters")
    @classmethod
    def _read_by_the_kind(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        stated = {key: value for key, value in given.items() if value is not None}
        kept = {key: value for key, value in stated.items() if key == "partial_rotary_factor" and value != 1}
        if info.data.get("kind") != "yarn":
            return kept
        if "original_max_position_embeddings" not in stated:
            raise ValueError(
                "yarn rope scaling lacks original_max_position_embeddings, the positions that the model had before"
            )
        try:
            return YarnParameters.model_validate(stated).model_dump(exclude_defaults=True) | kept
        except ValidationError as error:
            raise ValueError("; ".join(validation_lines(error))) from None

    @property
    def yarn(self) -> YarnParameters | None:
        """Yarn's parameters with their defaults; None for every other kind."""
        return YarnParameters.model_validate(self.parameters) if self.kind == "yarn" else None

    def __str__(self) -> str:
        """Kind and factor, and the parameters that are not the default."""
        listed = ", ".join(f"{key} {value}" for key, value in self.parameters.items())
        return f"{self.kind} {self.factor:g}" + (f" ({listed})" if listed else "")


VOCAB_MULTIPLE = 64
"""Vocabularies are padded to a multiple of this, so that ranks can share them evenly whatever their size."""


def padded_vocab_size(vocab_size: int) -> int:
    """Rows that a vocabulary's tables have."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class MoEConfig(BaseModel):
    """A mixture of experts, under config.json's names (arXiv:2401.06066, arXiv:2412.19437).

    Attributes:
        moe_intermediate_size: the width of one expert; the shared ones are one MLP of ``n_shared_experts`` widths.
        num_experts_per_tok: routed experts that each token goes to.
        first_k_dense_replace: the first layers that have a dense feed-forward of ``intermediate_size`` instead.
        moe_layer_freq: of the layers after those, every which one has experts.
        n_group, topk_group: groups that the experts are split into, and how many of them a token may reach.
        topk_method: ``greedy``, ``group_limited_greedy`` or ``noaux_tc``.
        scoring_func: ``softmax`` or ``sigmoid``.
        norm_topk_prob: whether the chosen experts' scores are made to sum to one.
        routed_scaling_factor: what the routed experts' weights are multiplied by.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_routed_experts: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    num_experts_per_tok: int = Field(gt=0)
    n_shared_experts: int = Field(default=0, ge=0)
    first_k_dense_replace: int = Field(default=0, ge=0)
    moe_layer_freq: int = Field(default=1, gt=0)
    n_group: int = Field(default=1, gt=0)
    topk_group: int = Field(default=1, gt=0)
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "greedy"
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> MoEConfig:
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"{self.n_routed_experts} experts do not divide into {self.n_group} groups")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.topk_group > self.n_group or self.num_experts_per_tok > reachable:
            raise ValueError(
                f"{self.num_experts_per_tok} experts per token cannot be chosen from {self.topk_group} of "
                f"{self.n_group} groups of {self.n_routed_experts // self.n_group}"
            )
        return self

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts in place of a dense feed-forward."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


class MLAConfig(BaseModel):
    """Multi-head latent attention (arXiv:2405.04434), under config.json's names.

    Attributes:
        kv_lora_rank: values of the latent that keys and values are expanded from.
        qk_rope_head_dim: values of the rotated key, which all heads share.
        qk_nope_head_dim: values of a head's query and key that are not rotated.
        v_head_dim: values of a head's value.
        q_lora_rank: values of the queries' latent; None where queries are projected at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kv_lora_rank: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    v_head_dim: int = Field(gt=0)
    q_lora_rank: int | None = Field(default=None, gt=0)

    @property
    def qk_head_dim(self) -> int:
        """Values of a head's whole query."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_dim(self) -> int:
        """Values that the cache keeps of a token in a layer: the latent and the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


class ModelConfig(BaseModel):
    """Hyperparameters, under the names of Hugging Face's config.json.

    ``extra`` holds every key that this class has no field for, so that a family can read its own.

    Attributes:
        head_dim: values of a head's query; with latent attention, rotated and other ones together.
        moe: the experts; None where every layer is dense.
        mla: the latent attention; None where the cache keeps keys and values by head.
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
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None
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
        "moe",
        "mla",
    )
    """The fields that a checkpoint must share with the variant it is said to be."""

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> ModelConfig:
        """Read a config.json, in the spelling of transformers 4 (``rope_scaling``) or 5 (``rope_parameters``).

        Args:
            raw: the file's content.
            defaults: values of keys that the file leaves out.

        Raises:
            WeightsError: a required key is missing or a value has the wrong form.
        """
        values = {**(defaults or {}), **raw}
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
            "moe": _section(MoEConfig, "n_routed_experts", values),
            "mla": _section(MLAConfig, "kv_lora_rank", values),
        }
        if known["mla"]:
            # Some writers put the rotated part's size here, others hidden_size over heads; neither is a query's.
            known["head_dim"] = known["mla"].get("qk_nope_head_dim", 0) + known["mla"].get("qk_rope_head_dim", 0)
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

    def to_hf(self) -> dict[str, Any]:
        """A config.json that :meth:`from_hf` reads as this.

        With latent attention it has no ``head_dim``, which other readers take for the rotated part's size.
        """
        parts = {"architecture", "rope_scaling", "moe", "mla", "extra"} | ({"head_dim"} if self.mla else set())
        own = self.model_dump(exclude=parts, exclude_none=True)
        scaling = self.rope_scaling
        rope = {"type": scaling.kind, "factor": scaling.factor, **scaling.parameters}
        sections = [part.model_dump() for part in (self.moe, self.mla) if part]  # an unset q_lora_rank says something
        return {
            "architectures": [self.architecture],
            **own,
            "eos_token_id": list(self.eos_token_id),
            "rope_scaling": None if scaling.kind == "none" and not scaling.parameters else rope,
            **{key: value for section in sections for key, value in section.items()},
            **self.extra,
        }

    @property
    def context_length(self) -> int:
        """The longest sequence: ``max_position_embeddings``, which dynamic scaling alone counts before scaling."""
        factor = self.rope_scaling.factor if self.rope_scaling.kind == "dynamic" else 1.0
        return int(self.max_position_embeddings * max(factor, 1.0))

    @property
    def unscaled_length(self) -> int:
        """The longest sequence without rope scaling; ``max_position_embeddings`` counts linear scaling in."""
        scaling = self.rope_scaling
        if scaling.yarn is not None:
            return scaling.yarn.original_max_position_embeddings
        return max(1, int(self.max_position_embeddings / (scaling.factor if scaling.kind == "linear" else 1.0)))

    @property
    def num_mtp_layers(self) -> int:
        """Layers behind the model's own that predict further tokens (``num_nextn_predict_layers``).

        Raises:
            WeightsError: config.json holds something else than a whole number there.
        """
        stated = self.extra.get("num_nextn_predict_layers") or 0
        if not isinstance(stated, int):
            raise WeightsError(f"config.json holds num_nextn_predict_layers {stated!r}; a whole number is due")
        return stated

    @property
    def num_parameters(self) -> int:
        """Weights of all layers, embedding and head, without layers that predict further tokens."""
        layers = range(self.num_hidden_layers)
        feed_forward = sum(self._mlp_parameters(layer) for layer in layers)
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        return tables + norms + feed_forward + self.num_hidden_layers * self._attention_parameters()

    def _attention_parameters(self) -> int:
        heads, mla = self.num_attention_heads, self.mla
        if mla is None:
            return 2 * self.hidden_size * (heads + self.num_key_value_heads) * self.head_dim
        width, rank = heads * mla.qk_head_dim, mla.q_lora_rank
        queries = self.hidden_size * rank + rank + rank * width if rank else self.hidden_size * width
        latents = self.hidden_size * mla.cache_dim + mla.kv_lora_rank
        expanded = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        return queries + latents + expanded + heads * mla.v_head_dim * self.hidden_size

    def _mlp_parameters(self, layer: int) -> int:
        moe = self.moe
        if moe is None or not moe.has_experts(layer):
            return 3 * self.hidden_size * self.intermediate_size
        experts = moe.n_routed_experts + moe.n_shared_experts
        router = moe.n_routed_experts * (self.hidden_size + (moe.topk_method == "noaux_tc"))
        return 3 * self.hidden_size * moe.moe_intermediate_size * experts + router

    def differences(self, other: ModelConfig) -> list[str]:
        """Every compared field in which another config differs, as ``name: this, other``."""
        found = []
        for name in self.COMPARED:
            ours, theirs = getattr(self, name), getattr(other, name)
            section = next((type(part) for part in (ours, theirs) if isinstance(part, _SECTIONS)), None)
            keys = [name] if section is None else list(section.model_fields)
            pairs = [
                (key, ours, theirs) if section is None else (key, _of(ours, key), _of(theirs, key)) for key in keys
            ]
            found += [f"{key}: {_brief(one)}, not {_brief(two)}" for key, one, two in pairs if one != two]
        return found


_SECTIONS = (MoEConfig, MLAConfig)


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


def _section(section: type[BaseModel], key: str, values: dict[str, Any]) -> dict[str, Any] | None:
    """Take the keys of a part of the hyperparameters out of ``values``; None where the telling one is unset."""
    if values.get(key) is None:
        return None
    found = {name: values.pop(name) for name in section.model_fields if name in values}
    return {name: value for name, value in found.items() if value is not None}


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
    factor, original = parameters.pop("factor", None), parameters.get("original_max_position_embeddings")
    if kind == "yarn" and factor is None and isinstance(original, int) and original > 0:
        factor = values["max_position_embeddings"] / original
    if factor is None and kind != "none":
        raise WeightsError(f"config.json asks for rope scaling '{kind}' and lacks its factor")
    return {"kind": kind, "factor": 1.0 if kind == "none" else factor, "parameters": parameters}


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _of(section: BaseModel | None, key: str) -> Any:
    return getattr(section, key, None)


def _brief(value: Any) -> str:
    return "none" if value is None else str(value)


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


class ReasoningFormat(BaseModel):
    """What stands around a model's reasoning, which comes before its answer.

    Attributes:
        start: opens it; a chat template may have written it already.
        end: closes it; what follows is the answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: str = Field(min_length=1)
    end: str = Field(min_length=1)

    def split(self, text: str, *, opened: bool = False) -> tuple[str, str]:
        """Reasoning and answer of a generated text.

        Args:
            text: as generated, whole or so far.
            opened: whether the prompt ends inside the reasoning, so that the text begins there.

        Returns:
            The reasoning without its markers, and what follows it. A text that was cut off inside has no answer; one
            without reasoning is all answer.
        """
        head, found, tail = text.rpartition(self.end)
        if found:
            before, _, reasoning = head.partition(self.start)
            return (reasoning if self.start in head and not before.strip() else head), tail
        before, found, tail = text.partition(self.start)
        if found and not before.strip():
            return tail, ""
        return (text, "") if opened else ("", text)

    def without_reasoning(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """A conversation whose answers have lost their reasoning, up to its last end marker."""
        return [
            {**message, "content": message["content"].rpartition(self.end)[2]}
            if message.get("role") == "assistant" and isinstance(message.get("content"), str)
            else message
            for message in messages
        ]


class ToolFormat(BaseModel):
    """How a model calls tools: ``begin``, one or more calls with ``between`` in the middle, ``end``.

    A call is ``call_begin before_name NAME before_arguments ARGUMENTS after_arguments call_end``, its arguments a JSON
    object. Text may stand before ``begin``.

    Attributes:
        begin, end: around all calls of an answer.
        call_begin, call_end: around each of them.
        before_name: between ``call_begin`` and the tool's name.
        before_arguments, after_arguments: around a call's arguments.
        between: two calls.
        instructions: a Jinja template that tells a model of its ``tools`` (a list as in OpenAI's API), as an addition
            to the system message; used where the chat template itself does not read ``tools``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    begin: str = Field(min_length=1)
    end: str = Field(min_length=1)
    call_begin: str = Field(min_length=1)
    call_end: str = Field(min_length=1)
    before_name: str = ""
    before_arguments: str = Field(min_length=1)
    after_arguments: str = ""
    between: str = ""
    instructions: str = Field(min_length=1)


class FimFormat(BaseModel):
    """Fill in the middle, in prefix-suffix-middle order: ``begin prefix hole suffix end``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    begin: str
    hole: str
    end: str


class EvaluationFormat(BaseModel):
    """How a model is asked for programs, and how its programs are found, as its makers did when they evaluated it.

    Attributes:
        instruction: what a model with a chat template is told; ``{prompt}`` stands for the function to complete.
        tabs: whether the function is indented with tabs, and tabs of the answer are taken for four spaces.
        code_block: which of an answer's code blocks that define the function is taken.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    instruction: str
    tabs: bool = False
    code_block: Literal["first", "last"] = "first"

    @field_validator("instruction")
    @classmethod
    def _holds_the_prompt(cls, instruction: str) -> str:
        if instruction.count("{prompt}") != 1:
            raise ValueError("an instruction holds {prompt} once, where the function to complete stands")
        return instruction

    def instruct(self, prompt: str) -> str:
        """What the model is told for a function's signature and docstring."""
        shown = prompt.strip()
        return self.instruction.replace("{prompt}", shown.replace("    ", "\t") if self.tabs else shown)
