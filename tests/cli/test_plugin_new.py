"""``plugin new``: what it writes runs, is clean, passes its own tests, and nothing is ever overwritten."""

from __future__ import annotations

import itertools
import json
import os
import re
import string
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from npu_zoo import LLM, SamplingParams
from npu_zoo.cli.plugin_project import LONGEST_NAME, Architecture, NewPlugin, write_project
from npu_zoo.core.errors import UsageError
from npu_zoo.core.specs import FamilySpec
from npu_zoo.registry import get_registry
from npu_zoo.testing.checkpoints import write_checkpoint
from npu_zoo.testing.shapes import shareable_shape, write_random_model
from npu_zoo.uninstalled import installed_from

ROOT = Path(__file__).parents[2]
KINDS = [kind.value for kind in Architecture]
NAMES = ("x", "new_family2", "l".ljust(LONGEST_NAME, "o"))
FILES = [
    ".github/workflows/ci.yml",
    ".gitignore",
    ".gitlab-ci.yml",
    "README.md",
    "pyproject.toml",
    "src/npu_zoo_new_family2/__init__.py",
    "src/npu_zoo_new_family2/model.py",
    "src/npu_zoo_new_family2/py.typed",
    "tests/test_conformance.py",
    "tests/test_matrix.py",
]
EXPERTS = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
GROUPS = {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 8}
SHAPES: dict[str, dict[str, Any]] = {"llama": {}, "moe": EXPERTS, "mla": EXPERTS | LATENT | GROUPS}
"""Of transformers' config, where its defaults are large."""

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Writes a plugin of an architecture, once for each name."""
    folder, written = tmp_path_factory.mktemp("plugins"), dict[tuple[str, str], Path]()

    def write(kind: str, name: str = "new_family2") -> Path:
        if (kind, name) not in written:
            directory = written[kind, name] = folder / f"{kind}-{name}"
            write_project(NewPlugin(name), Architecture(kind), directory)
        return written[kind, name]

    return write


@pytest.fixture(params=KINDS)
def project(request: pytest.FixtureRequest, write: Write) -> Path:
    return write(request.param)


@pytest.fixture
def family(project: Path, fresh_registry: None) -> Iterator[FamilySpec]:
    """The family of a plugin that is found as if it were installed."""
    with installed_from(project):
        assert get_registry().plugins["new_family2"].error is None
        assert get_registry().plugins["new_family2"].remarks == []
        yield get_registry().families["new_family2"]


def python(*arguments: str, cwd: Path, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)


# What is written


def test_every_file_is_written_and_filled(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = cli("plugin", "new", "new_family2", "--architecture", "moe")
    assert (ran.code, ran.err) == (0, "")
    directory = tmp_path / "npu-zoo-new-family2"
    assert sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()) == FILES
    assert [line.strip() for line in ran.out.splitlines() if line.startswith("  ")][: len(FILES)] == FILES
    left = [p for p in directory.rglob("*") if p.is_file() and re.search(r"\$(?!{{)", p.read_text("utf-8"))]
    assert [p.name for p in left] == [".gitlab-ci.yml"]  # image: python:$PYTHON
    workflow = (directory / ".github/workflows/ci.yml").read_text("utf-8")
    assert "${{ matrix.python-version }}" in workflow
    for ci in (workflow, (directory / ".gitlab-ci.yml").read_text("utf-8")):
        assert "npu-zoo validate --plugin new_family2 --level run --junit validation.xml" in ci
    assert list(tmp_path.iterdir()) == [directory]


def test_the_next_commands_name_the_directory(cli: Callable, tmp_path: Path) -> None:
    target = tmp_path / "a folder"
    ran = cli("plugin", "new", "new_family2", "--architecture", "llama", "--to", str(target))
    assert ran.out.split("next:\n")[1].splitlines()[:3] == [
        f"  pip install -e '{target}[test]'",
        f"  pytest '{target}'",
        "  npu-zoo validate --plugin new_family2 --level run",
    ]


def test_every_template_is_used_and_has_known_placeholders(write: Write) -> None:
    folder = ROOT / "npu_zoo/cli/plugin_template"
    known = set(NewPlugin("x").placeholders)
    templates = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in templates} == {".tmpl"}
    assert [path for path in templates if "/." in str(path.relative_to(folder))] == []  # no wheel would hold them
    assert {path.relative_to(folder).parts[0] for path in templates} == {"common", *KINDS}
    used = set()
    for path in templates:
        found = set(string.Template.pattern.findall(path.read_text("utf-8")))
        used |= {named or braced for _, named, braced, _ in found} - {""}
    assert used == known


def test_all_names_and_architectures_are_clean_by_their_own_configuration(write: Write, tmp_path: Path) -> None:
    projects = [str(write(kind, name)) for kind, name in itertools.product(KINDS, NAMES)]
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        ran = python("-m", "ruff", *command, *projects, cwd=tmp_path)
        assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.long
def test_types_are_complete(write: Write, tmp_path: Path) -> None:
    for kind in KINDS:
        ran = python("-m", "mypy", "--cache-dir", str(tmp_path), cwd=write(kind))
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "in 2 source files" in ran.stdout


# What it does


def test_a_request_is_checked_without_torch(project: Path) -> None:
    program = """
import sys
from npu_zoo.core.config import EngineArgs
from npu_zoo.dispatch import check
npu = {"model": "new_family2:example", "hardware": "atlas_800i_a2", "dtype": "bfloat16", "tensor_parallel_size": 4}
cpu = {"model": "new_family2", "hardware": "cpu", "dtype": "float32"}
for asked in (cpu, npu, npu | {"allow_experimental": True}, cpu | {"tensor_parallel_size": 3}):
    print(check(EngineArgs(**asked)).supported)
print({"torch", "transformers"} & set(sys.modules))
"""
    script = "from pathlib import Path; from npu_zoo.uninstalled import installed_from\n"
    script += f"with installed_from(Path('.')):\n    exec({program!r})"
    ran = python("-W", "error", "-c", script, cwd=project)
    assert ran.stdout.split() == ["True", "False", "True", "False", "set()"], ran.stderr


def test_a_checkpoint_of_its_own_class_gives_the_tokens_of_transformers(family: FamilySpec, tmp_path: Path) -> None:
    write_random_model(tmp_path, family, shareable_shape(family))
    assert_same_tokens(family, tmp_path)


def test_a_checkpoint_of_transformers_gives_its_tokens(
    request: pytest.FixtureRequest, family: FamilySpec, tmp_path: Path
) -> None:
    shape = SHAPES[request.node.callspec.params["project"]]
    write_checkpoint(tmp_path, architecture=family.architectures[0], tokenizer=False, **shape)
    assert_same_tokens(family, tmp_path)


def assert_same_tokens(family: FamilySpec, checkpoint: Path) -> None:
    prompt = list(range(3, 40))
    with LLM(f"{family.name}:custom", weights=str(checkpoint), dtype="float32", skip_tokenizer_init=True) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        found = llm.generate([prompt], sampling)[0].outputs[0].token_ids
    model_class: Any = getattr(transformers, family.architectures[0])
    reference = model_class.from_pretrained(checkpoint, dtype=torch.float32).eval()
    expected = list(prompt)
    with torch.inference_mode():
        while len(expected) < len(prompt) + len(found):
            expected.append(int(reference(torch.tensor([expected])).logits[0, -1].argmax()))
    assert len(set(found)) > 1
    assert list(found) == expected[len(prompt) :]


@pytest.mark.parametrize(
    "kind", ["llama", pytest.param("moe", marks=pytest.mark.long), pytest.param("mla", marks=pytest.mark.long)]
)
def test_its_own_tests_pass(write: Write, kind: str) -> None:
    ran = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", cwd=write(kind))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout


def test_it_builds_a_wheel_whose_plugin_is_found(write: Write, tmp_path: Path) -> None:
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path)]
    ran = python(*build, str(write("mla", "wheeled")), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    (wheel,) = tmp_path.glob("npu_zoo_wheeled-0.1.0-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert (tmp_path / "site/npu_zoo_wheeled/py.typed").is_file()
    assert not (tmp_path / "site/tests").exists()
    ran = python("-m", "npu_zoo", "plugins", "--json", cwd=tmp_path, path=(tmp_path / "site",))
    records = {record["name"]: record for record in json.loads(ran.stdout)}
    assert records["wheeled"]["distribution"] == "npu-zoo-wheeled 0.1.0"
    assert records["wheeled"]["registered"] == {"families": ["wheeled"]}


# What is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My_Family", "is no name of a family: lower-case letters, digits and _, a letter first"),
        ("my-family", "is no name of a family"),
        ("2fast", "is no name of a family"),
        ("familie_ü", "is no name of a family"),
        ("../up", "is no name of a family"),
        ("lambda", "is a keyword of Python"),
        ("native", "the name 'native' is taken by the plugin of npu-zoo "),
        ("wizardcoder", "is taken by the plugin of npu-zoo "),
        ("x" * (LONGEST_NAME + 1), "a family's name has 40 at most"),
    ],
)
def test_a_name_that_cannot_be(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = cli("plugin", "new", name, "--architecture", "llama")
    assert ran.code == 2
    assert message in ran.err
    assert list(tmp_path.iterdir()) == []


def test_the_family_of_a_plugin_of_another_name_is_taken(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = get_registry().families["wizardcoder"].model_copy(update={"name": "orchid"})
    monkeypatch.setitem(get_registry().families, "orchid", spec)
    registered = get_registry().plugins["native"].registered
    monkeypatch.setitem(registered, "register_families", ["orchid"])
    ran = cli("plugin", "new", "orchid", "--architecture", "llama", "--to", str(tmp_path / "new"))
    assert (ran.code, ran.err) == (2, "error: the name 'orchid' is taken by a family of the plugin native\n")


def test_nothing_is_overwritten(cli: Callable, tmp_path: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    file.write_text("mine too")
    for target, message in ((full, "is not empty, and nothing is overwritten"), (file, "exists and is no directory")):
        ran = cli("plugin", "new", "fresh", "--architecture", "llama", "--to", str(target))
        assert ran.code == 2
        assert f"error: {target} {message}" in ran.err
        assert "--to DIR" in ran.err
    assert sorted(tmp_path.rglob("*")) == [file, full, full / "mine.txt"]


def test_an_empty_directory_will_do_unless_it_is_the_current_one(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    ran = cli("plugin", "new", "fresh", "--architecture", "llama", "--to", ".")
    assert (ran.code, "is the current directory" in ran.err) == (2, True)
    monkeypatch.chdir(tmp_path)
    assert cli("plugin", "new", "fresh", "--architecture", "llama", "--to", "link").code == 0
    assert (tmp_path / "empty" / "pyproject.toml").is_file()


def test_the_folder_above_exists(cli: Callable, tmp_path: Path) -> None:
    ran = cli("plugin", "new", "fresh", "--architecture", "llama", "--to", str(tmp_path / "a" / "b"))
    assert (ran.code, f"{tmp_path / 'a'} is no directory; make it first" in ran.err) == (2, True)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    written = []

    def write_text(path: Path, text: str, **options: Any) -> None:
        if len(written) == 3:
            raise error
        written.append(path.write_bytes(text.encode()))

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises((KeyboardInterrupt, UsageError), match=r"No space left|^$"):
        write_project(NewPlugin("fresh"), Architecture.llama, tmp_path / "fresh")
    assert len(written) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_project_that_came_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "fresh"

    rename_now = Path.rename

    def rename(path: Path, to: Path) -> None:
        to.mkdir()
        (to / "mine.txt").write_text("mine")
        rename_now(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UsageError, match=r"cannot write .*: Directory not empty"):
        write_project(NewPlugin("fresh"), Architecture.llama, target)
    assert sorted(tmp_path.rglob("*")) == [target, target / "mine.txt"]


def test_an_unknown_architecture(cli: Callable, tmp_path: Path) -> None:
    ran = cli("plugin", "new", "fresh", "--architecture", "rnn", "--to", str(tmp_path / "fresh"))
    assert ran.code == 2
    assert "'llama', 'moe', 'mla'" in ran.err
