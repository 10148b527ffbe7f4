"""Listing, choosing and downloading a repository's files, from a server on this machine that fails on demand."""

from __future__ import annotations

import email.utils
import errno
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.errors import HardwareError, UsageError, WeightsError
from npu_zoo.weights import http_client, transfer
from npu_zoo.weights.download import download, plan_download
from npu_zoo.weights.http_client import HttpClient
from npu_zoo.weights.hub import list_files
from npu_zoo.weights.pull_journal import Journal
from npu_zoo.weights.remote_files import WORK_FOLDER, Listing, RemoteFile, require_weights, select_files

_SPEC = importlib.util.spec_from_file_location("stand_in_hub", Path(__file__).with_name("stand_in_hub.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
hub_server = sys.modules.setdefault("stand_in_hub", importlib.util.module_from_spec(_SPEC))
_SPEC.loader.exec_module(hub_server)
REPOSITORY, WEIGHTS, WANTED = hub_server.REPOSITORY, hub_server.WEIGHTS, hub_server.WANTED

MODEL = "model.safetensors"
SOURCES = ("huggingface", "modelscope")


class Told:
    """What a download tells."""

    def __init__(self) -> None:
        self.count = 0
        self.finished: list[str] = []
        self.notes: list[str] = []

    def advance(self, count: int) -> None:
        self.count += count

    def finish(self, file: RemoteFile) -> None:
        self.finished.append(file.path)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    for name in list(os.environ):
        if name.startswith(("HF_", "MODELSCOPE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(http_client, "BACKOFF_S", 0.005)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with hub_server.serve() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", served.endpoint)
        yield served


def pull(directory: Path, source: str = "huggingface", jobs: int = 4, **options: Any) -> Told:
    listing = list_files(source, REPOSITORY)
    told = Told()
    plan = plan_download(listing, select_files(listing.files, **options).files, directory)
    try:
        download(plan, told, jobs)
    finally:
        told.count += plan.resumed
    return told


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def part(directory: Path, path: str = MODEL) -> Path:
    return Journal.read(directory / WORK_FOLDER).part(RemoteFile(path, 0, None, None, ""))


def interrupted(hub: Any, directory: Path, source: str = "huggingface", after: int = 300_000) -> None:
    """A download that a server cut for good in the middle of the weights."""
    hub.faults[MODEL] = [hub_server.cut(after), hub_server.status(403)]
    with pytest.raises(WeightsError, match="403"):
        pull(directory, source)
    assert part(directory).stat().st_size == after
    hub.faults[MODEL].clear()
    hub.seen.clear()


# Listing


def test_hugging_face_lists_files_with_the_hash_that_fits_each() -> None:
    with pytest.MonkeyPatch.context() as patch, hub_server.serve() as served:
        patch.setenv("HF_ENDPOINT", served.endpoint)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        served.files = {"empty": b"", "hello.txt": b"hello\n", "large.safetensors": b"abc"}
        served.lfs = {"large.safetensors"}
        listing = list_files("huggingface", REPOSITORY)
    found = {file.path: (file.size, file.sha256, file.git_sha1) for file in listing.files}
    assert found == {
        "empty": (0, None, "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
        "hello.txt": (6, None, "ce013625030ba8dba906f756967f9e9ca394464a"),
        "large.safetensors": (3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", None),
    }
    assert (listing.revision, listing.commit) == ("main", hub_server.COMMIT)


def test_the_stand_in_and_hugging_face_s_own_client_agree(hub: Any) -> None:
    script = """
import json, sys
from huggingface_hub import HfApi

api = HfApi(endpoint=sys.argv[1])
commit = api.model_info(sys.argv[2], revision="main").sha
tree = api.list_repo_tree(sys.argv[2], recursive=True, revision=commit)
files = [file for file in tree if hasattr(file, "lfs")]
print(json.dumps([[file.path, file.size, file.lfs.sha256 if file.lfs else None, file.blob_id] for file in files]))
"""
    hub.page_size = 100  # the client would follow a page's address to the real hub
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    ran = subprocess.run(
        [sys.executable, "-c", script, hub.endpoint, REPOSITORY], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    expected = [(path, size, sha256, None if sha256 else blob) for path, size, sha256, blob in json.loads(ran.stdout)]
    found = [(f.path, f.size, f.sha256, f.git_sha1) for f in list_files("huggingface", REPOSITORY).files]
    assert found == expected
    assert len(found) == len(hub_server.CHECKPOINT)


def test_every_page_of_a_listing_is_read_from_the_endpoint_itself(hub: Any) -> None:
    hub.page_size = 2
    listing = list_files("huggingface", REPOSITORY)
    assert {file.path for file in listing.files} == set(hub_server.CHECKPOINT)
    assert sum("/tree/" in seen.path for seen in hub.seen) == 7


def test_model_scope_lists_files_without_folders(hub: Any) -> None:
    listing = list_files("modelscope", REPOSITORY)
    expected = {path: hashlib.sha256(content).hexdigest() for path, content in hub.files.items()}
    assert {file.path: file.sha256 for file in listing.files} == expected
    assert (listing.revision, listing.commit) == ("master", "")


@pytest.mark.parametrize("source", SOURCES)
def test_a_missing_repository_or_revision_is_named_with_its_source(hub: Any, source: str) -> None:
    with pytest.raises(
        WeightsError, match=r"no revision gone of deepseek-ai/deepseek-coder.* on (Hugging Face|ModelSc)"
    ):
        list_files(source, REPOSITORY, "gone")
    with pytest.raises(WeightsError, match="of nobody/nothing on"):
        list_files(source, "nobody/nothing")


@pytest.mark.parametrize(("source", "variable"), [("huggingface", "HF_TOKEN"), ("modelscope", "MODELSCOPE_API_TOKEN")])
def test_a_token_is_asked_for_and_sent(
    hub: Any, source: str, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.token = "secret"
    with pytest.raises(WeightsError, match=rf"401 \(Invalid username.*{variable}"):
        list_files(source, REPOSITORY)
    monkeypatch.setenv(variable, "secret")
    pull(tmp_path / "out", source)
    assert (tmp_path / "out" / MODEL).read_bytes() == WEIGHTS


def test_the_token_of_a_login_is_taken_and_never_sent_to_another_host(
    hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.token = "secret"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("secret\n")
    pull(tmp_path / "out")
    elsewhere = [seen for seen in hub.seen if seen.host.startswith("localhost")]
    assert elsewhere
    assert all("authorization" not in seen.headers for seen in elsewhere)
    assert all("authorization" in seen.headers for seen in hub.seen if seen not in elsewhere)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    with pytest.raises(WeightsError, match="401"):
        list_files("huggingface", REPOSITORY)


def test_a_proxy_is_used(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", hub.endpoint)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    list_files("huggingface", REPOSITORY)
    assert {seen.host for seen in hub.seen} == {"hub.invalid"}


@pytest.mark.parametrize("endpoint", ["ftp://hub", "file:///etc", "https://"])
def test_an_endpoint_that_is_no_address_is_refused(endpoint: str, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(UsageError, match="no address of a hub"):
        list_files("huggingface", REPOSITORY)


def test_offline_is_respected(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        list_files("huggingface", REPOSITORY)
    assert hub.seen == []


def test_a_hub_that_cannot_be_reached_is_named(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"connection to 127\.0\.0\.1:9 failed.*gave up after 4 tries"):
        list_files("huggingface", REPOSITORY)


BAD_PATHS = ["../evil", "/etc/passwd", "a/../../b", "a//b", ".", "", "a/./b", "..\\evil", "a\nb", "a\x00b", "x" * 300]


@pytest.mark.parametrize("path", [*BAD_PATHS, f"{WORK_FOLDER}/journal.json"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_path_that_leads_out_is_refused_and_nothing_is_written(
    hub: Any, source: str, path: str, tmp_path: Path
) -> None:
    if source == "huggingface":
        hub.listed = [{"type": "file", "path": path, "size": 1, "oid": "0" * 40}]
    else:
        hub.listed = [{"Type": "blob", "Path": path, "Size": 1, "Sha256": "0" * 64}]
    with pytest.raises(WeightsError, match="not safe to write"):
        pull(tmp_path / "out", source)
    assert list(tmp_path.iterdir()) == []


@given(st.text(alphabet=st.sampled_from("a./\\\x00\n~ \u202e\ud800é"), max_size=12))
def test_a_path_that_is_taken_stays_inside(path: str) -> None:
    try:
        file = RemoteFile(path, 0, None, None, "")
    except WeightsError:
        return
    root = Path("/root/of/it")
    target = Path(os.path.normpath(root / file.path))
    assert target != root
    assert target.is_relative_to(root)
    assert str(target.relative_to(root)) == path


FIELDS = ["type", "path", "size", "oid", "lfs", "sha", "Data", "Files", "Type", "Path", "Size", "Sha256", "Success"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


class Canned(HttpClient):
    """A client whose server says the same to everything."""

    def __init__(self, answer: Any) -> None:
        super().__init__({})
        self._answer = answer

    def get_json(self, url: str) -> tuple[Any, Any]:
        return ({"sha": "0" * 40} if "/revision/" in url else self._answer), {}


@given(JSON, st.sampled_from(SOURCES))
def test_any_listing_is_taken_or_refused_with_a_reason(answer: Any, source: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        try:
            listing = list_files(source, REPOSITORY, client=Canned(answer))
        except WeightsError:
            return
    assert all(isinstance(file, RemoteFile) and file.size >= 0 for file in listing.files)


@pytest.mark.parametrize(
    "listed",
    [
        [{"type": "file", "path": "a", "size": -1}],
        [{"type": "file", "path": "a", "oid": "no hash"}],
        [{"type": "file", "path": "a", "lfs": {"oid": "0" * 63, "size": 1}}],
        [{"path": "a"}],
        {"error": "what"},
    ],
)
def test_a_listing_that_is_not_understood_is_refused(hub: Any, listed: Any) -> None:
    hub.listed = listed if isinstance(listed, list) else [listed]
    with pytest.raises(WeightsError, match="not understood"):
        list_files("huggingface", REPOSITORY)


def test_a_path_that_is_listed_twice_is_refused(hub: Any) -> None:
    hub.listed = [{"type": "file", "path": "config.json", "size": 1, "oid": digit * 40} for digit in "01"]
    with pytest.raises(WeightsError, match=r"'config.json' of .* 2 times"):
        list_files("huggingface", REPOSITORY)


# Choosing


def files(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 1, None, None, "") for path in paths]


def chosen(*paths: str, **options: Any) -> list[str]:
    return [file.path for file in select_files(files(*paths), **options).files]


def test_code_and_pickles_are_left_out_and_named() -> None:
    selection = select_files(files(*hub_server.CHECKPOINT))
    assert {file.path for file in selection.files} == WANTED
    assert [file.path for file in selection.weights] == [MODEL]
    assert {reason: [file.path for file in found] for reason, found in selection.left_out.items()} == {
        "code": ["modeling_model.py", "inference/convert.py"],
        "pickled weights": ["pytorch_model.bin"],
        "in folders": ["figures/plot.png"],
        "not part of a checkpoint": [".gitattributes"],
    }


def test_code_is_taken_when_it_is_asked_for() -> None:
    taken = set(chosen(*hub_server.CHECKPOINT, include_code=True))
    assert taken == WANTED | {"modeling_model.py", "inference/convert.py"}


def test_pickles_are_taken_when_they_are_asked_for() -> None:
    names = (MODEL, "pytorch_model.bin", "pytorch_model.bin.index.json", "old/pytorch_model.bin", "a.py")
    assert chosen(*names, include_pickles=True) == [MODEL, "pytorch_model.bin", "pytorch_model.bin.index.json"]
    assert chosen(*names) == [MODEL]


@pytest.mark.parametrize(
    ("paths", "kept"),
    [
        ((MODEL, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), [MODEL]),
        (
            ("consolidated.safetensors", "model-00001-of-00001.safetensors", "model.safetensors.index.json"),
            ["model-00001-of-00001.safetensors", "model.safetensors.index.json"],
        ),
        (("pytorch-1.safetensors", "pytorch-2.safetensors"), ["pytorch-1.safetensors", "pytorch-2.safetensors"]),
        ((MODEL, "original/model.safetensors", "tf_model.h5", "flax_model.msgpack", "onnx/m.onnx", "m.gguf"), [MODEL]),
        (("chat_template.jinja", "tokenizer.model", "LICENSE-MODEL", MODEL, "x.html", "chat.JSON"), None),
    ],
)
def test_one_copy_of_the_weights_is_taken(paths: tuple[str, ...], kept: list[str] | None) -> None:
    assert chosen(*paths) == (kept or list(paths[:4]))


def test_another_format_is_taken_where_an_engine_loads_it_and_there_are_no_safetensors() -> None:
    assert chosen("m.gguf", "config.json", formats=["*.safetensors", "*.gguf"]) == ["m.gguf", "config.json"]
    assert chosen("m.gguf", MODEL, formats=["*.safetensors", "*.gguf"]) == [MODEL]
    assert chosen("m.bin", "m.py", formats=["*"]) == []


def listing_of(*paths: str) -> Listing:
    return Listing("huggingface", "Hugging Face", REPOSITORY, "main", "", tuple(files(*paths)))


def test_a_repository_without_safetensors_names_the_way_to_its_pickles() -> None:
    listing = listing_of("config.json", "pytorch_model.bin")
    with pytest.raises(WeightsError, match="--include-pickles"):
        require_weights(listing, select_files(listing.files))
    require_weights(listing, select_files(listing.files, include_pickles=True))


def test_a_repository_without_weights_is_refused_with_what_it_has() -> None:
    listing = listing_of("config.json", "m.gguf")
    with pytest.raises(WeightsError, match=r"holds no weights .*config.json, m.gguf"):
        require_weights(listing, select_files(listing.files))


def test_a_link_is_left_out(hub: Any) -> None:
    hub.listed = [{"Type": "blob", "Path": MODEL, "Size": 1, "Sha256": "0" * 64, "Mode": "120000"}]
    selection = select_files(list_files("modelscope", REPOSITORY).files)
    assert selection.files == ()
    assert [file.path for file in selection.left_out["links"]] == [MODEL]


# Downloading


@pytest.mark.parametrize("source", SOURCES)
def test_the_chosen_files_arrive_and_nothing_else_stays(hub: Any, source: str, tmp_path: Path) -> None:
    told = pull(tmp_path, source)
    assert contents(tmp_path) == {path: hub.files[path] for path in WANTED}
    assert sorted(told.finished) == sorted(WANTED)
    assert told.count == sum(len(hub.files[path]) for path in WANTED)
    assert not (tmp_path / WORK_FOLDER).exists()
    assert told.notes == []


def test_code_in_folders_arrives_in_folders(hub: Any, tmp_path: Path) -> None:
    pull(tmp_path, include_code=True)
    assert (tmp_path / "inference" / "convert.py").read_bytes() == hub.files["inference/convert.py"]


def test_no_file_has_its_name_before_it_is_verified(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = WEIGHTS[:-1] + b"?"
    hub.faults[MODEL] = [hub_server.body(half)] * 2
    watched = []
    monkeypatch.setattr(Told, "advance", lambda told, count: watched.append((tmp_path / MODEL).exists()))
    with pytest.raises(WeightsError, match=r"sha256:.* is due, .* has come"):
        pull(tmp_path)
    assert watched
    assert not any(watched)
    assert not (tmp_path / MODEL).exists()
    assert not part(tmp_path).exists()


def test_a_wrong_hash_is_told_and_the_file_fetched_once_more(hub: Any, tmp_path: Path) -> None:
    hub.faults[MODEL] = [hub_server.body(WEIGHTS[:-1] + b"?")]
    hub.faults["config.json"] = [hub_server.body(hub_server.CONFIG[:-1] + b"?")]
    told = pull(tmp_path)
    assert contents(tmp_path) == {path: hub.files[path] for path in WANTED}
    assert sorted(note.split(" ")[0] for note in told.notes) == ["config.json", MODEL]
    assert told.count == sum(len(hub.files[path]) for path in WANTED)


@pytest.mark.parametrize("source", SOURCES)
def test_a_cut_connection_is_taken_up_where_it_ended(hub: Any, source: str, tmp_path: Path) -> None:
    hub.faults[MODEL] = [hub_server.cut(100_000), hub_server.cut(200_000), hub_server.cut(0)]
    pull(tmp_path, source)
    assert (tmp_path / MODEL).read_bytes() == WEIGHTS
    ranges = [seen.headers.get("range") for seen in hub.requests_for(MODEL)]
    assert ranges == [None, "bytes=100000-", "bytes=300000-", "bytes=300000-"]


@pytest.mark.parametrize("source", SOURCES)
def test_a_later_download_goes_on_with_the_part(hub: Any, source: str, tmp_path: Path) -> None:
    interrupted(hub, tmp_path, source)
    told = pull(tmp_path, source)
    assert contents(tmp_path) == {path: hub.files[path] for path in WANTED}
    assert [seen.headers.get("range") for seen in hub.requests_for(MODEL)] == ["bytes=300000-"]
    assert told.count == sum(len(hub.files[path]) for path in {MODEL, *told.finished})


def test_a_part_of_one_source_is_continued_from_the_other(hub: Any, tmp_path: Path) -> None:
    interrupted(hub, tmp_path, "huggingface")
    pull(tmp_path, "modelscope")
    assert (tmp_path / MODEL).read_bytes() == WEIGHTS
    assert [seen.headers.get("range") for seen in hub.requests_for(MODEL)] == ["bytes=300000-"]


def test_many_cuts_are_survived_as_long_as_bytes_come(hub: Any, tmp_path: Path) -> None:
    hub.faults[MODEL] = [hub_server.cut(50_000)] * 20
    pull(tmp_path)
    assert (tmp_path / MODEL).read_bytes() == WEIGHTS


def test_a_server_that_knows_no_ranges_is_asked_anew(hub: Any, tmp_path: Path) -> None:
    hub.ranges = False
    hub.faults[MODEL] = [hub_server.cut(300_000)]
    told = pull(tmp_path)
    assert (tmp_path / MODEL).read_bytes() == WEIGHTS
    assert [note for note in told.notes if "from the beginning" in note]
    assert told.count == sum(len(hub.files[path]) for path in WANTED)


def test_a_server_without_ranges_that_always_cuts_is_given_up(hub: Any, tmp_path: Path) -> None:
    hub.ranges = False
    hub.faults[MODEL] = [hub_server.cut(300_000)] * 50
    with pytest.raises(WeightsError, match="300000 of 1048576 bytes; gave up"):
        pull(tmp_path)
    assert len(hub.requests_for(MODEL)) < 15


def test_a_file_that_changed_since_is_started_anew_and_said_so(hub: Any, tmp_path: Path) -> None:
    interrupted(hub, tmp_path)
    hub.files[MODEL] = WEIGHTS[::-1]
    told = pull(tmp_path)
    assert (tmp_path / MODEL).read_bytes() == WEIGHTS[::-1]
    assert [seen.headers.get("range") for seen in hub.requests_for(MODEL)] == [None]
    assert any(note.startswith(f"{MODEL} is another file now") for note in told.notes)


@pytest.mark.parametrize("content", [WEIGHTS + b"more", WEIGHTS[:-4]])
def test_a_file_of_another_size_than_the_listing_s_is_refused(hub: Any, tmp_path: Path, content: bytes) -> None:
    hub.faults[MODEL] = [hub_server.body(content)]
    with pytest.raises(WeightsError, match=f"has {len(content)} bytes, where its listing says {len(WEIGHTS)}"):
        pull(tmp_path)
    assert not (tmp_path / MODEL).exists()


def test_a_body_without_a_length_is_taken_and_one_that_is_too_long_is_not(hub: Any, tmp_path: Path) -> None:
    hub.faults[MODEL] = [hub_server.unannounced(WEIGHTS + bytes(5_000_000))]
    with pytest.raises(WeightsError, match="sends more bytes, where its listing says 1048576"):
        pull(tmp_path)
    assert part(tmp_path).stat().st_size <= len(WEIGHTS)
    part(tmp_path).unlink()
    hub.faults[MODEL] = [hub_server.unannounced(WEIGHTS)]
    pull(tmp_path)
    assert (tmp_path / MODEL).read_bytes() == WEIGHTS


def test_a_part_that_the_server_cannot_continue_is_started_anew(hub: Any, tmp_path: Path) -> None:
    interrupted(hub, tmp_path)
    hub.faults[MODEL] = [hub_server.status(416)]
    told = pull(tmp_path)
    assert (tmp_path / MODEL).read_bytes() == WEIGHTS
    assert [seen.headers.get("range") for seen in hub.requests_for(MODEL)] == ["bytes=300000-", None]
    assert told.count == sum(len(hub.files[path]) for path in {MODEL, *told.finished})


def test_without_a_hash_the_server_s_name_of_the_content_decides(hub: Any, tmp_path: Path) -> None:
    hub.hashes = False
    interrupted(hub, tmp_path, "modelscope")
    pull(tmp_path, "modelscope")
    assert (tmp_path / MODEL).read_bytes() == WEIGHTS
    (seen,) = hub.requests_for(MODEL)
    assert (seen.headers["range"], seen.headers["if-range"]) == ("bytes=300000-", '"one"')


def test_without_a_hash_a_changed_file_is_started_anew(hub: Any, tmp_path: Path) -> None:
    hub.hashes = False
    interrupted(hub, tmp_path, "modelscope")
    hub.files[MODEL], hub.etag = WEIGHTS[::-1], '"two"'
    told = pull(tmp_path, "modelscope")
    assert (tmp_path / MODEL).read_bytes() == WEIGHTS[::-1]
    assert any("from the beginning" in note for note in told.notes)


def test_without_hash_and_name_nothing_is_continued(hub: Any, tmp_path: Path) -> None:
    hub.hashes, hub.etag = False, 'W/"weak"'
    hub.faults[MODEL] = [hub_server.cut(300_000)]
    pull(tmp_path, "modelscope")
    assert (tmp_path / MODEL).read_bytes() == WEIGHTS
    assert [seen.headers.get("range") for seen in hub.requests_for(MODEL)] == [None, None]


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504, 408])
def test_a_status_that_passes_is_waited_for(hub: Any, tmp_path: Path, code: int) -> None:
    hub.faults[MODEL] = [hub_server.status(code)] * 3
    pull(tmp_path)
    assert (tmp_path / MODEL).read_bytes() == WEIGHTS


def test_a_status_that_does_not_pass_is_given_up(hub: Any, tmp_path: Path) -> None:
    hub.faults[MODEL] = [hub_server.status(503)] * 50
    with pytest.raises(WeightsError, match=r"503.*gave up after 10 tries in a row"):
        pull(tmp_path)


@pytest.mark.parametrize(("header", "value"), [("Retry-After", "1"), ("RateLimit", '"resolvers";r=0;t=1')])
def test_the_wait_that_a_server_asks_for_is_kept(hub: Any, tmp_path: Path, header: str, value: str) -> None:
    hub.faults[MODEL] = [hub_server.status(429, **{header: value})]
    start = time.monotonic()
    pull(tmp_path)
    assert time.monotonic() - start >= 1
    assert (tmp_path / MODEL).read_bytes() == WEIGHTS


def test_retry_after_may_be_a_date_and_has_a_limit(hub: Any, tmp_path: Path) -> None:
    date = email.utils.formatdate(time.time() + 4000, usegmt=True)
    hub.faults[MODEL] = [hub_server.status(429, **{"Retry-After": date})]
    with pytest.raises(WeightsError, match=r"asks to wait (39|40)\d\d s"):
        pull(tmp_path)


def test_a_file_that_is_gone_is_named(hub: Any, tmp_path: Path) -> None:
    hub.faults["tokenizer.json"] = [hub_server.status(404)]
    with pytest.raises(WeightsError, match=r"no file tokenizer.json of deepseek-ai/.* on Hugging Face"):
        pull(tmp_path)


def test_a_silent_connection_is_taken_up_again(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "TIMEOUT_S", 0.3)
    hub.faults[MODEL] = [hub_server.hold(300_000)]
    pull(tmp_path)
    assert (tmp_path / MODEL).read_bytes() == WEIGHTS
    assert hub.requests_for(MODEL)[1].headers["range"] == "bytes=300000-"


def test_a_part_that_is_damaged_on_the_disk_is_found_and_fetched_anew(hub: Any, tmp_path: Path) -> None:
    interrupted(hub, tmp_path)
    part(tmp_path).write_bytes(bytes(300_000))
    told = pull(tmp_path)
    assert (tmp_path / MODEL).read_bytes() == WEIGHTS
    assert any("is due" in note for note in told.notes)


@pytest.mark.parametrize("size", [len(WEIGHTS), len(WEIGHTS) + 5])
def test_a_part_that_is_whole_or_longer_needs_no_more(hub: Any, tmp_path: Path, size: int) -> None:
    interrupted(hub, tmp_path)
    part(tmp_path).write_bytes((WEIGHTS + b"extra")[:size])
    told = pull(tmp_path)
    assert not any("is due" in note for note in told.notes)
    assert (tmp_path / MODEL).read_bytes() == WEIGHTS
    assert len(hub.requests_for(MODEL)) == (0 if size == len(WEIGHTS) else 1)


@pytest.mark.parametrize("journal", [b"", b"{", b"[]", b'{"files": {"model.safetensors": 3}}'])
def test_a_damaged_journal_costs_the_parts_and_nothing_else(hub: Any, tmp_path: Path, journal: bytes) -> None:
    interrupted(hub, tmp_path)
    (tmp_path / WORK_FOLDER / "journal.json").write_bytes(journal)
    pull(tmp_path)
    assert (tmp_path / MODEL).read_bytes() == WEIGHTS
    assert [seen.headers.get("range") for seen in hub.requests_for(MODEL)] == [None]


def test_the_journal_says_what_the_parts_are_of(hub: Any, tmp_path: Path) -> None:
    interrupted(hub, tmp_path)
    journal = json.loads((tmp_path / WORK_FOLDER / "journal.json").read_text())
    assert (journal["repository"], journal["commit"]) == (REPOSITORY, hub_server.COMMIT)
    assert journal["files"][MODEL]["identity"] == f"sha256:{hashlib.sha256(WEIGHTS).hexdigest()}"


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_that_is_there_is_not_downloaded_again(hub: Any, source: str, tmp_path: Path) -> None:
    (tmp_path / MODEL).write_bytes(WEIGHTS)
    (tmp_path / "config.json").write_bytes(hub_server.CONFIG)
    told = pull(tmp_path, source)
    assert set(told.finished) == WANTED - {MODEL, "config.json"}
    hub.seen.clear()
    assert pull(tmp_path, source).finished == []
    assert hub.requests_for(MODEL) == []


@pytest.mark.parametrize("there", [b"mine", hub_server.CONFIG[:-1] + b"?"])
def test_a_file_with_another_content_is_never_overwritten(hub: Any, there: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(there)
    (tmp_path / "README.md").mkdir()
    with pytest.raises(
        WeightsError, match=r"another content than .*: README\.md, config\.json; nothing is overwritten"
    ):
        pull(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json"]


def test_a_link_to_nowhere_is_not_written_through(hub: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match=r"config\.json"):
        pull(out)
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_a_link_is_not_written_through(hub: Any, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "inference").symlink_to(elsewhere)
    with pytest.raises(WeightsError, match="inference is a link"):
        pull(out, include_code=True)
    assert list(elsewhere.iterdir()) == []


def during(hub: Any, path: str, action: Callable[[], object]) -> None:
    """Do something when a file is asked for."""

    def fault(handler: Any, content: bytes) -> bool:
        action()
        return False

    hub.faults[path] = [fault]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_comes_to_be_there_during_the_download_is_not_overwritten(
    hub: Any, tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", no_hard_links)
    during(hub, MODEL, lambda: (tmp_path / MODEL).write_bytes(b"mine"))
    with pytest.raises(WeightsError, match="came to be there during the download"):
        pull(tmp_path)
    assert (tmp_path / MODEL).read_bytes() == b"mine"


def no_hard_links(self: Path, target: Path) -> None:
    raise OSError(errno.EPERM, "no hard links here")


def test_a_file_system_without_hard_links_will_do(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "hardlink_to", no_hard_links)
    pull(tmp_path)
    assert contents(tmp_path) == {path: hub.files[path] for path in WANTED}


def test_too_small_a_disk_is_told_before_anything_is_written(hub: Any, tmp_path: Path) -> None:
    listing = list_files("huggingface", REPOSITORY)
    selection = select_files(listing.files)
    total = sum(len(hub.files[path]) for path in WANTED)
    plan_download(listing, selection.files, tmp_path / "out", lambda _: total).check_disk()
    with pytest.raises(HardwareError, match=f"{total:,} more bytes.*{total - 1:,} free"):
        plan_download(listing, selection.files, tmp_path / "out", lambda _: total - 1).check_disk()
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_is_there_counts_for_the_disk(hub: Any, tmp_path: Path) -> None:
    interrupted(hub, tmp_path)
    listing = list_files("huggingface", REPOSITORY)
    selection = select_files(listing.files)
    missing = sum(file.size for file in selection.files if not (tmp_path / file.path).exists())
    plan_download(listing, selection.files, tmp_path, lambda _: missing - 300_000).check_disk()
    with pytest.raises(HardwareError):
        plan_download(listing, selection.files, tmp_path, lambda _: missing - 300_001).check_disk()


def test_a_disk_that_fills_up_keeps_what_came(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(part: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "_publish", full)
        with pytest.raises(HardwareError, match="no room is left"):
            pull(tmp_path, jobs=1)
    hub.seen.clear()
    pull(tmp_path)
    assert contents(tmp_path) == {path: hub.files[path] for path in WANTED}


def test_two_downloads_into_one_directory_do_not_meet(hub: Any, tmp_path: Path) -> None:
    hub.faults[MODEL] = [hub_server.hold(1000)]
    first = threading.Thread(target=lambda: pull(tmp_path))
    first.start()
    assert hub.held.wait(10)
    with pytest.raises(HardwareError, match="another process is downloading"):
        pull(tmp_path)
    hub.release.set()
    first.join()
    assert contents(tmp_path) == {path: hub.files[path] for path in WANTED}


def test_one_failure_ends_the_other_transfers_at_once(hub: Any, tmp_path: Path) -> None:
    hub.faults[MODEL] = [hub_server.hold(1000)]
    hub.faults["tokenizer.json"] = [hub_server.status(404)]
    start = time.monotonic()
    with pytest.raises(WeightsError, match=r"tokenizer\.json"):
        pull(tmp_path)
    assert time.monotonic() - start < 10


def test_several_files_are_fetched_at_a_time(hub: Any, tmp_path: Path) -> None:
    together = threading.Barrier(3, timeout=10)
    for path in ("config.json", "tokenizer.json", MODEL):
        during(hub, path, together.wait)
    pull(tmp_path, jobs=7)
    assert not together.broken


def test_a_download_is_stopped_by_its_client(hub: Any, tmp_path: Path) -> None:
    listing = list_files("huggingface", REPOSITORY)
    client = HttpClient({})
    during(hub, MODEL, client.stop.set)
    with pytest.raises(WeightsError, match="was stopped"):
        download(plan_download(listing, select_files(listing.files).files, tmp_path), Told(), 1, client)
    assert not (tmp_path / MODEL).exists()


def test_a_redirect_to_another_scheme_is_not_followed(hub: Any, tmp_path: Path) -> None:
    hub.faults["config.json"] = [hub_server.status(302, Location="ftp://127.0.0.1/config.json")]
    with pytest.raises(WeightsError, match="redirect from http to ftp is not followed"):
        pull(tmp_path)
