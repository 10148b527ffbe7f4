"""Options that several commands share, each declared once: help texts come from EngineArgs' fields."""

from __future__ import annotations

import functools
import inspect
import os
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import UsageError, validation_lines
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.settings import ALIASES, SAMPLING_FIELDS, SAMPLING_TABLE, load_settings, option_name

REQUEST_FIELDS = (
    "model",
    "weights",
    "hardware",
    "dtype",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "expert_parallel_size",
    "data_parallel_size",
    "world_size",
    "attention",
    "quantization",
    "kv_cache_dtype",
    "serving",
    "engine",
    "allow_experimental",
)
"""What names a request: the model, where it runs and the matrix axes."""

ENGINE_FIELDS = tuple(name for name in EngineArgs.model_fields if name not in REQUEST_FIELDS)
"""How the engine serves it."""

_METAVARS = {
    "model": "FAMILY[:VARIANT]",
    "weights": "DIR",
    "attention": "paged|flash",
    "bind": "auto|none|MAP",
    "expert_dispatch": "auto|all_gather|all_to_all",
    "packed_weights": "auto|keep|off",
    "collective_timeout": "SECONDS",
    "speculative_method": "none|prompt_lookup|mtp",
    "kv_cache_memory": "SIZE",
    "kv_cache_fraction": "SHARE",
    "stop_token_ids": "ID,…",
}
_FIELD_METAVARS = {
    "host": "ADDRESS",
    "port": "PORT",
    "api_key_file": "FILE",
    "allowed_host": "HOST",
    "cors_origin": "ORIGIN",
    "ssl_certfile": "FILE",
    "ssl_keyfile": "FILE",
    "ssl_ca_certs": "FILE",
    "max_body_size": "BYTES",
    "request_timeout": "SECONDS",
    "head_timeout": "SECONDS",
    "body_timeout": "SECONDS",
    "keep_alive": "SECONDS",
    "grace": "SECONDS",
    "log_format": "text|json",
    "log_file": "FILE",
    "log_level": "debug|info|warning|error",
    "otlp_endpoint": "URL",
}
_LONG = {name: "--" + name.replace("_", "-") for name in ALIASES.values()}

SAMPLING_HELP = {
    "n": "Completions per prompt.",
    "temperature": "Randomness of the choice; 0 takes the most likely token.",
    "top_p": "Keep the most likely tokens up to this total probability.",
    "top_k": "Keep this many most likely tokens; 0 keeps all.",
    "min_p": "Keep tokens of at least this share of the best one's probability.",
    "repetition_penalty": "Above 1 disfavours tokens of the prompt and the output.",
    "presence_penalty": "Above 0 disfavours tokens that are in the output.",
    "frequency_penalty": "The same, growing with every occurrence.",
    "seed": "Seed of every request's draws.",
    "stop": "Text that ends the output; repeatable.",
    "stop_token_ids": "Token ids that end the output.",
    "max_tokens": "Longest output, in tokens.",
    "min_tokens": "Shortest output, in tokens.",
    "ignore_eos": "Go on after end of text.",
    "logprobs": "Most likely tokens to report per position (with --json).",
    "prompt_logprobs": "The same for the prompt's tokens (with --json).",
    "skip_special_tokens": "Leave special tokens out of the text.",
    "include_stop_str_in_output": "Keep the stop string in the text.",
}

Command = Callable[..., None]
JsonFlag = typing.Annotated[bool, typer.Option("--json", help="Write JSON.")]


def request_options(
    *, engine: bool = False, sampling: Mapping[str, Any] | None = None, without: Collection[str] = ()
) -> Callable[[Command], Command]:
    """Give a command the options that name a request, and pass what all layers make of them as ``settings``.

    Args:
        engine: add the engine's options too.
        sampling: add the sampling options too; the command's own defaults, for the help texts.
        without: sampling options that make no sense for the command.
    """
    added = [_config_parameter(), *map(_engine_parameter, (*REQUEST_FIELDS, *(ENGINE_FIELDS if engine else ())))]
    if sampling is not None:
        added += [_sampling_parameter(name, sampling) for name in SAMPLING_FIELDS if name not in without]

    def decorate(function: Command) -> Command:
        own = inspect.signature(function, eval_str=True).parameters.values()
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.name != "settings"] + added

        @functools.wraps(function)
        def command(**values: Any) -> None:
            config_file = values.pop("config_file")
            flags = {p.name: values.pop(p.name) for p in added if p.name in values}
            function(settings=load_settings(_layer(flags), config_file, os.environ), **values)

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def model_options(model: type[BaseModel], name: str, panel: str) -> Callable[[Command], Command]:
    """Give a command an option for each field of a pydantic model, and pass what they make as one argument.

    Args:
        model: its fields' descriptions are the help texts.
        name: of the argument.
    """
    added = [_field_parameter(field, info, panel) for field, info in model.model_fields.items()]

    def decorate(function: Command) -> Command:
        own = inspect.signature(function, eval_str=True).parameters.values()
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.name != name] + added

        @functools.wraps(function)
        def command(**values: Any) -> None:
            given = {p.name: values.pop(p.name) for p in added}
            try:
                built = model(**{field: value for field, value in given.items() if value not in (None, [], ())})
            except ValidationError as error:
                raise UsageError("; ".join(_as_options(error))) from None
            function(**{name: built}, **values)

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _as_options(error: ValidationError) -> list[str]:
    """What pydantic found wrong, fields as the options that set them."""
    fields = {str(fault["loc"][0]) for fault in error.errors() if fault["loc"]}
    lines = validation_lines(error)
    for field in fields:
        lines = [line.replace(f"{field}:", f"--{field.replace('_', '-')}:") for line in lines]
    return lines


def _field_parameter(name: str, info: FieldInfo, panel: str) -> inspect.Parameter:
    kind, several = _option_type(info.annotation)
    flag = "--" + name.replace("_", "-")
    shown = "" if several or info.default is None or kind is bool else f" Default: {info.default}."
    return _parameter(
        name,
        list[str] | None if several else kind | None,
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        help=(info.description or "") + shown,
        metavar=None if kind is bool else _FIELD_METAVARS.get(name) or _metavar(name, kind),
        rich_help_panel=panel,
    )


def _option_type(annotation: Any) -> tuple[type, bool]:
    """The type that the command line reads, and whether an option may be repeated."""
    members = [member for member in typing.get_args(annotation) if member is not type(None)]
    if typing.get_origin(annotation) is tuple:
        return str, True
    if annotation in (bool, int, float, str, Path):
        return annotation, False
    return (members[0], False) if len(members) == 1 and members[0] in (bool, int, float, Path) else (str, False)


def parse_ids(text: str, option: str) -> list[int]:
    """Token ids from ``1,2,3``; a usage error where it is anything else."""
    try:
        return [int(part) for part in text.replace(" ", "").strip(",").split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} takes token ids such as 1,2,3, not {text!r}") from None


def _layer(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a layer of the settings: unset ones left out, sampling in a table of its own."""
    layer: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    for name, value in flags.items():
        if name.startswith("sampling_"):
            sampling[name.removeprefix("sampling_")] = value or None if isinstance(value, list) else value
        else:
            layer[name] = value
    if sampling.get("stop_token_ids"):
        sampling["stop_token_ids"] = parse_ids(sampling["stop_token_ids"], "--stop-token-ids")
    return {**layer, SAMPLING_TABLE: sampling}


def _parameter(name: str, kind: Any, *flags: str, **option: Any) -> inspect.Parameter:
    default = typer.Option(None, *flags, **option)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _config_parameter() -> inspect.Parameter:
    text = "Settings in YAML, JSON or TOML; the environment (NPU_ZOO_*) and options go over it."
    return _parameter("config_file", Path | None, "--config", metavar="FILE", help=text, rich_help_panel="Request")


@functools.cache
def _sampling_types() -> dict[str, Any]:
    return typing.get_type_hints(SamplingParams)


@functools.cache
def _engine_parameter(name: str) -> inspect.Parameter:
    info = EngineArgs.model_fields[name]
    kind = _plain_type(info.annotation)
    flag = option_name(name)
    flags = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag, *([_LONG[name]] if name in _LONG else [])]
    return _parameter(
        name,
        kind | None,
        *flags,
        help=info.description,
        metavar=None if kind is bool else _metavar(name, kind),
        autocompletion=_COMPLETIONS.get(name),
        rich_help_panel="Request" if name in REQUEST_FIELDS else "Engine",
    )


def _sampling_parameter(name: str, defaults: Mapping[str, Any]) -> inspect.Parameter:
    kind = _plain_type(_sampling_types()[name])
    flag = option_name(f"sampling.{name}")
    default = defaults.get(name, getattr(SamplingParams, name))
    shown = "" if default is None or default == () or kind is bool else f" Default: {default:g}."
    return _parameter(
        f"sampling_{name}",
        list[str] | None if name == "stop" else kind | None,
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        help=SAMPLING_HELP[name] + shown,
        metavar=None if kind is bool else _metavar(name, kind),
        rich_help_panel="Sampling",
    )


def _plain_type(annotation: Any) -> Any:
    """bool, int or float where the annotation is that or None, and str for all the rest."""
    members = [member for member in typing.get_args(annotation) or (annotation,) if member is not type(None)]
    return members[0] if len(members) == 1 and members[0] in (bool, int, float) else str


def _metavar(name: str, kind: type) -> str:
    return _METAVARS.get(name) or {int: "N", float: "X"}.get(kind, "TEXT" if name == "stop" else "NAME")


def _starting_with(incomplete: str, names: typing.Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _complete_model(incomplete: str) -> list[str]:
    from npu_zoo.registry import get_registry

    families = get_registry().families.values()
    models = [f"{family.name}:{variant.name}" for family in families for variant in family.variants]
    return _starting_with(incomplete, [family.name for family in families] + models)


def _complete_engine(incomplete: str) -> list[str]:
    from npu_zoo.registry import get_registry

    return _starting_with(incomplete, get_registry().engines)


def _complete_hardware(incomplete: str) -> list[str]:
    from npu_zoo.core.hardware import PRODUCTS

    return _starting_with(incomplete, PRODUCTS)


def _complete_dtype(incomplete: str) -> list[str]:
    from npu_zoo.core.hardware import DTYPE_ALIASES, DTYPES

    return _starting_with(incomplete, (*DTYPES, *DTYPE_ALIASES))


_COMPLETIONS: dict[str, Callable[[str], list[str]]] = {
    "model": _complete_model,
    "engine": _complete_engine,
    "hardware": _complete_hardware,
    "dtype": _complete_dtype,
    "attention": lambda incomplete: _starting_with(incomplete, ("paged", "flash")),
    "speculative_method": lambda incomplete: _starting_with(incomplete, ("none", "prompt_lookup", "mtp")),
}
