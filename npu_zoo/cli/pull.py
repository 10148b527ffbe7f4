"""``pull``: download a checkpoint from Hugging Face or ModelScope. It does not import torch."""

from __future__ import annotations

import enum
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npu_zoo.checkpoint import detect_format
from npu_zoo.cli.download_progress import PullProgress, count_text, size_text
from npu_zoo.cli.help import json_output
from npu_zoo.cli.options import JsonFlag
from npu_zoo.cli.output import note, print_fields, print_items, print_json, print_table
from npu_zoo.core.errors import NpuZooError, UsageError, WeightsError
from npu_zoo.core.specs import FamilySpec, VariantSpec
from npu_zoo.registry import Registry, get_registry

if TYPE_CHECKING:
    from npu_zoo.weights.download import DownloadPlan
    from npu_zoo.weights.remote_files import RemoteFile, Selection

PULL_KEYS: dict[str, str] = {
    "model": "The model with its variant.",
    "source": "huggingface or modelscope.",
    "repository": "The repository there.",
    "revision": "The branch, tag or commit that was asked for.",
    "commit": "The commit that it stands for; null where the source does not say.",
    "directory": "Where the files lie.",
    "dry_run": "Whether nothing was downloaded.",
    "files": "The checkpoint's files.",
    "files[].path": "The name in the directory.",
    "files[].size": "Bytes.",
    "files[].sha256": "The hash that the source gives; null where it gives another one or none.",
    "files[].git_sha1": "Git's hash of the content that the source gives; null where it gives another one or none.",
    "files[].state": "present: it was there already; downloaded; missing: a dry run left it to be downloaded.",
    "left_out": "Files of the repository that are not downloaded.",
    "left_out[].path": "The name in the repository.",
    "left_out[].size": "Bytes.",
    "left_out[].reason": "Why it is left out.",
    "bytes": "What there is to download, in bytes.",
    "bytes_resumed": "How much of it an earlier download had left.",
    "bytes_free": "What the file system had left before.",
    "command": "The command that runs the checkpoint; null after a dry run, or where it must be converted first.",
}
"""What :func:`_data` holds."""

_OPTIONS = {"code": "--include-code takes them", "pickled weights": "--include-pickles takes them"}


class Source(str, enum.Enum):
    """Where a checkpoint is from."""

    huggingface = "huggingface"
    modelscope = "modelscope"


@dataclass(frozen=True)
class _Pull:
    """What was asked for, with every choice made."""

    model: str
    source: str
    repository: str
    revision: str | None
    directory: Path
    include_code: bool
    include_pickles: bool

    def command(self) -> str:
        """The command line that asks for the same."""
        words = ["npu-zoo", "pull", self.model, "--source", self.source, "--to", str(self.directory)]
        words += ["--revision", self.revision] if self.revision else []
        words += ["--include-code"] * self.include_code + ["--include-pickles"] * self.include_pickles
        return shlex.join(words)


def _complete_model(incomplete: str) -> list[str]:
    families = get_registry().families.values()
    return [name for family in families for name in _pullable(family) if name.startswith(incomplete)]


def _option(help_text: str, *flags: str, metavar: str | None = None) -> Any:
    return typer.Option(*flags, help=help_text, metavar=metavar)


_SOURCE_HELP = "huggingface or modelscope. Default: the first of them that has the variant."
_CODE_HELP = "Take Python modules and scripts of the repository along."
_PICKLES_HELP = "Take pickled weights along; loading them may run code."


@json_output(PULL_KEYS)
def pull(
    model: Annotated[
        str,
        typer.Argument(metavar="FAMILY[:VARIANT]", help="What to download.", autocompletion=_complete_model),
    ],
    source: Annotated[Source | None, _option(_SOURCE_HELP, "--source", metavar="NAME")] = None,
    to: Annotated[
        Path | None, _option("Where to. Default: a directory with the repository's name.", "--to", metavar="DIR")
    ] = None,
    revision: Annotated[
        str | None, _option("Branch, tag or commit. Default: the main branch.", "--revision", metavar="REV")
    ] = None,
    include_code: Annotated[bool, _option(_CODE_HELP, "--include-code")] = False,
    include_pickles: Annotated[bool, _option(_PICKLES_HELP, "--include-pickles")] = False,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=32, metavar="N", help="Files at a time. Default: 4.")] = 4,
    dry_run: Annotated[bool, _option("Only list what would be downloaded.", "--dry-run")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Download a checkpoint from Hugging Face or ModelScope.

    Files are verified by hash before they get their names, and nothing is overwritten. An interrupted download goes on
    where it was when the same command is given again. HF_ENDPOINT, HF_TOKEN, MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN
    and HTTPS_PROXY are honoured.
    """
    from npu_zoo.weights.download import download, plan_download
    from npu_zoo.weights.hub import list_files
    from npu_zoo.weights.remote_files import require_weights, select_files

    registry = get_registry()
    name, source_name, repository = _find(registry, model, source)
    asked = _Pull(
        name,
        source_name,
        repository,
        revision,
        to or Path(repository.rpartition("/")[2]),
        include_code,
        include_pickles,
    )
    listing = list_files(asked.source, repository, revision)
    selection = select_files(
        listing.files, formats=_formats(registry), include_code=include_code, include_pickles=include_pickles
    )
    require_weights(listing, selection)
    _say_what_is_checked(asked.directory, selection)
    plan = plan_download(listing, selection.files, asked.directory)
    if not as_json:
        _show(plan, selection, files=dry_run)
    plan.check_disk()
    if not dry_run:
        try:
            with PullProgress(plan) as progress:
                download(plan, progress, jobs)
        except (KeyboardInterrupt, NpuZooError):
            note(f"what has come is kept in {asked.directory}; this goes on with it: {asked.command()}")
            raise
    command = None if dry_run else _run_command(asked, registry)
    if as_json:
        print_json(_data(asked, plan, selection, dry_run=dry_run, command=command))
    elif command:
        print(f"\nrun it: {command}")


def _find(registry: Registry, model: str, source: Source | None) -> tuple[str, str, str]:
    """The model with its variant, the source and the repository there."""
    family, variant = registry.find(model)
    variant = variant or family.variant(family.default_variant)
    assert variant is not None  # FamilySpec checks default_variant
    repositories = _repositories(variant)
    name = f"{family.name}:{variant.name}"
    if not repositories:
        why = "ships inside the package" if variant.bundled else "stands for any weights of the family"
        listed = ", ".join(_pullable(family))
        raise UsageError(f"{name} {why}, so there is nothing to pull; variants to pull: {listed or 'none'}")
    chosen = source.value if source else next(iter(repositories))
    if chosen not in repositories:
        (other,) = repositories
        raise UsageError(f"{name} has no repository on {chosen}; {other} has {repositories[other]}: --source {other}")
    return name, chosen, repositories[chosen]


def _repositories(variant: VariantSpec) -> dict[str, str]:
    known = {Source.huggingface.value: variant.huggingface, Source.modelscope.value: variant.modelscope}
    return {source: repository for source, repository in known.items() if repository}


def _pullable(family: FamilySpec) -> list[str]:
    return [f"{family.name}:{variant.name}" for variant in family.variants if _repositories(variant)]


def _formats(registry: Registry) -> list[str]:
    return [pattern for spec in registry.weight_formats.values() if spec.loadable for pattern in spec.patterns]


def _say_what_is_checked(directory: Path, selection: Selection) -> None:
    there = [file for file in selection.files if (directory / file.path).exists()]
    if there:
        note(f"checking {count_text(there)} that {directory} has already")


def _run_command(asked: _Pull, registry: Registry) -> str | None:
    """The command that runs what was downloaded; where it must be converted first a note says how."""
    try:
        detect_format(asked.directory, registry.weight_formats)
    except WeightsError as error:
        note(str(error))
        return None
    return shlex.join(["npu-zoo", "run", "--model", asked.model, "--weights", str(asked.directory)])


def _show(plan: DownloadPlan, selection: Selection, *, files: bool) -> None:
    listing = plan.listing
    commit = f" (commit {listing.commit})" if listing.commit else ""
    resumed = f", {size_text(plan.resumed)} of it here from before" if plan.resumed else ""
    fields = {
        "repository": f"{listing.repository} on {listing.title}",
        "revision": listing.revision + commit,
        "directory": str(plan.directory),
        "here already": count_text(plan.present) if plan.present else "",
        "to download": f"{size_text(plan.size)} in {count_text(plan.missing)}{resumed}" if plan.missing else "nothing",
        "free disk": size_text(plan.free),
    }
    print_fields({name: value for name, value in fields.items() if value})
    if files:
        print()
        states = _states(plan, dry_run=True)
        print_table(("file", "size", "state"), [(f.path, size_text(f.size), states[f.path]) for f in selection.files])
    if selection.left_out:
        print_items("left out", [_left_out(reason, found) for reason, found in selection.left_out.items()])
    unverified = [file.path for file in selection.files if not file.identity]
    if unverified:
        note(f"{listing.title} gives no hash of {', '.join(unverified)}; their size alone is checked")
    sys.stdout.flush()


def _left_out(reason: str, files: tuple[RemoteFile, ...]) -> str:
    names = ", ".join(file.path for file in files[:6]) + (f" and {len(files) - 6} more" if len(files) > 6 else "")
    way = f"; {_OPTIONS[reason]}" if reason in _OPTIONS else ""
    return f"{reason}, {size_text(sum(file.size for file in files))}: {names}{way}"


def _states(plan: DownloadPlan, *, dry_run: bool) -> dict[str, str]:
    present = dict.fromkeys((file.path for file in plan.present), "present")
    return {**present, **{file.path: "missing" if dry_run else "downloaded" for file in plan.missing}}


def _data(
    asked: _Pull, plan: DownloadPlan, selection: Selection, *, dry_run: bool, command: str | None
) -> dict[str, Any]:
    """A download as plain data, under the names of :data:`PULL_KEYS`."""
    states = _states(plan, dry_run=dry_run)
    hashes = {file.path: {"sha256": file.sha256, "git_sha1": file.git_sha1} for file in selection.files}
    return {
        "model": asked.model,
        "source": asked.source,
        "repository": asked.repository,
        "revision": plan.listing.revision,
        "commit": plan.listing.commit or None,
        "directory": str(asked.directory),
        "dry_run": dry_run,
        "files": [
            {"path": file.path, "size": file.size, **hashes[file.path], "state": states[file.path]}
            for file in selection.files
        ],
        "left_out": [
            {"path": file.path, "size": file.size, "reason": reason}
            for reason, files in selection.left_out.items()
            for file in files
        ],
        "bytes": plan.size,
        "bytes_resumed": plan.resumed,
        "bytes_free": plan.free,
        "command": command,
    }
