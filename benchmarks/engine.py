"""Compare npu-zoo with other engines on random weights: all cases of a shape by one command, which can be interrupted.

    python benchmarks/engine.py --shape 1.3b --engine-python vllm=PYTHON --engine-python llama.cpp=PYTHON --records DIR

A client of ``npu-zoo bench compare``'s own machinery: it makes the checkpoints and their GGUF files, and keeps a record
for each form of the weights (``1.3b.json``, ``1.3b-w8a16.json``), written after every case; ``--resume`` goes on with
what is missing. ``performance.py`` makes docs/performance.md of records.

Decoding is told from prefill by the moments at which tokens arrive, on all sides alike. Decode counts the tokens that
arrive after the moment at which every request of the batch has its first one, over the time from then to the last. So a
run needs no second one to subtract, and no side profits from how it orders prefill and decoding before that moment.

This process imports no torch: it starts workers, passes them requests, and waits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

from harness.shapes import SHAPES, Shape
from harness.suite import CASES, FEWER, GROUPS, Group, Setting, correctness, parse_fewer, prepare
from harness.targets import Verdict, verdicts

from npu_zoo.core.errors import NpuZooError, UsageError
from npu_zoo.evaluation.peers.cases import CATALOGUE
from npu_zoo.evaluation.peers.comparison import Step
from npu_zoo.evaluation.peers.engines import ENGINES, SUBJECT, find_engines, parse_interpreters, parse_names
from npu_zoo.evaluation.peers.preparation import weight_bytes
from npu_zoo.evaluation.peers.result import ComparisonBody, EngineEntry
from npu_zoo.evaluation.peers.session import Session
from npu_zoo.evaluation.peers.table import HEADS, remarks, table_rows
from npu_zoo.evaluation.record import ResultRecord, read_record, require_record_place, write_record
from npu_zoo.parallel.processes import exit_on_sigterm

BUSY = 0.5
INTERRUPTED = 130


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="1.3b", help="model shape; tiny ones check the script itself")
    add("--engines", type=_engines, help=f"peers, comma-separated: {', '.join(ENGINES)}; default: what is installed")
    add("--engine-python", action="append", default=[], metavar="NAME=PYTHON", help="the interpreter that has a peer")
    add("--groups", type=_groups, default=list(GROUPS), help=f"forms of the weights: {', '.join(GROUPS)}; default: all")
    add("--cases", type=_cases, default=list(CASES), help=f"comma-separated: {', '.join(CATALOGUE)}")
    add("--rounds", type=int, default=3, help="pairs of runs per case")
    add("--fewer", action="append", metavar="ENGINE:CASE=N", help=f"a peer's rounds in a case; default: {_told(FEWER)}")
    add("--threads", type=int, default=2, help="threads, and cores that all systems are pinned to")
    add("--hardware", default="cpu", choices=("cpu", "cuda"), help="where models run")
    add("--experts", default="eager", help="transformers' experts_implementation")
    add("--workdir", type=Path, default=Path("build/benchmarks"), help="cache of checkpoints")
    add("--records", type=Path, default=Path("build/benchmarks/records"), help="where records are kept")
    add("--note", action="append", default=[], help="what a reader has to know, such as how a peer was built")
    add("--resume", action="store_true", help="go on with records that are there already")
    add("--check", action="store_true", help="exit 1 when a case misses its target")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads are at least 1")
    return options


def _told(fewer: dict[tuple[str, str], int]) -> str:
    return ", ".join(f"{engine}:{case}={count}" for (engine, case), count in fewer.items())


def _engines(value: str) -> list[str]:
    try:
        return parse_names(value)
    except NpuZooError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _groups(value: str) -> list[str]:
    return _listed(value, "group", list(GROUPS))


def _cases(value: str) -> list[str]:
    return _listed(value, "case", list(CATALOGUE))


def _listed(value: str, kind: str, known: list[str]) -> list[str]:
    names = value.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"no {kind} {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def setting_of(options: argparse.Namespace) -> Setting:
    """What all groups have in common.

    Raises:
        NpuZooError: an engine is unknown or not there.
    """
    names = list(dict.fromkeys([SUBJECT, *options.engines])) if options.engines else None
    engines, missing = find_engines(names, parse_interpreters(options.engine_python))
    for name, how in missing.items():
        _say(f"{name} is left out: {how}")
    return Setting(
        workdir=options.workdir.resolve(),
        engines=tuple(engines),
        hardware=options.hardware,
        threads=options.threads,
        rounds=options.rounds,
        experts=options.experts,
        fewer=FEWER if options.fewer is None else parse_fewer(options.fewer),
    )


def record_file(folder: Path, shape: str, group: Group) -> Path:
    """Where a group's record is kept."""
    return folder / (f"{shape}.json" if group.plain else f"{shape}-{group.name}.json")


class Run:
    """One group of a shape, from its session to its record."""

    def __init__(self, setting: Setting, shape: Shape, group: Group, cases: list[str], file: Path) -> None:
        self.setting, self.shape, self.file = setting, shape, file
        self.session: Session = prepare(setting, shape, group, cases)
        # Where things lie here tells a reader of the record nothing.
        self.session.body.engines = [_without_places(entry, setting.workdir) for entry in self.session.body.engines]
        self._arguments = {
            "benchmark": "engine",
            "shape": json.loads(json.dumps(dataclasses.asdict(shape))),
            "group": group.name,
            "weight_bytes": weight_bytes(self.session.config),
            "group_size": group.group_size,
            "experts_implementation": setting.experts if shape.experts else None,
        }

    def resume(self) -> None:
        """Go on with the record that is there.

        Raises:
            UsageError: it is of something else.
        """
        earlier = read_record(self.file, "bench compare")
        self.session.resume(earlier)
        self.session.body.correctness = ComparisonBody.model_validate(earlier.body).correctness

    def measure(self) -> ComparisonBody:
        """Run what is missing; the record is written after every case."""
        if self.session.cases:
            body = self.session.body
            if self.shape.name != self.shape.small and not body.correctness:
                body.correctness = correctness(self.setting, SHAPES[self.shape.small])
            for result in self.session.run(_tell, divisor=self.shape.divisor):
                for name, why in result.failures.items():
                    _say(f"{result.name}: {name} failed, {why}")
                self._write()
            self._write()
        return self.session.body

    def _write(self) -> None:
        write_record(self.record(), self.file)

    def record(self) -> ResultRecord:
        """What is known so far."""
        return self.session.record(self._arguments)


def _missing(setting: Setting, group: Group, cases: list[str]) -> str:
    """What a group cannot be run without; empty where it can."""
    if not cases:
        return "it has no case that was asked for"
    if not group.plain and setting.llama_python is None:
        return "llama.cpp is not there"
    return "" if group.packed or setting.hardware == "cpu" else "weights are packed on CPUs alone"


def _without_places(entry: EngineEntry, workdir: Path) -> EngineEntry:
    options = json.loads(json.dumps(entry.options).replace(f"{workdir}/", ""))
    return entry.model_copy(update={"python": Path(entry.python).name, "options": options})


def measure(options: argparse.Namespace) -> list[Verdict]:
    """Run all groups that are asked for; what they missed and held of their targets.

    Raises:
        NpuZooError: npu-zoo or all peers cannot run.
    """
    setting, shape = setting_of(options), SHAPES[options.shape]
    load, found = os.getloadavg()[0], []
    if load > BUSY:
        _say(f"warning: a load of {load:.1f} before the start; other work on this machine distorts all figures")
    for group in (GROUPS[name] for name in options.groups):
        cases = group.cases(options.cases)
        if missing := _missing(setting, group, cases):
            _say(f"{group.name} is left out: {missing}")
            continue
        file = record_file(options.records, shape.name, group)
        require_record_place(file, "bench compare")
        if file.exists() and file.stat().st_size and not options.resume:
            raise UsageError(f"{file} exists; give --resume to go on with it, or another place in --records")
        _say(f"{shape.name}, {group.name}: {', '.join(engine.name for engine in group.engines(setting.engines))}")
        run = Run(setting, shape, group, cases, file)
        if file.exists() and file.stat().st_size:
            run.resume()
        else:
            run.session.body.notes += [f"a load of {load:.1f} before the start", *options.note]
        _report(run.measure())
        found += verdicts(run.record())
    return found


def _report(body: ComparisonBody) -> None:
    rows = [HEADS, *table_rows(body)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\n".join(f"- {line}" for line in remarks(body)), flush=True)


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _tell(step: Step) -> None:
    _say(f"{step.done}/{step.total} {step.text}")


def main(arguments: list[str] | None = None) -> int:
    """Run, report, and judge where that was asked for."""
    options = parse_arguments(arguments)
    try:
        with exit_on_sigterm():
            found = measure(options)
    except (OSError, NpuZooError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on", file=sys.stderr)
        return INTERRUPTED
    missed = [verdict for verdict in found if not verdict.held]
    for verdict in missed:
        print(f"below target: {verdict.sentence}", file=sys.stderr)
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
