"""Whether a checkpoint is the model that was named, stored in a way that is read. Nothing here reads a weight."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from npu_zoo.checkpoint import detect_format, quant_method_of, read_quantization
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import HardwareError, PluginError, WeightsError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.quantization import CONFIG_KEY
from npu_zoo.core.specs import QuantizationSpec
from npu_zoo.registry import Registry
from npu_zoo.request import Request, bundled_directory


def match_weights(args: EngineArgs, request: Request, registry: Registry) -> tuple[Path, ModelConfig]:
    """The checkpoint that a request is for, and its hyperparameters.

    Raises:
        WeightsError: none was given and the variant has none of its own; or it is another model than the variant that
            was named, or stored in a way that is not read. Lists every difference.
    """
    directory = Path(args.weights) if args.weights else bundled_directory(request.variant)
    config = request.config
    if directory is None or config is None:
        raise WeightsError(_how_to_get_weights(request))
    differences = _differences(request, config)
    if differences:
        listed = "\n  ".join(differences)
        way_out = _owners_of(config.architecture, request, registry)
        raise WeightsError(f"{directory} is not {request.model}:\n  {listed}\n{way_out}")
    _check_quantization(request, directory, config, registry.quantization_methods)
    detect_format(directory, registry.weight_formats)
    return directory, config


def match_quantization(request: Request, chip: str, registry: Registry) -> QuantizationSpec | None:
    """The registered method of the checkpoint's scheme; None where it is plain.

    Raises:
        PluginError: no plugin has it.
        HardwareError: it is for other chips.
    """
    if request.quantization_config is None:
        return None
    spec, names = registry.quantization_methods.get(request.quantization), ", ".join(registry.quantization_methods)
    if spec is None:
        raise PluginError(
            f"no plugin registers the quantization method {request.quantization}; registered: {names or 'none'}"
        )
    if chip not in spec.chips and "any" not in spec.chips:
        raise HardwareError(f"quantization {spec.name} is for {', '.join(spec.chips)}, not {chip}")
    return spec


def _check_quantization(
    request: Request, directory: Path, config: ModelConfig, methods: Mapping[str, QuantizationSpec]
) -> None:
    """Refuse a checkpoint that is quantized in a way that is not read, or in another one than was asked for."""
    raw, stored = config.extra.get(CONFIG_KEY), request.quantization_config
    if raw and stored is None:
        raise WeightsError(_how_to_convert(request, directory, raw, methods))
    scheme = stored.scheme if stored else "none"
    if request.quantization != scheme:
        holds = f"is quantized in {scheme}" if stored else "is not quantized"
        raise WeightsError(
            f"--quantization {request.quantization} was asked for, and the checkpoint in {directory} {holds}; "
            "leave --quantization unset to take it as it is, or name a checkpoint that is stored as asked"
        )


def _differences(request: Request, config: ModelConfig) -> list[str]:
    """In what a checkpoint contradicts the variant that was named."""
    family, variant = request.family, request.variant
    found = []
    if config.architecture not in family.architectures:
        named = config.architecture or "none"
        found.append(f"architecture: {named}, and {family.name} loads {', '.join(family.architectures)}")
    elif variant.config and config.architecture != variant.config.architecture:
        found.append(f"architecture: {config.architecture}, not {variant.config.architecture}")
    return found + (config.differences(variant.config) if variant.config else [])


def _owners_of(architecture: str, request: Request, registry: Registry) -> str:
    if architecture in request.family.architectures:
        return f"name the variant that it is, or take --model {request.family.name}:custom"
    owners = [name for name, family in registry.families.items() if architecture in family.architectures]
    return f"families that load {architecture or 'it'}: {', '.join(owners) or 'none is registered'}"


def _how_to_convert(request: Request, directory: Path, quantized: Any, methods: Mapping[str, QuantizationSpec]) -> str:
    method = quant_method_of(quantized)
    text = f"{directory} is quantized, which {request.model} does not load"
    is_known = any(spec.quant_method == method for spec in methods.values())
    why = f": {_why_unread(quantized, methods)}" if is_known else ""
    text += f" (quant_method {method}{why}); " if method else "; "
    command = request.family.conversions.get(method)
    if command is None:
        return text + "use an unquantized checkpoint"
    source, target = shlex.quote(str(directory)), shlex.quote(f"{directory}-bf16")
    return f"{text}convert it first:\n  {command.format(source=source, target=target)}\nthen --weights {target}"


def _why_unread(quantized: Any, methods: Mapping[str, QuantizationSpec]) -> str:
    try:
        read_quantization(quantized, methods)
    except ValueError as error:
        return str(error)
    return ""


def _how_to_get_weights(request: Request) -> str:
    variant, family = request.variant, request.family
    lines = [
        f"{request.model} needs weights: --weights DIR, a directory with config.json, *.safetensors and tokenizer.json"
    ]
    if variant.huggingface or variant.modelscope:
        either = "; --source modelscope takes ModelScope" if variant.huggingface and variant.modelscope else ""
        lines.append(f"download them: npu-zoo pull {request.model} --to DIR{either}")
    demo = next((v.name for v in family.variants if v.bundled), None)
    if demo:
        lines.append(f"--model {family.name}:{demo} runs without weights")
    return "\n".join(lines)
