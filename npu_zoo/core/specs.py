"""Specs: what plugins register. Frozen data; code is named as ``"package.module:attribute"`` and imported on use.

So listing, checking and validating never import torch, and specs travel to worker processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from npu_zoo.core.compressed_tensors import QUANT_METHOD
from npu_zoo.core.evidence import EvidenceRecord, row_digest
from npu_zoo.core.features import Attention, Conflict, Denial, FeatureMatrix, FeatureRow
from npu_zoo.core.hardware import DType
from npu_zoo.core.model_config import (
    EvaluationFormat,
    FimFormat,
    ModelConfig,
    PromptFormat,
    ReasoningFormat,
    ToolFormat,
)

CodeRef = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
"""``package.module:attribute``."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
VariantName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$")]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RowFault(NamedTuple):
    """What is wrong with a row of a matrix by itself.

    Attributes:
        row: its number, from 1.
        axis: the axis, or else the field, that is at fault.
        message: in words; names the row.
    """

    row: int
    axis: str
    message: str


class VariantSpec(_Spec):
    """One set of weights of a family, or one shape that takes any.

    Attributes:
        name: ``SIZE-base``, ``SIZE-instruct``, ``SIZE-chat``; also ``demo`` and ``custom``.
        size: what matrix rows are written for.
        aliases: further names; the bare size is an alias of the instruct or chat variant.
        config: the checkpoint's config.json values as far as planning and checking need them; empty for ``custom``.
        chat: whether prompts go through the chat template by default.
        huggingface, modelscope: repository ids to pull from.
        bundled: ``package:folder`` of a checkpoint that ships inside a package.
        stop_token_ids: ids that end a text beside config.json's and generation_config.json's eos_token_id.
        prompt: how its conversations become text, where that is not as the family's do.
        reasoning: what stands around its reasoning, which is kept out of the history of a conversation.
        tools: how it calls tools; None where it was not trained to.
        evaluation: how it is asked for programs, where that is not as the family's variants are.
    """

    name: VariantName
    size: VariantName
    aliases: tuple[VariantName, ...] = ()
    title: str = ""
    config: ModelConfig | None = None
    chat: bool = False
    huggingface: str = ""
    modelscope: str = ""
    bundled: str = ""
    stop_token_ids: tuple[int, ...] = ()
    prompt: PromptFormat | None = None
    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None
    evaluation: EvaluationFormat | None = None


class FamilySpec(_Spec):
    """A model family.

    Attributes:
        name: what ``--model`` takes before the colon.
        architectures: the names in config.json's ``architectures`` that this family loads.
        model: a subclass of :class:`npu_zoo.nn.model.CausalLM`.
        variants: every variant; exactly one name or alias each.
        default_variant: what the bare family name means where no weights are given.
        operations: operations of its own that its model calls, which some plugin registers kernels for; the model finds
            them in :attr:`npu_zoo.nn.kernels.table.Kernels.more`. Other families' runs choose no kernel for them.
        rows, denials, conflicts: the feature matrix; see :mod:`npu_zoo.core.features`.
        records: the evidence of every row whose ``evidence`` is above ``claimed``.
        truth: ``package:file`` of a table written by hand from the sources, which the rows are held against and never
            derived from; see :mod:`npu_zoo.core.truth`.
        config_defaults: by architecture, values of config.json's keys that its checkpoints may leave out.
        conversions: by config.json's ``quant_method``, the command that makes a plain checkpoint of a quantized one;
            ``{source}`` and ``{target}`` stand for the directories.
        environment: environment variables to preset per hardware, never over what the user has set.
        evaluation: how its variants are asked for programs by `npu-zoo eval`; None where no way is theirs.
    """

    name: Name
    title: str
    architectures: tuple[str, ...] = Field(min_length=1)
    model: CodeRef
    variants: tuple[VariantSpec, ...] = Field(min_length=1)
    default_variant: VariantName
    prompt: PromptFormat | None = None
    fim: FimFormat | None = None
    evaluation: EvaluationFormat | None = None
    config_defaults: dict[str, dict[str, Any]] = Field(default_factory=dict)
    conversions: dict[str, str] = Field(default_factory=dict)
    operations: tuple[Name, ...] = ()
    rows: tuple[FeatureRow, ...] = Field(min_length=1)
    denials: tuple[Denial, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    records: tuple[EvidenceRecord, ...] = ()
    truth: str = ""
    environment: dict[str, dict[str, str]] = Field(default_factory=dict)
    documentation: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> FamilySpec:
        names = [name for variant in self.variants for name in (variant.name, *variant.aliases)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"variant names used twice: {', '.join(twice)}")
        if self.default_variant not in names:
            raise ValueError(f"default_variant {self.default_variant} is none of {', '.join(names)}")
        sizes = {variant.size for variant in self.variants}
        stray = sorted({size for row in self.rows for size in row.sizes} - sizes)
        if stray:
            raise ValueError(f"rows speak of unknown sizes {', '.join(stray)}; known: {', '.join(sorted(sizes))}")
        return self

    def faults(self) -> tuple[RowFault, ...]:
        """Rows that no plugin may register; the registry drops a plugin that has any."""
        return tuple(fault for number in range(len(self.rows)) for fault in self._faults_of(number))

    def sound(self) -> FamilySpec:
        """The same family without the rows that are at fault."""
        wrong = {fault.row for fault in self.faults()}
        rows = tuple(row for number, row in enumerate(self.rows, 1) if number not in wrong)
        return self.model_copy(update={"rows": rows})

    def _faults_of(self, number: int) -> Iterator[RowFault]:
        row = self.rows[number]
        digest = row_digest(row)
        earlier = [row_digest(other) for other in self.rows[:number]]
        if digest in earlier:
            first = earlier.index(digest) + 1
            yield RowFault(number + 1, "row", f"{row.describe()} is registered twice: it is row {first} once more")
        proven = {record.level for record in self.records if record.row == digest}
        if row.evidence != "claimed" and row.evidence not in proven:
            yield RowFault(
                number + 1,
                "evidence",
                f"{row.describe()} says {row.evidence} and has no record of it; leave evidence out of the row and let "
                "proven(ROWS, RECORDS) set it from the records",
            )

    @property
    def matrix(self) -> FeatureMatrix:
        """The rows with their denials and conflicts."""
        return FeatureMatrix(rows=self.rows, denials=self.denials, conflicts=self.conflicts)

    def variant(self, name: str) -> VariantSpec | None:
        """The variant of a name or alias."""
        return next((v for v in self.variants if name == v.name or name in v.aliases), None)


class KernelSpec(_Spec):
    """An implementation of one operation for one chip.

    An operation that is not the zoo's own has the signature of its reference, the kernel of chip ``any`` with priority
    0, which its other kernels are tested against. Names that begin with ``linear_`` and ``experts_`` are those of
    quantization schemes; see :class:`QuantizationSpec`.

    Attributes:
        operation: such as ``rms_norm``; the signatures are in :mod:`npu_zoo.nn.kernels.reference`.
        chip: a chip's name, or ``any``.
        implementation: a callable with the operation's signature.
        priority: the highest that is available wins; the plain reference has 0.
        inputs: of the reference of an operation that is not the zoo's own, what its kernels are tested with: a function
            of a number of rows, a torch.dtype and a seed that gives a tuple of arguments. For ``linear_SCHEME`` these
            are the input, [rows, in_features], and the weight that the kernel packs.
        requires: modules that must be importable, such as ``torch_npu``.
        condition: a function without arguments that says why it cannot serve on this machine, and gives an empty string
            where it can; called without torch.
        operators: the operators of torch_npu that it calls, named as torch_npu has them, such as ``npu_rms_norm``;
            `npu-zoo doctor` looks them up in the installed one.
    """

    name: Name
    operation: Name
    chip: str
    dtypes: tuple[DType, ...] = Field(min_length=1)
    implementation: CodeRef
    priority: int = 10
    requires: tuple[str, ...] = ()
    condition: CodeRef | None = None
    operators: tuple[str, ...] = ()
    inputs: CodeRef | None = None
    description: str = ""


class AttentionBackendSpec(_Spec):
    """An attention backend: a class that implements one of the interfaces of :mod:`npu_zoo.core.attention`.

    Attributes:
        kind: ``paged`` (blocks behind a block table) or ``flash`` (contiguous per sequence).
        cache: what it stores: keys and values by ``heads`` (AttentionBackend), or the ``latent`` that a model with
            latent attention expands (LatentAttentionBackend).
        kv_cache_dtype: ``auto`` where it stores the compute dtype, else what it stores.
        block_sizes: the block sizes that it takes, its own choice first; empty where any will do.
        head_dims: the head sizes (of latents, the sizes ``kv_lora_rank``) that it takes; empty where any will do.
        prefix_caching: whether sequences can share what it stores.
        condition, operators: as of a :class:`KernelSpec`.
        reads: patterns of the environment variables that it reads, such as ``ATB_*``.
    """

    name: Name
    kind: Attention
    cache: Literal["heads", "latent"] = "heads"
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    chip: str
    dtypes: tuple[DType, ...] = Field(min_length=1)
    implementation: CodeRef
    block_sizes: tuple[int, ...] = ()
    head_dims: tuple[int, ...] = ()
    prefix_caching: bool = True
    priority: int = 10
    requires: tuple[str, ...] = ()
    condition: CodeRef | None = None
    operators: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    description: str = ""


class EngineSpec(_Spec):
    """An engine: a class that implements :class:`npu_zoo.core.engine.Engine`; its constructor takes an EngineConfig.

    Attributes:
        chips: those that it runs on, or ``any``.
        max_world_size: by chip, the most devices of one run; no limit on a chip that is not named.
        parallelism: the ways in which it shares a model among ranks.
        requires: modules that must be importable.
    """

    name: Name
    implementation: CodeRef
    chips: tuple[str, ...] = Field(min_length=1)
    max_world_size: dict[str, int] = Field(default_factory=dict)
    parallelism: tuple[Literal["tp", "pp", "ep", "dp"], ...] = ("tp", "pp", "ep", "dp")
    requires: tuple[str, ...] = ()
    description: str = ""


class WeightFormatSpec(_Spec):
    """A checkpoint format: a class that implements :class:`npu_zoo.core.weights.WeightLoader`.

    Attributes:
        patterns: file name patterns that tell the format, such as ``*.safetensors``.
        loadable: whether an engine reads it directly; otherwise it must be converted first.
        source: a function of a directory and config.json's content, whose result is a
            :class:`npu_zoo.weights.tensors.Source`.
        target: a function of :class:`npu_zoo.weights.tensors.TargetOptions`, whose result is a
            :class:`npu_zoo.weights.tensors.Target`.
        ranks: whether the target can have files of several ranks.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$")]
    patterns: tuple[str, ...] = Field(min_length=1)
    loader: CodeRef | None = None
    loadable: bool = True
    source: CodeRef | None = None
    target: CodeRef | None = None
    ranks: bool = False
    description: str = ""

    @model_validator(mode="after")
    def _loadable_has_loader(self) -> WeightFormatSpec:
        if self.loadable and self.loader is None:
            raise ValueError("a loadable format names its loader")
        return self


class QuantizationSpec(_Spec):
    """A quantization method: how a checkpoint stores the weights of its linear layers.

    What multiplies with them are the kernels of two operations that carry the method's name: ``linear_w8a16`` and,
    for models with experts, ``experts_w8a16`` for w8a16.

    Attributes:
        name: the scheme, as ``--quantization`` and matrix rows name it.
        weight_bits, activation_bits: such as 8 and 16 for w8a16.
        chips: those that it is for, or ``any``.
        method: a subclass of :class:`npu_zoo.nn.quantization.WeightMethod`.
        quant_method: what config.json's ``quantization_config`` calls itself in checkpoints that it reads.
        reader: a function of that section, without torch, that gives a
            :class:`~npu_zoo.core.quantization.QuantizationConfig` whose ``scheme`` is this name, or another one of the
            same ``quant_method``; it raises ValueError where the section says what it does not read.
        example: for a layout of its own, a function of two directories, a plain checkpoint's and an empty one, that
            writes the first into the second as the method stores it; `npu-zoo validate` runs what it writes.
    """

    name: Name
    weight_bits: int
    activation_bits: int
    chips: tuple[str, ...] = Field(min_length=1)
    method: CodeRef
    quant_method: str = Field(default=QUANT_METHOD, min_length=1)
    reader: CodeRef = "npu_zoo.core.compressed_tensors:read_compressed_tensors"
    example: CodeRef | None = None
    description: str = ""
