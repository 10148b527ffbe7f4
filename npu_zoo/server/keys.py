"""API keys: who may send requests."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from npu_zoo.core.errors import ConfigError
from npu_zoo.protocol.errors import ApiError

API_KEY_VARIABLE = "NPU_ZOO_API_KEY"
_SHOWN = 8  # hexadecimal digits of a key's digest that stand for it


class ApiKeys:
    """The keys that are accepted; none means that everybody is served.

    Args:
        keys: as their owners send them.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    @classmethod
    def load(cls, file: Path | None, environ: Mapping[str, str]) -> ApiKeys:
        """From a file with a key a line (``#`` begins a remark), and from the environment.

        Raises:
            ConfigError: the file cannot be read or holds no key, or a key cannot stand in a header.
        """
        own = environ.get(API_KEY_VARIABLE, "").strip()
        _require_sendable(own, API_KEY_VARIABLE)
        return cls([*(_read(file) if file else ()), *([own] if own else ())])

    def check(self, authorization: str | None) -> str | None:
        """The owner of a request: a short digest of its key; None where no keys are asked for.

        Every key is compared, each in constant time, so that an answer's time says nothing of them.

        Raises:
            ApiError: 401, the header is missing or holds no key that is accepted.
        """
        if not self._digests:
            return None
        scheme, _, given = (authorization or "").partition(" ")
        digest = _digest(given.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            problem = "is missing" if not authorization else "is not accepted"
            raise ApiError(
                401,
                f"the API key {problem}; send it as 'Authorization: Bearer KEY'",
                type="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return digest.hex()[:_SHOWN]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _read(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read the API keys in {file}: {reason}") from error
    stripped = [line.strip() for line in lines]
    keys = {number: line for number, line in enumerate(stripped, 1) if line and not line.startswith("#")}
    if not keys:
        raise ConfigError(f"{file} holds no API key; write one a line")
    for number, key in keys.items():
        _require_sendable(key, f"line {number} of {file}")
    return list(keys.values())


def _require_sendable(key: str, where: str) -> None:
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"the API key in {where} cannot stand in a header; use printable ASCII alone")
