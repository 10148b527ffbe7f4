"""A family's model against an independent one: logits of whole prompts, and greedy tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.errors import UsageError
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.core.specs import FamilySpec
from npu_zoo.dispatch import resolve
from npu_zoo.registry import get_registry
from npu_zoo.settings import engine_args
from npu_zoo.testing.agreement import largest
from npu_zoo.testing.tiny import write_tiny_checkpoint
from npu_zoo.testing.variants import TINY, with_tiny_variant

if TYPE_CHECKING:
    from torch import Tensor

Logits = Callable[[Sequence[int]], Any]
"""Takes the token ids of one text to its logits [T, vocab_size], a tensor or what can be made one."""

PROMPTS = tuple(tuple(range(3, 3 + length)) for length in (40, 17, 1))
"""Longer and shorter than a block, and a single token."""


def assert_matches_reference(
    family: FamilySpec | str,
    reference: type | str | Logits,
    *,
    variant: str | None = None,
    weights: Path | None = None,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    max_tokens: int = 8,
    tolerance: float = 1e-4,
) -> None:
    """Hold a family's model, in float32 on the CPU, against an independent one on the same weights.

    Args:
        family: a spec, or the name of a registered one.
        reference: a class of transformers or its name, which reads the checkpoint's directory; or a callable of token
            ids, of the weights in ``weights``.
        variant: whose kind of model a tiny checkpoint is made of; see :func:`npu_zoo.testing.write_tiny_checkpoint`.
        weights: a checkpoint to take instead of a tiny one.
        tolerance: the most that a logit may differ.

    Raises:
        AssertionError: a logit differs by more, or a greedy token is another one; says where and by how much.
        UsageError: a callable was given and no ``weights``, or transformers has no class of that name.
    """
    spec = get_registry().find(family)[0] if isinstance(family, str) else family
    with tempfile.TemporaryDirectory() as folder:
        directory = weights or write_tiny_checkpoint(Path(folder), spec, variant)
        logits_of = _logits_of(reference, directory, given=weights is not None)
        worst = compare_with_reference(spec, directory, logits_of, prompts, max_tokens)
    if isinstance(worst, str):
        raise AssertionError(worst)
    if not worst <= tolerance:
        raise AssertionError(f"logits differ by up to {worst:.2g}, and {tolerance:g} is allowed")


def compare_with_reference(
    family: FamilySpec,
    weights: Path,
    logits_of: Logits,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    max_tokens: int = 8,
) -> float | str:
    """The largest difference of a logit over all prompts; or, where shapes or a greedy token differ, how."""
    import torch

    from npu_zoo.engine.llm import LLM

    with with_tiny_variant(family):
        config = _config(family, weights)
        worst = 0.0
        for prompt in prompts:
            due = torch.as_tensor(logits_of(list(prompt))).float()
            found = _prompt_logits(config, prompt)
            if found.shape != due.shape:
                return f"the model gives logits {list(found.shape)}, the reference {list(due.shape)}"
            worst = largest([worst, float((found - due).abs().max())])
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        with LLM.from_config(config) as llm:
            outputs = llm.generate([list(prompt) for prompt in prompts], params)
    for prompt, output in zip(prompts, outputs, strict=True):
        due_tokens, tokens = _greedy(logits_of, prompt, max_tokens), output.outputs[0].token_ids
        if tokens != due_tokens:
            return f"after {len(prompt)} tokens the model goes on with {tokens}, the reference with {due_tokens}"
    return worst


def transformers_class(name: str) -> type | None:
    """A class of transformers; None where it has none of that name."""
    import transformers

    found = getattr(transformers, name, None)
    return found if isinstance(found, type) else None


def transformers_logits(model_class: Any, weights: Path) -> Logits:
    """What a class of transformers makes of a checkpoint, in float32.

    Raises:
        UsageError: it does not find its tensors in the checkpoint, or finds others too.
    """
    import torch
    import transformers

    bars: Any = transformers.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(weights, dtype=torch.float32, output_loading_info=True)
    finally:
        if shown:
            bars.enable_progress_bar()
    info["unexpected_keys"] = _without_mtp(info["unexpected_keys"], model.config)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            kind = what.partition("_")[0]
            raise UsageError(f"{model_class.__name__} finds {kind} tensors in {weights}: {sorted(info[what])[:5]}")
    model.eval()

    def logits(token_ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(torch.tensor([list(token_ids)])).logits[0]
        return found

    return logits


def _without_mtp(names: Iterable[str], config: Any) -> set[str]:
    """Names of tensors without those of layers that predict further tokens, which transformers has none of."""
    first = config.num_hidden_layers
    numbers = range(first, first + (getattr(config, "num_nextn_predict_layers", 0) or 0))
    return {name for name in names if not name.startswith(tuple(f"model.layers.{number}." for number in numbers))}


def _logits_of(reference: type | str | Logits, weights: Path, *, given: bool) -> Logits:
    if isinstance(reference, str):
        found = transformers_class(reference)
        if found is None:
            raise UsageError(
                f"transformers has no class {reference}; name another, or give a callable with weights=DIR"
            )
        reference = found
    if isinstance(reference, type):
        return transformers_logits(reference, weights)
    if not given:
        raise UsageError("a callable speaks of weights of its own; write them first and give weights=DIR")
    return reference


def _config(family: FamilySpec, weights: Path) -> EngineConfig:
    asked = {
        "model": f"{family.name}:{TINY}",
        "weights": str(weights),
        "hardware": "cpu",
        "dtype": "float32",
        "max_model_len": 128,
        "kv_cache_memory": "16MiB",
        "threads": 1,
        "skip_tokenizer_init": True,
    }
    return resolve(engine_args(asked))


def _prompt_logits(config: EngineConfig, prompt: Sequence[int]) -> Tensor:
    """[T, vocab_size], from one step of the whole prompt."""
    from npu_zoo.engine.runner import ModelRunner
    from npu_zoo.engine.step import StepRow

    runner = ModelRunner(config)
    slots = range(-(-len(prompt) // (config.attention_choice.block_size or len(prompt))))
    _, hidden = runner.execute([StepRow(tuple(prompt), 0, tuple(slots), num_logits=1, wants_prompt=True)])
    return runner.compute_logits(hidden[0]).float().cpu()


def _greedy(logits_of: Logits, prompt: Sequence[int], count: int) -> list[int]:
    import torch

    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(torch.as_tensor(logits_of(tokens))[-1].argmax()))
    return tokens[len(prompt) :]
