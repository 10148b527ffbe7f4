"""What a checkpoint directory holds, without torch: its format, config.json and generation_config.json."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from npu_zoo.core.errors import NpuZooError, PluginError, WeightsError, validation_lines
from npu_zoo.core.quantization import QuantizationConfig
from npu_zoo.core.specs import QuantizationSpec, WeightFormatSpec
from npu_zoo.registry import load_code

MAX_CONFIG_BYTES = 8 * 1024 * 1024
_READ = (".json", ".jinja", ".model", ".tiktoken", ".txt")  # settings, chat templates, tokenizers
_BLOCK, _BLOCKS = 64 * 1024, 256
"""What is read of a file of tensors: so many bytes, so many times."""
_RANK = "rank_"
"""How directories begin that hold the files of one rank each."""


def detect_format(directory: str | Path, specs: Mapping[str, WeightFormatSpec]) -> WeightFormatSpec:
    """The registered format that a directory's checkpoint has; one that can be loaded wins over one that cannot.

    Raises:
        WeightsError: there is no such directory, it holds no checkpoint, or only one that must be converted first.
    """
    directory = Path(directory)
    names = _file_names(directory)
    found = [(spec, matches) for spec in specs.values() if (matches := _matches(names, spec.patterns))]
    for spec, _ in found:
        if spec.loadable:
            return spec
    if found:
        raise WeightsError(_must_convert(directory, *found[0]))
    looked = "; ".join(f"{', '.join(spec.patterns)} ({name})" for name, spec in specs.items())
    raise WeightsError(
        f"{directory} holds no checkpoint; looked for {looked or 'nothing, as no format is registered'}; "
        f"it has: {_some(names) or 'no files'}"
    )


def _file_names(directory: Path) -> list[str]:
    if not directory.exists():
        raise WeightsError(f"weights directory {directory} does not exist")
    if not directory.is_dir():
        raise WeightsError(f"{directory} is a file; name the directory that holds config.json and the weights")
    try:
        entries = list(directory.iterdir())
        ranks = (entry for entry in entries if entry.name.startswith(_RANK) and entry.is_dir())
        files = [entry.name for entry in entries if entry.is_file()]
        return sorted([*files, *(f"{rank.name}/{file.name}" for rank in ranks for file in rank.iterdir())])
    except OSError as error:
        raise WeightsError(f"cannot list {directory}: {error.strerror or error}") from error


def _matches(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    patterns = tuple(patterns)
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _must_convert(directory: Path, spec: WeightFormatSpec, files: list[str]) -> str:
    what = f"{directory} holds {_some(files)}: {spec.description or spec.name}, which no engine loads directly; "
    if spec.source is None:
        return what + f"see the plugin that registers {spec.name} for what converts it"
    return what + f"convert it first: npu-zoo convert {directory} {directory}-safetensors --to hf-safetensors"


def has_chat_template(directory: str | Path) -> bool:
    """Whether a checkpoint brings a chat template, in tokenizer_config.json or in a file of its own.

    Raises:
        WeightsError: tokenizer_config.json is too large, or no JSON object.
    """
    directory = Path(directory)
    if (directory / "chat_template.jinja").is_file() or (directory / "chat_template.json").is_file():
        return True
    return bool((_read_json(directory / "tokenizer_config.json") or {}).get("chat_template"))


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def read_config(directory: str | Path) -> dict[str, Any]:
    """A checkpoint's config.json; nothing but JSON is read.

    Raises:
        WeightsError: it is missing, too large, or no JSON object.
    """
    config = _read_json(Path(directory) / "config.json")
    if config is None:
        raise WeightsError(f"{directory} has no config.json; name a checkpoint directory in Hugging Face's layout")
    return config


def read_generation_config(directory: str | Path) -> dict[str, Any]:
    """A checkpoint's generation_config.json; empty where it has none.

    Raises:
        WeightsError: it is too large, or no JSON object.
    """
    return _read_json(Path(directory) / "generation_config.json") or {}


def quant_method_of(section: Any) -> str:
    """What config.json's ``quantization_config`` calls its method; empty where it does not say."""
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    return method if isinstance(method, str) else ""


def read_quantization(section: Any, methods: Mapping[str, QuantizationSpec]) -> QuantizationConfig:
    """How config.json's ``quantization_config`` says that linear layers are stored, by the reader of its method.

    Args:
        section: what config.json holds there.
        methods: what is registered; of several readers of a method the first that reads the section is taken.

    Raises:
        ValueError: nobody reads its method, or it says what its readers do not read; the message says what.
        PluginError: a reader is broken.
    """
    named = quant_method_of(section)
    readers = dict.fromkeys(spec.reader for spec in methods.values() if spec.quant_method == named)
    if not readers:
        raise ValueError(f"no plugin reads quant_method {named}" if named else "it names no quant_method")
    reasons = []
    for reader in readers:
        try:
            return _read_by(reader, section)
        except ValidationError as error:
            reasons.append("; ".join(validation_lines(error)))
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("; ".join(reasons))


def _read_by(reader: str, section: Any) -> QuantizationConfig:
    read = load_code(reader)
    try:
        found = read(section)
    except (ValueError, NpuZooError):
        raise
    except Exception as error:  # a plugin's own code
        raise PluginError(f"{reader} raised {type(error).__name__} on a quantization_config: {error}") from error
    if not isinstance(found, QuantizationConfig):
        raise PluginError(f"{reader} gave {type(found).__name__} where a QuantizationConfig is due")
    return found


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise WeightsError(f"{path} has more than {MAX_CONFIG_BYTES} bytes, which no configuration needs")
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a JSON {type(content).__name__}, an object is due")
    return content


def fingerprints(directory: Path) -> dict[str, str]:
    """What tells a checkpoint from another, by file name; files of ranks count, too.

    Settings, templates and tokenizers count by the SHA-256 of their contents. All other files, which may hold hundreds
    of gigabytes, count by that of their size and of a sample: the first and the last 64 KiB and 254 blocks evenly
    between them, which is all of a file of up to 16 MiB. Two states of one training differ nearly everywhere and are
    told apart; a change of a few values alone may not be.

    Raises:
        OSError: the directory or a file cannot be read.
    """
    files = [path for path in directory.iterdir() if path.is_file()]
    ranks = [path for path in directory.iterdir() if path.name.startswith(_RANK) and path.is_dir()]
    files += [path for rank in ranks for path in rank.iterdir() if path.is_file()]
    return {path.relative_to(directory).as_posix(): _fingerprint(path) for path in sorted(files)}


def _fingerprint(path: Path) -> str:
    if path.suffix in _READ:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(str(size).encode())
        for start in _sampled(size):
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _sampled(size: int) -> Iterator[int]:
    """Where the sampled blocks of a file begin, which lie on multiples of a block's size but for the last one."""
    if size <= _BLOCK * _BLOCKS:
        yield from range(0, size, _BLOCK)
        return
    last = size - _BLOCK
    for number in range(_BLOCKS - 1):
        yield last * number // (_BLOCKS - 1) // _BLOCK * _BLOCK
    yield last
