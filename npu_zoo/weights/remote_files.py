"""The files of a repository, and which of them a checkpoint is made of."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from npu_zoo.core.errors import WeightsError

WORK_FOLDER = ".npu-zoo-pull"
"""Where a download keeps what is not finished, inside the checkpoint's directory."""

SAFETENSORS = ("*.safetensors",)


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository; what a server names is not trusted, and a path that leads elsewhere is refused.

    Attributes:
        path: relative, with slashes.
        size: in bytes.
        sha256: of the content; None where the source does not say.
        git_sha1: git's name of the content, which is the sha1 of ``blob``, its size, a zero byte and itself; None
            where the source does not say.
        url: where it is downloaded from.
        is_link: whether it is a symbolic link, which is never downloaded.

    Raises:
        WeightsError: the path is absolute, leaves the directory, or holds what no file's name should.
    """

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None
    url: str
    is_link: bool = False

    def __post_init__(self) -> None:
        parts = self.path.split("/")
        good = all(part not in ("", ".", "..") and len(part.encode(errors="replace")) <= 255 for part in parts)
        if not good or "\\" in self.path or not self.path.isprintable() or parts[0].lower() == WORK_FOLDER:
            raise WeightsError(
                f"the source lists a file {self.path!r}, a path that is not safe to write; nothing was written"
            )

    @property
    def identity(self) -> str:
        """What tells its content; empty where the source gives no hash."""
        return f"sha256:{self.sha256}" if self.sha256 else f"git:{self.git_sha1}" if self.git_sha1 else ""


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one revision.

    Attributes:
        source, title: the source's name for programs and for people.
        revision: as it was asked for, or the source's default.
        commit: what the revision stood for; empty where the source does not say.
    """

    source: str
    title: str
    repository: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]


CODE = "code"
PICKLES = "pickled weights"
OTHER_FORMATS = "other formats"
COPIES = "further copies of the weights"
FOLDERS = "in folders"
LINKS = "links"
REST = "not part of a checkpoint"

_CODE_SUFFIXES = {".py", ".pyc", ".pyd", ".so", ".dll", ".sh", ".bat", ".ps1", ".exe", ".js", ".ipynb", ".jar", ".whl"}
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill"}
_WEIGHT_SUFFIXES = {".h5", ".msgpack", ".onnx", ".gguf", ".ggml", ".ot", ".tflite", ".npz", ".nemo", ".mlmodel"}
_KEPT = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.md", "README*", "LICENSE*", "LICENCE*", "NOTICE*")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True)
class Selection:
    """Which files make the checkpoint.

    Attributes:
        files: those to download, in the listing's order.
        weights: those of them that hold weights.
        left_out: the others, by the reason.
    """

    files: tuple[RemoteFile, ...]
    weights: tuple[RemoteFile, ...]
    left_out: dict[str, tuple[RemoteFile, ...]]

    @property
    def size(self) -> int:
        """The bytes of all files to download."""
        return sum(file.size for file in self.files)


def select_files(
    files: Iterable[RemoteFile],
    *,
    formats: Sequence[str] = SAFETENSORS,
    include_code: bool = False,
    include_pickles: bool = False,
) -> Selection:
    """Choose weights in one format, and what describes the model and its tokenizer; nothing that runs code.

    Args:
        files: what a repository holds.
        formats: name patterns of the formats that an engine loads; safetensors win, then the first that is found.
        include_code: take Python modules and scripts along, those in folders too.
        include_pickles: take pickled weights along; loading them may run code.
    """
    files = tuple(files)
    weights = _weights(files, formats)
    chosen: list[RemoteFile] = []
    pickles: list[RemoteFile] = []
    left_out: dict[str, list[RemoteFile]] = {}
    for file in files:
        reason = "" if file in weights else _reason(file)
        if reason == PICKLES and include_pickles and "/" not in file.path:
            pickles.append(file)
        elif reason and not (reason == CODE and include_code):
            left_out.setdefault(reason, []).append(file)
            continue
        chosen.append(file)
    held = [file for file in chosen if file in weights or (file in pickles and not file.path.endswith(".json"))]
    return Selection(tuple(chosen), tuple(held), {reason: tuple(found) for reason, found in left_out.items()})


def require_weights(listing: Listing, selection: Selection) -> None:
    """Refuse a selection without weights.

    Raises:
        WeightsError: names what the repository has instead, and the option that takes it where there is one.
    """
    if selection.weights:
        return
    place = f"{listing.repository} on {listing.title}"
    pickled = [file.path for file in selection.left_out.get(PICKLES, ())]
    if pickled:
        raise WeightsError(
            f"{place} has no safetensors but pickled weights ({pickled[0]}{', …' if len(pickled) > 1 else ''}), and "
            "loading those may run code; --include-pickles downloads them all the same"
        )
    names = [file.path for file in listing.files][:8]
    raise WeightsError(f"{place} holds no weights that an engine loads; it has: {', '.join(names) or 'no files'}")


def _weights(files: Sequence[RemoteFile], formats: Sequence[str]) -> set[RemoteFile]:
    """The files of one format at the top; of several copies in safetensors the one that the loader takes."""
    top = [file for file in files if "/" not in file.path and not file.is_link]
    for pattern in (*SAFETENSORS, *formats):
        found = {
            file for file in top if fnmatch.fnmatchcase(file.path, pattern) and _reason(file) not in (CODE, PICKLES)
        }
        if found:
            single = {file for file in found if file.path == "model.safetensors"}
            shards = {file for file in found if _SHARD.fullmatch(file.path)}
            return single or shards or found
    return set()


def _reason(file: RemoteFile) -> str:
    """Why a file that holds none of the chosen weights is left out; empty for one that belongs to every checkpoint."""
    path = PurePosixPath(file.path)
    is_index = path.name.endswith(".index.json")
    suffix = PurePosixPath(path.name.removesuffix(".index.json")).suffix.lower()  # an index goes where its weights go
    if file.is_link:
        return LINKS
    if suffix in _CODE_SUFFIXES:
        return CODE
    if suffix in _PICKLE_SUFFIXES:
        return PICKLES
    if suffix in _WEIGHT_SUFFIXES:
        return OTHER_FORMATS
    if suffix == ".safetensors" and not is_index:
        return COPIES
    if len(path.parts) > 1:
        return FOLDERS
    return "" if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _KEPT) else REST
