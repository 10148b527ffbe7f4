"""Ids of HTTP requests: the client's, or made ones."""

from __future__ import annotations

import re
import uuid

REQUEST_ID_HEADER = "X-Request-Id"
"""Taken from a request where it is fit, and part of every answer."""

MAX_REQUEST_ID_LENGTH = 128

_FIT = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._:=+/@-]{{0,{MAX_REQUEST_ID_LENGTH - 1}}}")


def request_id(given: str | None) -> str:
    """The id of an HTTP request: the header's value if it is fit for logs and headers, otherwise a new one.

    Fit is a letter or digit and up to 127 letters, digits and ``._:=+/@-``. Clients may use an id twice, so nothing may
    be kept under it.
    """
    return given if given is not None and _FIT.fullmatch(given) else uuid.uuid4().hex
