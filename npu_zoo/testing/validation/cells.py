"""Single combinations of a matrix row, run with a tiny model of the same kind and held against the plainest run of it.

The plainest run is one rank in float32, with the reference of every kernel, keys and values in the compute dtype.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import RequestOutput
from npu_zoo.core.features import Attention, FeatureRow, layout_names
from npu_zoo.core.hardware import DType
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.dispatch import resolve
from npu_zoo.registry import get_registry
from npu_zoo.selection import select_attention, select_kernels
from npu_zoo.settings import engine_args
from npu_zoo.testing.agreement import SCORED, Agreement, compare, largest
from npu_zoo.testing.door import unchecked_config
from npu_zoo.testing.quantized import quantized
from npu_zoo.testing.reference import PROMPTS
from npu_zoo.testing.shapes import write_random_model
from npu_zoo.testing.validation.claims import ClaimFails, Figures
from npu_zoo.testing.variants import TINY, with_tiny_variant

if TYPE_CHECKING:
    from torch import Tensor

    from npu_zoo.parallel.groups import Joined

MEAN_BOUND: dict[str, float] = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.15}
"""The mean difference of a token's natural-log probability, by dtype; twice and more what was seen."""

ROUNDED_BOUND = 0.3
"""The same where activations or keys and values are rounded to eight bits."""

CHOSEN_BOUND: dict[str, float] = {"float32": 1e-4, "float16": 0.5, "bfloat16": 1.1}
"""The same of models with experts, of which a rounding can choose another one; up to 0.53 was seen in bfloat16."""

_LISTED = [list(prompt) for prompt in PROMPTS]
_IN_CHUNKS: dict[str, Any] = {"max_num_batched_tokens": 16, "max_num_seqs": 4}


_ALONE = Split()


@dataclass(frozen=True)
class Combination:
    """A value on each axis that a run depends on."""

    hardware: str
    dtype: DType
    attention: Attention
    quantization: str = "none"
    kv_cache_dtype: str = "auto"
    serving: str = "offline"
    long_sequence: bool = False
    split: Split = _ALONE

    @property
    def name(self) -> str:
        """The values that are not the usual ones, such as ``bfloat16 paged w8a16 tp2``."""
        shared = layout_names(self.split)[0] if self.split.world_size > 1 else ""
        unusual = ["" if self.quantization == "none" else self.quantization]
        unusual += ["" if self.kv_cache_dtype == "auto" else f"{self.kv_cache_dtype} cache"]
        unusual += ["" if self.serving == "offline" else self.serving, "long sequences" if self.long_sequence else ""]
        return " ".join(filter(None, [self.dtype, self.attention, *unusual, shared]))


def bound_of(cell: Combination, config: ModelConfig) -> float:
    """What a combination's mean difference may be."""
    exact = MEAN_BOUND if config.moe is None else CHOSEN_BOUND
    eight_bits = cell.kv_cache_dtype == "int8" or cell.quantization.endswith("a8")
    rounded = max(ROUNDED_BOUND, CHOSEN_BOUND["bfloat16"] if config.moe else 0.0)
    return max(exact[cell.dtype], rounded if eight_bits else 0.0)


def run_alone(family_name: str, row: FeatureRow, config: ModelConfig, cell: Combination) -> Figures:
    """Run a combination of one rank by the engine: prompts together and in chunks, then again from the prefix cache.

    Raises:
        ClaimFails: its scores are not those of the plainest run.
    """
    from npu_zoo.engine.llm import LLM

    found: list[Agreement] = []
    with _prepared(family_name, row, config, cell) as weights:
        due = _plain_outputs(weights, plainest(_resolve(family_name, row, cell, weights)))
        for options in ({}, _IN_CHUNKS):
            with LLM.from_config(_resolve(family_name, row, cell, weights, **options)) as llm:
                found += [
                    compare(due, llm.generate(_LISTED, SCORED)),
                    compare(due[:1], llm.generate(_LISTED[:1], SCORED)),
                ]
    mean, worst = largest(one.mean_logprob for one in found), largest(one.worst_logprob for one in found)
    return _within(mean, worst, bound_of(cell, config))


def run_ranks_of(family_name: str, row: FeatureRow, config: ModelConfig, cell: Combination) -> Figures:
    """Run a combination of several ranks, each a thread with groups of its own, for two steps.

    Raises:
        ClaimFails: the logits are not those of the plainest run.
    """
    with _prepared(family_name, row, config, cell) as weights:
        several = _resolve(family_name, row, cell, weights)
        due = _plain_steps(weights, plainest(several))
        found = _two_steps(several)
    differences = [(one - other).abs() for one, other in zip(due, found, strict=True)]
    mean, worst = largest(float(d.mean()) for d in differences), largest(float(d.max()) for d in differences)
    return _within(mean, worst, bound_of(cell, config))


def _within(mean: float, worst: float, bound: float) -> Figures:
    if not mean <= bound:
        raise ClaimFails(f"log-probabilities differ by {mean:.3g} on average, and {bound:g} is allowed")
    return {"mean_logprob_difference": round(mean, 6), "worst_logprob_difference": round(worst, 6)}


_outputs: dict[Path, list[RequestOutput]] = {}
_steps: dict[Path, list[Tensor]] = {}


def _plain_outputs(weights: Path, config: EngineConfig) -> list[RequestOutput]:
    """What the plainest run makes of the prompts, computed once for each checkpoint."""
    from npu_zoo.engine.llm import LLM

    if weights not in _outputs:
        with LLM.from_config(config) as llm:
            _outputs[weights] = llm.generate(_LISTED, SCORED)
    return _outputs[weights]


def _plain_steps(weights: Path, config: EngineConfig) -> list[Tensor]:
    """What the plainest run gives in the two steps, computed once for each checkpoint."""
    if weights not in _steps:
        _steps[weights] = _two_steps(config)
    return _steps[weights]


def resolve_combination(family_name: str, row: FeatureRow, config: ModelConfig, cell: Combination) -> EngineConfig:
    """What an engine for a combination is made with; nothing is run.

    Raises:
        NpuZooError: no engine can be made for it.
    """
    with _prepared(family_name, row, config, cell) as weights:
        return _resolve(family_name, row, cell, weights)


@contextlib.contextmanager
def _prepared(family_name: str, row: FeatureRow, config: ModelConfig, cell: Combination) -> Iterator[Path]:
    """The weights of a combination, in a registry in which the tiny model has the row's cells and no others."""
    family = get_registry().families[family_name]
    with with_tiny_variant(family, [row]):
        yield checkpoint(family_name, config.model_dump_json(), cell.quantization)


def _resolve(family_name: str, row: FeatureRow, cell: Combination, weights: Path, **options: Any) -> EngineConfig:
    split = cell.split
    asked: dict[str, Any] = {
        "model": f"{family_name}:{TINY}",
        "weights": str(weights),
        "hardware": cell.hardware,
        "dtype": cell.dtype,
        "attention": cell.attention,
        "quantization": cell.quantization,
        "kv_cache_dtype": cell.kv_cache_dtype,
        "serving": cell.serving,
        "tensor_parallel_size": split.tp,
        "pipeline_parallel_size": split.pp,
        "expert_parallel_size": split.ep,
        "data_parallel_size": split.dp,
        "max_model_len": _length(weights, long=cell.long_sequence),
        "kv_cache_memory": "32MiB",
        "threads": 1,
        "skip_tokenizer_init": True,
        "allow_experimental": row.status == "experimental",
    }
    return resolve(engine_args({**asked, **options}))


def _length(weights: Path, *, long: bool) -> int:
    from npu_zoo.checkpoint import read_config

    return int(read_config(weights)["max_position_embeddings"]) * 2 if long else 128


def plainest(config: EngineConfig) -> EngineConfig:
    """The same weights on one rank of a CPU in float32, by references alone."""
    from npu_zoo.testing.kernels import reference_of_operation

    registry, model = get_registry(), config.model_config
    operations = registry.families[config.family].operations
    offered = {spec.operation for spec in registry.kernels.values() if spec.chip == "any"}
    references = {spec.name: spec for spec in (reference_of_operation(name, registry) for name in sorted(offered))}
    backends = {name: backend for name, backend in registry.attention_backends.items() if backend.chip == "any"}
    return unchecked_config(
        config,
        hardware="cpu",
        chip="cpu",
        device="cpu",
        dtype="float32",
        kernels=select_kernels(references, "cpu", "float32", model, config.quantization, operations),
        attention="paged",
        attention_choice=select_attention(backends, "paged", "cpu", "float32", model, None),
        kv_cache_dtype="auto",
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        expert_parallel_size=1,
        data_parallel_size=1,
        world_size=1,
        enable_prefix_caching=True,
        rank_bindings=(),
    )


def _two_steps(config: EngineConfig) -> list[Tensor]:
    """Log-probabilities after a step of two prompts, and after a step of one token more of each."""
    from npu_zoo.engine.runner import ModelRunner
    from npu_zoo.engine.step import StepRow
    from npu_zoo.testing.ranks import run_ranks

    block, split = config.attention_choice.block_size or 64, config.split
    prompts, further = (PROMPTS[0], PROMPTS[1]), (11, 12)
    slots, first, second = 0, [], []
    for number, (prompt, token) in enumerate(zip(prompts, further, strict=True)):
        blocks = tuple(range(slots, slots + (1 if config.attention == "flash" else -(-(len(prompt) + 1) // block))))
        slots, replica = blocks[-1] + 1, number % split.dp
        row = StepRow(prompt, 0, blocks, num_logits=1, wants_prompt=False)
        first.append(replace(row, replica=replica))
        second.append(replace(row, token_ids=(token,), start=len(prompt), replica=replica))

    def rank(joined: Joined) -> list[Tensor]:
        runner = ModelRunner(config, ranks=joined.ranks)
        return [runner.execute(rows)[0] for rows in (first, second)]

    return [logits.float().log_softmax(-1) for logits in run_ranks(split, rank)[0]]


_folder: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def checkpoint(family_name: str, config_json: str, quantization: str) -> Path:
    """A tiny checkpoint that this process keeps; it goes with the process."""
    if not _folder:
        _folder.append(tempfile.TemporaryDirectory(prefix="npu-zoo-validate-"))
    directory = Path(tempfile.mkdtemp(dir=_folder[0].name))
    if quantization != "none":
        return quantized(checkpoint(family_name, config_json, "none"), directory / quantization, quantization)
    config = ModelConfig.model_validate_json(config_json)
    return write_random_model(directory, get_registry().families[family_name], config)
