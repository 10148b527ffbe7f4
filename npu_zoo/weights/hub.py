"""The sources of checkpoints, Hugging Face and ModelScope: their addresses, their tokens, what a repository holds."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from npu_zoo.core.errors import UsageError, WeightsError, validation_lines
from npu_zoo.weights.http_client import HttpClient, StatusError
from npu_zoo.weights.remote_files import Listing, RemoteFile

MAX_PAGES = 1000

Sha256Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Sha1Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Parsed = TypeVar("Parsed")


class Hub(ABC):
    """One source of checkpoints: its addresses, its token and its way to list files."""

    name: str
    title: str
    default_revision: str
    token_help: str

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ

    @property
    @abstractmethod
    def endpoint(self) -> str:
        """The address that everything else begins with, without a slash at its end."""

    @abstractmethod
    def headers(self) -> dict[str, str]:
        """What carries the user's token; empty where there is none."""

    @abstractmethod
    def listing(self, client: HttpClient, repository: str, revision: str) -> Listing:
        """Every file of a repository at a revision; see :func:`list_files`."""

    def refusal(self, error: StatusError, repository: str, what: str) -> WeightsError:
        """What to tell the user of a status; ``what`` is the revision or file that was asked for."""
        said = f" ({error.message})" if error.message else ""
        place = f"{repository} on {self.title}"
        if error.status in (401, 403):
            return WeightsError(
                f"{self.title} refuses {what} of {repository}: HTTP {error.status}{said}. Either there is no such "
                f"repository, or it wants a token or its licence accepted on {self.endpoint}/{repository} first; "
                f"{self.token_help}"
            )
        if error.status == 404:
            return WeightsError(f"there is no {what} of {place}: HTTP 404{said}; see {self.endpoint} for what there is")
        return WeightsError(f"{what} of {place} cannot be downloaded: {error}")


class _Lfs(BaseModel):
    oid: Sha256Hex
    size: Bytes


class _TreeEntry(BaseModel):
    type: str
    path: str
    size: Bytes = 0
    oid: Sha1Hex | None = None
    lfs: _Lfs | None = None


class _Commit(BaseModel):
    sha: Sha1Hex


class HuggingFace(Hub):
    """huggingface.co, or the mirror that HF_ENDPOINT names."""

    name = "huggingface"
    title = "Hugging Face"
    default_revision = "main"
    token_help = "set HF_TOKEN, or log in with `hf auth login`"

    @property
    def endpoint(self) -> str:
        """HF_ENDPOINT, or the public site."""
        return _address(self.environ.get("HF_ENDPOINT", ""), "https://huggingface.co")

    def headers(self) -> dict[str, str]:
        """The token of HF_TOKEN, or of the file that a login leaves."""
        token = self.environ.get("HF_TOKEN") or self.environ.get("HUGGING_FACE_HUB_TOKEN") or _read_token(self.environ)
        return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}

    def listing(self, client: HttpClient, repository: str, revision: str) -> Listing:
        """The revision's commit, then the tree of that commit, page by page."""
        base = f"{self.endpoint}/api/models/{quote(repository)}"
        answer, _ = client.get_json(f"{base}/revision/{quote(revision, safe='')}")
        commit = _parsed(TypeAdapter(_Commit), answer, self, repository).sha
        adapter: TypeAdapter[list[_TreeEntry]] = TypeAdapter(list[_TreeEntry])
        pages = self._pages(client, f"{base}/tree/{commit}", repository)
        entries = [entry for page in pages for entry in _parsed(adapter, page, self, repository)]
        files = [self._file(entry, repository, commit) for entry in entries if entry.type == "file"]
        return Listing(self.name, self.title, repository, revision, commit, tuple(files))

    def _pages(self, client: HttpClient, tree: str, repository: str) -> Iterable[Any]:
        query = "recursive=true"
        for _ in range(MAX_PAGES):
            page, headers = client.get_json(f"{tree}?{query}")
            yield page
            following = re.search(r'<([^>]*)>;\s*rel="?next', str(headers.get("Link", "")))
            if not following:
                return
            # A mirror passes the hub's own address on: only where to go on from is taken.
            query = urlsplit(following[1]).query
        raise WeightsError(f"{repository} on {self.title} lists its files on more than {MAX_PAGES} pages")

    def _file(self, entry: _TreeEntry, repository: str, commit: str) -> RemoteFile:
        url = f"{self.endpoint}/{quote(repository)}/resolve/{commit}/{quote(entry.path)}"
        if entry.lfs:  # the entry's oid names the pointer then, not the content
            return RemoteFile(entry.path, entry.lfs.size, entry.lfs.oid, None, url)
        return RemoteFile(entry.path, entry.size, None, entry.oid, url)


class _ScopeFile(BaseModel):
    Type: str
    Path: str
    Size: Bytes = 0
    Sha256: str | None = None
    Mode: str = ""


class _ScopeData(BaseModel):
    Files: list[_ScopeFile]


class _ScopeAnswer(BaseModel):
    Data: _ScopeData


class ModelScope(Hub):
    """modelscope.cn, or what MODELSCOPE_ENDPOINT names."""

    name = "modelscope"
    title = "ModelScope"
    default_revision = "master"
    token_help = "set MODELSCOPE_API_TOKEN"

    @property
    def endpoint(self) -> str:
        """MODELSCOPE_ENDPOINT, or the public site."""
        return _address(self.environ.get("MODELSCOPE_ENDPOINT", ""), "https://modelscope.cn")

    def headers(self) -> dict[str, str]:
        """The token of MODELSCOPE_API_TOKEN, as older and newer endpoints of the site read it."""
        token = self.environ.get("MODELSCOPE_API_TOKEN", "").strip()
        return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}

    def listing(self, client: HttpClient, repository: str, revision: str) -> Listing:
        """All files of a branch or tag; the site names no commit for it."""
        base = f"{self.endpoint}/api/v1/models/{quote(repository)}/repo"
        answer, _ = client.get_json(f"{base}/files?{urlencode({'Revision': revision, 'Recursive': 'true'})}")
        if isinstance(answer, dict) and answer.get("Success") is False:
            raise WeightsError(f"{self.title} refuses to list {repository}: {_said(answer)}")
        entries = _parsed(TypeAdapter(_ScopeAnswer), answer, self, repository).Data.Files
        files = [self._file(entry, f"{base}?", revision) for entry in entries if entry.Type != "tree"]
        return Listing(self.name, self.title, repository, revision, "", tuple(files))

    def _file(self, entry: _ScopeFile, base: str, revision: str) -> RemoteFile:
        digest = (entry.Sha256 or "").lower()
        sha256 = digest if re.fullmatch(r"[0-9a-f]{64}", digest) else None
        url = base + urlencode({"Revision": revision, "FilePath": entry.Path})
        link = entry.Mode in ("120000", "40960")  # git's mode of a link, in octal and in decimal
        return RemoteFile(entry.Path, entry.Size, sha256, None, url, link)


_HUBS: dict[str, type[Hub]] = {hub.name: hub for hub in (HuggingFace, ModelScope)}
SOURCES = tuple(_HUBS)


def open_hub(source: str, environ: Mapping[str, str] | None = None) -> Hub:
    """The hub of a source's name, as the environment configures it.

    Raises:
        UsageError: there is no such source, or HF_HUB_OFFLINE forbids downloads.
    """
    environ = os.environ if environ is None else environ
    if source not in _HUBS:
        raise UsageError(f"unknown source '{source}'; sources: {', '.join(_HUBS)}")
    if source == HuggingFace.name and environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UsageError("HF_HUB_OFFLINE is set, which forbids downloads from Hugging Face; unset it")
    return _HUBS[source](environ)


def list_files(source: str, repository: str, revision: str | None = None, client: HttpClient | None = None) -> Listing:
    """Every file of a repository at a revision, None being the source's default.

    Raises:
        UsageError: there is no such source.
        WeightsError: no such repository or revision, no access, no connection, or an answer that is not understood.
    """
    hub = open_hub(source)
    revision = revision or hub.default_revision
    try:
        listing = hub.listing(client or HttpClient(hub.headers()), repository, revision)
    except StatusError as error:
        raise hub.refusal(error, repository, f"revision {revision}") from error
    path, times = next(iter(Counter(file.path for file in listing.files).most_common(1)), ("", 0))
    if times > 1:
        raise WeightsError(f"{hub.title} lists {path!r} of {repository} {times} times; nothing was written")
    return listing


def _parsed(adapter: TypeAdapter[Parsed], answer: Any, hub: Hub, repository: str) -> Parsed:
    try:
        return adapter.validate_python(answer)
    except ValidationError as error:
        fault = validation_lines(error)[0]
        raise WeightsError(f"{hub.endpoint} lists {repository} in a form that is not understood: {fault}") from error


def _said(answer: dict[str, Any]) -> str:
    return str(answer.get("Message") or answer.get("Code"))[:300]


def _address(value: str, default: str) -> str:
    address = value.strip() or default
    address = address if "://" in address else f"https://{address}"
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise UsageError(f"the endpoint {value!r} is no address of a hub; write it like {default}")
    return address.rstrip("/")


def _read_token(environ: Mapping[str, str]) -> str:
    """The token of the file that Hugging Face's own tools keep it in; empty where there is none."""
    if environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in ("1", "ON", "YES", "TRUE"):
        return ""
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    path = Path(os.path.expandvars(environ.get("HF_TOKEN_PATH") or f"{home}/token")).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
