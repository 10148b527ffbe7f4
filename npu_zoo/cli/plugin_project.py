"""Writes the project of a new plugin from the files in ``plugin_template``."""

from __future__ import annotations

import enum
import keyword
import re
import secrets
import shutil
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from npu_zoo import __version__
from npu_zoo.core.errors import UsageError
from npu_zoo.registry import Registry

LONGEST_NAME = 40
"""Lines of the project that hold the name twice stay within 120 columns."""

_TEMPLATE = Path(__file__).with_name("plugin_template")
_SUFFIX = ".tmpl"
_PACKAGE = "package"  # the folder that gets the package's name
_HIDDEN = "dot-"  # setuptools leaves out of the wheel what begins with a dot


class Architecture(str, enum.Enum):
    """What a new plugin's model is made of: a folder of the template beside the common one."""

    llama = "llama"
    moe = "moe"
    mla = "mla"


@dataclass(frozen=True)
class NewPlugin:
    """The names that follow from a family's."""

    name: str

    @property
    def distribution(self) -> str:
        """What pip installs."""
        return f"npu-zoo-{self.name.replace('_', '-')}"

    @property
    def package(self) -> str:
        """What Python imports."""
        return f"npu_zoo_{self.name}"

    @property
    def placeholders(self) -> dict[str, str]:
        """What stands for ``$name`` and the other placeholders of the template."""
        words = [word for word in self.name.split("_") if word]
        return {
            "name": self.name,
            "distribution": self.distribution,
            "package": self.package,
            "title": " ".join(word.capitalize() for word in words),
            "class_name": "".join(word.capitalize() for word in words) + "ForCausalLM",
            "version": __version__,
        }


def check_name(name: str, registry: Registry) -> None:
    """Refuse what cannot be a new family's name.

    Raises:
        UsageError: it is malformed, too long, a keyword of Python, or taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UsageError(f"'{name}' is no name of a family: lower-case letters, digits and _, a letter first")
    if len(name) > LONGEST_NAME:
        raise UsageError(f"'{name}' has {len(name)} characters; a family's name has {LONGEST_NAME} at most")
    if keyword.iskeyword(name):
        raise UsageError(f"'{name}' is a keyword of Python; choose another name")
    record = registry.plugins.get(name)
    if record is not None:
        raise UsageError(f"the name '{name}' is taken by the plugin of {record.distribution or record.target}")
    if name in registry.families:
        raise UsageError(f"the name '{name}' is taken by a family of the plugin {registry.owner(name)}")


def write_project(plugin: NewPlugin, architecture: Architecture, directory: Path) -> tuple[Path, ...]:
    """Write a project; it is there as a whole or not at all.

    Args:
        directory: does not exist yet, or is empty; the folder that it is to lie in exists.

    Returns:
        The files, relative to the directory.

    Raises:
        UsageError: something is in the way, or cannot be written.
    """
    target = directory.resolve()
    _check_target(target)
    # In the same folder, since a rename works within one file system only.
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        files = _write(plugin, architecture, scratch)
        scratch.rename(target)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return tuple(sorted(files))


def _check_target(target: Path) -> None:
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is no directory; make it first, or name another place with --to DIR")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} exists and is no directory; name another place with --to DIR")
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(f"{target} is not empty, and nothing is overwritten; name another place with --to DIR")
    if target == Path.cwd():  # it would be another directory afterwards, and this process's would be gone
        raise UsageError(f"{target} is the current directory; name one in it or beside it with --to DIR")


def _write(plugin: NewPlugin, architecture: Architecture, directory: Path) -> list[Path]:
    placeholders = plugin.placeholders
    written = []
    for path, text in _templates(architecture):
        file = Path(*(_written_name(part, plugin) for part in path.parts))
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_text(_filled(text, placeholders), encoding="utf-8")
        written.append(file)
    return written


def _written_name(part: str, plugin: NewPlugin) -> str:
    if part.startswith(_HIDDEN):
        return "." + part.removeprefix(_HIDDEN)
    return plugin.package if part == _PACKAGE else part


def _templates(architecture: Architecture) -> Iterator[tuple[Path, str]]:
    """The template's files, without its suffix, with their texts."""
    for folder in (_TEMPLATE / "common", _TEMPLATE / architecture.value):
        for path in folder.rglob(f"*{_SUFFIX}"):
            yield path.relative_to(folder).with_suffix(""), path.read_text(encoding="utf-8")


def _filled(text: str, placeholders: Mapping[str, str]) -> str:
    return string.Template(text).substitute(placeholders)
