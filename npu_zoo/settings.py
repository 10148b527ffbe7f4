"""Configuration by layers: defaults < file < environment < options. Nothing here imports torch.

A file is YAML, JSON or TOML by its suffix. Its keys are the field names of :class:`EngineArgs`, ``tp``, ``pp``,
``ep`` and ``dp`` for the parallel sizes, and a table ``sampling`` with the names of :class:`SamplingParams`. The
environment has ``NPU_ZOO_<KEY>`` and ``NPU_ZOO_SAMPLING_<NAME>``. An unknown key is refused with the nearest known
one. Relative paths are relative to the working directory, whatever layer they come from.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import json
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import ConfigError, UsageError, validation_message
from npu_zoo.core.sampling import SamplingParams, StructuredOutputs

PREFIX = "NPU_ZOO_"
SAMPLING_PREFIX = PREFIX + "SAMPLING_"
PROCESS_VARIABLES: dict[str, str] = {
    "NPU_ZOO_CONFIG": "a configuration file, where --config names none",
    "NPU_ZOO_PLUGINS": "which installed plugins to load; unset: all, empty: the built-in ones",
    "NPU_ZOO_SIMULATE": "a simulated Ascend device under torch_npu",
    "NPU_ZOO_SIMULATE_DEVICES": "how many devices it shows",
    "NPU_ZOO_SIMULATE_MEMORY_GIB": "the memory of each of them",
    "NPU_ZOO_SIMULATE_REPORT": "what was done on it: a JSON file to write, or - for a table on standard error",
    "NPU_ZOO_API_KEY": "an API key, which `npu-zoo serve` asks for and `npu-zoo chat --server` sends",
    "NPU_ZOO_TEST_DATA": "test data that is not part of the repository",
}
"""Variables with the prefix that are the process's own and no configuration keys."""

ALIASES: dict[str, str] = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "ep": "expert_parallel_size",
    "dp": "data_parallel_size",
}
"""Short spellings of keys, in a file and in the environment."""

SAMPLING_TABLE = "sampling"
_OF_ONE_REQUEST = ("logit_bias", "structured_outputs", "prompt_logprobs_start", "prompt_logits")
SAMPLING_FIELDS: tuple[str, ...] = tuple(
    f.name for f in dataclasses.fields(SamplingParams) if f.name not in _OF_ONE_REQUEST
)
"""What is a setting; the rest makes sense for a single request alone."""

_SHORT = {name: alias for alias, name in ALIASES.items()}


@dataclass(frozen=True)
class Settings:
    """What all layers together ask for.

    Attributes:
        args: the engine's part; unset fields are None.
        sampling: the sampling parameters that a layer sets, under SamplingParams' names.
        origins: where each EngineArgs field (and each ``sampling.NAME`` that is set) comes from: ``default``,
            ``file PATH``, ``environment VARIABLE`` or ``option --NAME``.
    """

    args: EngineArgs
    sampling: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    def sampling_params(self, **defaults: Any) -> SamplingParams:
        """The sampling parameters over a command's own defaults.

        Raises:
            ConfigError: a value is out of its range; names where each comes from that is not a default.
        """
        try:
            return SamplingParams(**{**defaults, **self.sampling})
        except UsageError as error:
            named = [name for name in self.sampling if f"{name}=" in str(error) or f"{name} holds" in str(error)]
            origins = ", ".join(f"{name} from {self.origins['sampling.' + name]}" for name in named)
            raise ConfigError(f"{error}" + (f" ({origins})" if origins else "")) from error


@dataclass(frozen=True)
class _Entry:
    """One value of one layer."""

    key: str
    value: Any
    origin: str
    strict: bool


def load_settings(flags: Mapping[str, Any], config_file: Path | None, environ: Mapping[str, str]) -> Settings:
    """Merge the layers.

    Args:
        flags: options by EngineArgs field name, and a mapping under ``sampling``; None is unset.
        config_file: the file of ``--config``; where it is None, ``NPU_ZOO_CONFIG`` of ``environ`` names one.
        environ: the environment; an empty variable counts as unset.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, or a value has the wrong type.
    """
    named = environ.get("NPU_ZOO_CONFIG")
    path = config_file or (Path(named) if named else None)
    entries = [*(_file_entries(path) if path else ()), *_environment_entries(environ), *_flag_entries(flags)]
    values: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    origins = dict.fromkeys(EngineArgs.model_fields, "default")
    for entry in entries:
        value = _checked(entry)
        if entry.key.startswith("sampling."):
            sampling[entry.key.removeprefix("sampling.")] = value
        else:
            values[entry.key] = value
        origins[entry.key] = entry.origin
    return Settings(EngineArgs(**values), sampling, origins)


def engine_args(values: Mapping[str, Any]) -> EngineArgs:
    """EngineArgs from keyword arguments; ``tp``, ``pp``, ``ep`` and ``dp`` are taken too.

    Raises:
        ConfigError: a name is unknown (with the nearest one) or a value has the wrong type.
    """
    entries = [
        _Entry(key, str(value) if isinstance(value, Path) else value, "argument", strict=True)
        for key, value in _spelt_out(values, "the arguments", EngineArgs.model_fields).items()
        if value is not None
    ]
    return EngineArgs(**{entry.key: _checked(entry) for entry in entries})


def option_name(key: str) -> str:
    """The option that sets a field: ``--tp`` for tensor_parallel_size, ``--max-tokens`` for sampling.max_tokens."""
    if key == "seed":
        return "--engine-seed"
    name = key.removeprefix("sampling.")
    return "--" + _SHORT.get(name, name).replace("_", "-")


def _flag_entries(flags: Mapping[str, Any]) -> list[_Entry]:
    keys = {key: value for key, value in flags.items() if key != SAMPLING_TABLE}
    keys = _spelt_out(keys, "the options", EngineArgs.model_fields)
    sampling = _spelt_out(flags.get(SAMPLING_TABLE) or {}, "the sampling options", SAMPLING_FIELDS)
    keys.update({f"sampling.{name}": value for name, value in sampling.items()})
    return [
        _Entry(key, value, f"option {option_name(key)}", strict=True)
        for key, value in keys.items()
        if value is not None
    ]


def _environment_entries(environ: Mapping[str, str]) -> list[_Entry]:
    entries = []
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable in PROCESS_VARIABLES:
            continue
        key = _environment_key(variable)
        if environ[variable].strip():
            entries.append(_Entry(key, environ[variable].strip(), f"environment {variable}", strict=False))
    return entries


def _environment_key(variable: str) -> str:
    known = {PREFIX + name.upper(): name for name in (*EngineArgs.model_fields, *ALIASES)}
    known.update({SAMPLING_PREFIX + name.upper(): f"sampling.{name}" for name in SAMPLING_FIELDS})
    if variable not in known:
        raise ConfigError(
            f"the environment variable {variable} is no setting; unset it, or see `npu-zoo config show` for the "
            f"settings{nearest_known(variable, (*known, *PROCESS_VARIABLES))}"
        )
    return ALIASES.get(known[variable], known[variable])


def _file_entries(path: Path) -> list[_Entry]:
    table = _read(path)
    sampling = table.pop(SAMPLING_TABLE, None) or {}
    if not isinstance(sampling, Mapping):
        raise ConfigError(f"{path}: sampling is no table of sampling parameters but {sampling!r}")
    values = _spelt_out(table, str(path), (*EngineArgs.model_fields, SAMPLING_TABLE))
    entries = [_Entry(key, value, f"file {path}", strict=True) for key, value in values.items() if value is not None]
    names = _spelt_out(sampling, f"{path}, table sampling", SAMPLING_FIELDS)
    return entries + [_Entry(f"sampling.{name}", value, f"file {path}", strict=True) for name, value in names.items()]


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        table = _parse(path, text)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} cannot be parsed: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise ConfigError(f"{path} holds no table of keys and values at its top level")
    return table


def _parse(path: Path, text: str) -> Any:
    """The file's content; ValueError where it has the wrong form."""
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".toml":
        toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        return toml.loads(text)
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from error
    raise ConfigError(f"{path}: a configuration file ends in .yaml, .yml, .json or .toml")


def _spelt_out(values: Mapping[str, Any], where: str, known: Iterable[str]) -> dict[str, Any]:
    """The values with every alias replaced; ConfigError for a key that is unknown or given twice."""
    names = tuple(known)
    aliases = {alias: name for alias, name in ALIASES.items() if name in names}
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = aliases.get(key, key)
        if name not in names:
            raise ConfigError(f"unknown key '{key}' in {where}{nearest_known(key, (*names, *aliases))}")
        if name in found:
            raise ConfigError(f"{where} has both {_SHORT[name]} and {name}; keep one")
        found[name] = value
    return found


def nearest_known(key: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown key: the nearest known one, or all of them."""
    names = tuple(known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names)}"


def _checked(entry: _Entry) -> Any:
    """The value in its type. Text from the environment is converted; elsewhere ``"4"`` is no number."""
    value = entry.value
    if not entry.strict and entry.key in _LISTS:
        value = _LISTS[entry.key](value)
    name = entry.key.removeprefix("sampling.")
    try:
        if name != entry.key:
            return _sampling_type(name).validate_python(value, strict=entry.strict)
        return getattr(EngineArgs.model_validate({name: value}, strict=entry.strict), name)
    except ValidationError as error:
        wanted = validation_message(error.errors()[0])
        raise ConfigError(f"{entry.key}={value!r} ({entry.origin}): {wanted}") from None


def request_sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters of a single request, as JSON has them, in their types.

    Args:
        values: under SamplingParams' names, which are known.

    Raises:
        UsageError: a value has the wrong type, or ``structured_outputs`` an unknown key.
    """
    return {name: _request_value(name, value) for name, value in values.items()}


def _request_value(name: str, value: Any) -> Any:
    if name == "structured_outputs" and value is not None:
        return _structured_outputs(value)
    try:
        # Keys of a JSON object are texts, those of logit_bias are token ids.
        return _sampling_type(name).validate_python(value, strict=name != "logit_bias")
    except ValidationError as error:
        raise ConfigError(f"{name}={value!r}: {validation_message(error.errors()[0])}") from None


def _structured_outputs(value: Any) -> StructuredOutputs:
    if not isinstance(value, Mapping):
        raise ConfigError(f"structured_outputs={value!r} is no object, such as " + '{"regex": "[0-9]+"}')
    known = [f.name for f in dataclasses.fields(StructuredOutputs)]
    for key in value:
        if key not in known:
            raise ConfigError(f"unknown key '{key}' in structured_outputs{nearest_known(key, known)}")
    schema = value.get("json")
    texts = {"json": json.dumps(schema)} if isinstance(schema, (dict, bool)) else {}
    return StructuredOutputs(**{**value, **texts})


@functools.cache
def _sampling_type(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(typing.get_type_hints(SamplingParams)[name])


def _texts(text: str) -> Any:
    """One string, or several as a JSON list."""
    try:
        return json.loads(text) if text.startswith("[") else [text]
    except ValueError:
        return [text]


def _numbers(text: str) -> list[str]:
    return [part.strip() for part in text.strip("[]").split(",")]


_LISTS = {"sampling.stop": _texts, "sampling.stop_token_ids": _numbers}
