"""Reads a checkpoint's tokenizer files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_zoo.core.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tiktoken.model")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files say.

    Attributes:
        special_tokens: the named ones (``bos_token`` and the like) as text.
        additional: special tokens without a name.
        add_bos_token: what tokenizer_config.json asks for; None where it says nothing.
        chat_template: a Jinja template.
    """

    backend: Backend
    special_tokens: dict[str, str]
    additional: tuple[str, ...] = ()
    add_bos_token: bool | None = None
    chat_template: str | None = None


def read_tokenizer_files(directory: Path, trust_remote_code: bool) -> TokenizerFiles:
    """Load tokenizer.json as it is written, or else what AutoTokenizer makes of the directory.

    Raises:
        TokenizerError: there is nothing to load, or it cannot be loaded.
    """
    if not directory.is_dir():
        raise TokenizerError(f"{directory} is no directory, so there is no tokenizer in it")
    if not any((directory / name).is_file() for name in _FILES):
        raise TokenizerError(
            f"{directory} holds no tokenizer; looked for {', '.join(_FILES)}; "
            "copy the checkpoint's tokenizer files into it, or set skip_tokenizer_init and give token ids"
        )
    try:
        if (directory / "tokenizer.json").is_file():
            return _read_tokenizer_json(directory)
        return _read_with_transformers(directory, trust_remote_code)
    except TokenizerError:
        raise
    except ModuleNotFoundError as error:
        raise TokenizerError(
            f"the tokenizer in {directory} needs the package {error.name}, which is not installed; install it"
        ) from error
    # tokenizers raises a bare Exception, and transformers whatever the files make it raise.
    except Exception as error:
        raise TokenizerError(
            f"cannot load the tokenizer in {directory}: {type(error).__name__}: {error}\n"
            "a checkpoint brings tokenizer.json and tokenizer_config.json; download them again"
        ) from error


def _read_tokenizer_json(directory: Path) -> TokenizerFiles:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(directory / "tokenizer.json"))
    config = _read_object(directory / "tokenizer_config.json")
    names = _read_object(directory / "special_tokens_map.json") | config
    _add_tokens(backend, config.get("added_tokens_decoder") or {}, directory)
    special = {name: text for name in _NAMED if (text := _content(names.get(name))) is not None}
    for name in ("bos_token", "eos_token"):
        if name in special and backend.token_to_id(special[name]) is None:
            raise TokenizerError(f"tokenizer_config.json names {name} {special[name]!r}, which tokenizer.json lacks")
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    wanted = config.get("add_bos_token")
    return TokenizerFiles(
        backend,
        special,
        tuple(text for text in map(_content, more) if text is not None),
        wanted if isinstance(wanted, bool) else None,
        _chat_template(directory, config.get("chat_template")),
    )


def _read_with_transformers(directory: Path, trust_remote_code: bool) -> TokenizerFiles:
    from transformers.models.auto.tokenization_auto import AutoTokenizer
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    loaded: Any = AutoTokenizer.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=trust_remote_code
    )
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise TokenizerError(
            f"the tokenizer in {directory} is {type(loaded).__name__}, in plain Python; convert it to a tokenizer.json"
        )
    special = {name: str(value) for name in _NAMED if (value := getattr(loaded, name, None)) is not None}
    template = _chat_template(directory, loaded.chat_template)
    additional = tuple(map(str, loaded.all_special_tokens))
    return TokenizerFiles(loaded.backend_tokenizer, special, additional, loaded.add_bos_token, template)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds no JSON object")
    return content


def _content(token: Any) -> str | None:
    """A token's text; the files write it plainly or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def _add_tokens(backend: Backend, added: dict[str, Any], directory: Path) -> None:
    """Add what tokenizer_config.json lists beyond tokenizer.json, in the order of the ids."""
    from tokenizers import AddedToken

    for id_, token in sorted((int(id_), token) for id_, token in added.items()):
        if backend.token_to_id(token["content"]) is None:
            flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
            backend.add_tokens([AddedToken(token["content"], special=bool(token.get("special")), **flags)])
        if backend.token_to_id(token["content"]) != id_:
            raise TokenizerError(
                f"{directory}: tokenizer_config.json gives {token['content']!r} the id {id_}, "
                f"tokenizer.json {backend.token_to_id(token['content'])}"
            )


def _chat_template(directory: Path, configured: Any) -> str | None:
    """The template of chat_template.jinja, or else of tokenizer_config.json (the one named default of several)."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    if isinstance(configured, list):
        configured = {entry["name"]: entry["template"] for entry in configured}
    if isinstance(configured, dict):
        configured = configured.get("default")
    return configured if isinstance(configured, str) and configured else None
