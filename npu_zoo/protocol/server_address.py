"""Where a server of OpenAI's API is, as a command line is told it, and the key that goes there."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from npu_zoo.core.errors import ConfigError


@dataclass(frozen=True)
class ServerAddress:
    """A server's address.

    Attributes:
        url: without a slash or ``/v1`` at its end.
        host: name and port.
        loopback: whether it is this machine.
        encrypted: whether others can not listen.
    """

    url: str
    host: str
    loopback: bool
    encrypted: bool

    @classmethod
    def parse(cls, text: str, option: str) -> ServerAddress:
        """Read a URL such as ``http://localhost:8000``; ``/v1`` at its end makes no difference.

        Args:
            text: the URL; without a scheme it is http.
            option: of the command line, named in errors.

        Raises:
            ConfigError: it is no URL of a server.
        """
        parts = _parsed(text, option)
        url = parts.geturl().rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(url, parts.netloc, _is_loopback(parts.hostname), parts.scheme == "https")

    @property
    def api(self) -> str:
        """The URL that OpenAI's routes are below."""
        return f"{self.url}/v1"


def bearer(api_key: str) -> str:
    """The Authorization header of a key.

    Raises:
        ConfigError: the key cannot stand in a header.
    """
    key = api_key.strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError("the API key holds characters that no key has; was the right variable named?")
    return f"Bearer {key}"


def _parsed(url: str, option: str) -> SplitResult:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port_is_fine = parts.port is None or parts.port
    except ValueError:
        parts, port_is_fine = SplitResult("", "", "", "", ""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_fine:
        raise ConfigError(f"{option} {url!r} is no URL of a server, such as http://localhost:8000")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(f"{option} takes host, port and path alone; a key goes into NPU_ZOO_API_KEY")
    return parts


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
