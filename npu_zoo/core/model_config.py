"""A checkpoint's hyperparameters and formats of prompts, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from npu_zoo.core.errors import WeightsError, validation_lines
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
