"""HTTP as a download needs it: tokens stay with their host, and failures are of two kinds.

A :class:`TransientError` may pass when it is tried again, and :class:`Backoff` waits for it. A :class:`StatusError` is
the server's last word. The standard library's client is enough for both, and honours HTTPS_PROXY and NO_PROXY.
"""

from __future__ import annotations

import datetime
import email.utils
import http.client
import json
import re
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from email.message import Message
from typing import IO, Any, cast
from urllib.parse import urlsplit

from npu_zoo import __version__
from npu_zoo.core.errors import WeightsError

TIMEOUT_S = 30.0
"""How long a connection may stay silent."""

BACKOFF_S = 1.0
"""The first wait; it doubles with every failure in a row."""

MAX_BACKOFF_S = 30.0
MAX_RETRY_AFTER_S = 300.0
LISTING_TRIES = 4
FILE_TRIES = 10
MAX_JSON_BYTES = 64 * 1024 * 1024
CHUNK_BYTES = 256 * 1024

_TRANSIENT_STATUS = {408, 425, 429}
_SECRET_HEADERS = {"authorization", "cookie"}


class TransientError(Exception):
    """A failure that another try may not meet.

    Attributes:
        retry_after: seconds that the server asks to wait; None where it says nothing.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StatusError(Exception):
    """An answer that another try would not change.

    Attributes:
        status: the HTTP status.
        message: what the server says about it; may be empty.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}" + (f": {message}" if message else ""))
        self.status = status
        self.message = message


class Stopped(Exception):
    """The work was called off by another thread."""


class HttpClient:
    """Opens URLs, one try each, with headers that carry a token.

    Args:
        headers: sent with every request; those that carry a token do not follow a redirect to another host.
        stop: ends waits early.
    """

    def __init__(self, headers: Mapping[str, str], stop: threading.Event | None = None) -> None:
        self.stop = stop or threading.Event()
        self._headers = {"User-Agent": f"npu-zoo/{__version__}", "Accept-Encoding": "identity", **headers}
        self._opener = _build_opener()

    def open(self, url: str, headers: Mapping[str, str] | None = None) -> http.client.HTTPResponse:
        """The answer to a GET request, with its body still to be read.

        Raises:
            TransientError: no connection, a timeout, or a status that passes (429, 5xx).
            StatusError: any other status from 400 on.
            WeightsError: the server's certificate is not trusted.
        """
        request = urllib.request.Request(url, headers={**self._headers, **(headers or {})})
        try:
            return cast("http.client.HTTPResponse", self._opener.open(request, timeout=TIMEOUT_S))
        except urllib.error.HTTPError as error:
            with error:
                raise _status_error(error) from error
        except urllib.error.URLError as error:
            raise _connection_error(url, error.reason) from error
        except (OSError, http.client.HTTPException) as error:
            raise _connection_error(url, error) from error

    def get_json(self, url: str) -> tuple[Any, Message]:
        """A JSON document and the headers it came with; tries again after failures that may pass.

        Raises:
            StatusError: the server refuses.
            WeightsError: it cannot be reached, or what it sends is no JSON.
        """
        backoff = Backoff(self.stop, LISTING_TRIES)
        while True:
            try:
                with self.open(url) as response:
                    return _parse_json(url, b"".join(read_chunks(response, MAX_JSON_BYTES))), response.headers
            except TransientError as error:
                backoff.wait(error)


class Backoff:
    """Waits between failures in a row, twice as long each time, and gives up after some.

    Attributes:
        failures: how many there were in a row.

    Args:
        stop: ends a wait early.
        tries: how many failures in a row are one too many.
    """

    def __init__(self, stop: threading.Event, tries: int) -> None:
        self.failures = 0
        self._stop = stop
        self._tries = tries

    def reset(self) -> None:
        """Forget earlier failures: there was progress."""
        self.failures = 0

    def wait(self, error: TransientError) -> None:
        """Wait as long as is due after a failure.

        Raises:
            WeightsError: there were too many in a row, or the server asks for a longer wait than is reasonable.
            Stopped: the work was called off meanwhile.
        """
        self.failures += 1
        if self.failures >= self._tries:
            raise WeightsError(f"{error}; gave up after {self.failures} tries in a row") from error
        delay = min(BACKOFF_S * 2 ** (self.failures - 1), MAX_BACKOFF_S)
        asked = error.retry_after or 0.0
        if asked > MAX_RETRY_AFTER_S:
            raise WeightsError(f"{error}; the server asks to wait {asked:.0f} s, try again then") from error
        if self._stop.wait(max(delay, asked)):
            raise Stopped


def read_chunks(response: http.client.HTTPResponse, limit: int | None = None) -> Iterator[bytes]:
    """A body in pieces, as they come; it ends early without an error where a connection with a known length is cut.

    Raises:
        TransientError: the connection broke or fell silent.
        WeightsError: the body is longer than ``limit`` bytes.
    """
    seen = 0
    while True:
        try:
            chunk = response.read1(CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise _connection_error(response.url, error) from error
        if not chunk:
            return
        seen += len(chunk)
        if limit is not None and seen > limit:
            raise WeightsError(f"{_host(response.url)} sends more than {limit} bytes where a short answer is due")
        yield chunk


class _SameHostSecrets(urllib.request.HTTPRedirectHandler):
    """Follows redirects; what carries a token goes to the host it was meant for and to no other."""

    # urllib knows 308 from Python 3.11 on.
    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request:
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        if after.scheme != "https" and after.scheme != before.scheme:
            fp.close()
            raise StatusError(code, f"a redirect from {before.scheme} to {after.scheme or 'nowhere'} is not followed")
        same = (before.scheme, before.netloc) == (after.scheme, after.netloc)
        kept = {name: value for name, value in req.headers.items() if same or name.lower() not in _SECRET_HEADERS}
        return urllib.request.Request(newurl.replace(" ", "%20"), headers=kept, unverifiable=True)


def _build_opener() -> urllib.request.OpenerDirector:
    # Not build_opener(): its file, ftp and data handlers have no place here.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _SameHostSecrets(),
    ):
        opener.add_handler(handler)
    return opener


def _parse_json(url: str, raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{_host(url)} does not answer with JSON; is it a hub, and not the page of a proxy?"
        ) from error


def _status_error(error: urllib.error.HTTPError) -> Exception:
    host = _host(error.url)
    if error.code in _TRANSIENT_STATUS or error.code >= 500:
        return TransientError(f"{host} answers HTTP {error.code} {error.reason}", _retry_after(error.headers))
    return StatusError(error.code, _server_message(error))


def _server_message(error: urllib.error.HTTPError) -> str:
    """What a hub says of a refusal: a header on Hugging Face, a member of the body on ModelScope."""
    header = error.headers.get("X-Error-Message", "")
    if header:
        return " ".join(header.split())[:300]
    try:
        body = json.loads(error.read(65536))
    except (OSError, http.client.HTTPException, ValueError, RecursionError):
        return ""
    found = (body.get("Message") or body.get("error")) if isinstance(body, dict) else None
    return " ".join(found.split())[:300] if isinstance(found, str) else ""


def _retry_after(headers: Message) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date, or from Hugging Face's RateLimit."""
    reset = re.search(r";\s*r=0\s*;\s*t=(\d{1,9})", str(headers.get("RateLimit", "")))
    value = str(headers.get("Retry-After", "")).strip() or (reset[1] if reset else "")
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    now = datetime.datetime.now(datetime.timezone.utc)
    return max(0.0, (date.replace(tzinfo=date.tzinfo or datetime.timezone.utc) - now).total_seconds())


def _connection_error(url: str, reason: object) -> Exception:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return WeightsError(
            f"the certificate of {_host(url)} is not trusted: {reason.verify_message}; name the certificates to trust "
            "in SSL_CERT_FILE, if a proxy of yours has its own"
        )
    return TransientError(f"the connection to {_host(url)} failed: {reason or type(reason).__name__}")


def _host(url: str) -> str:
    # Never the whole URL: a redirect's query is a key to the file.
    return urlsplit(url).netloc.rpartition("@")[2] or url
