"""Certificates that the openssl command makes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_REQUEST = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2", "-subj", "/CN=npu-zoo test")
_NAMES = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"


def make_certificate(folder: Path, name: str, password: str | None = None) -> tuple[Path, Path]:
    """A certificate that is its own authority, and its key; skips the test where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed")
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    secret = ["-nodes"] if password is None else ["-passout", f"pass:{password}"]
    command = ["openssl", "req", "-x509", *_REQUEST, "-addext", _NAMES, *secret]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return certificate, key
