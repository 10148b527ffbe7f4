"""Compare npu-zoo with transformers' generate on random weights: ``npu-zoo bench compare``, and a page of it.

    python benchmarks/engine.py [--shape tiny] [--cases decode-1,mixed] [--json FILE] [--markdown FILE]

Decoding is told from prefill by the moments at which tokens arrive, on both sides alike: transformers reports each
step's tokens to a streamer, npu-zoo to ``on_output``. Decode counts the tokens that arrive after the moment at which
every request of the batch has its first one, over the time from then to the last token. So a run needs no second one
to subtract, and neither side profits from how it orders prefill and decoding before that moment. The rest of the
method is printed with the result (``harness/report.py``).

This process imports no torch: it starts workers, passes them requests, and waits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from harness import report
from harness.checkpoint import REFERENCE, ensure_checkpoint
from harness.shapes import SHAPES, Shape

from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import NpuZooError, UsageError
from npu_zoo.evaluation.peers.cases import CATALOGUE, Case
from npu_zoo.evaluation.peers.comparison import Step
from npu_zoo.evaluation.peers.engines import find_engines
from npu_zoo.evaluation.peers.process import PeerError, PeerProcess
from npu_zoo.evaluation.peers.session import Session, checked_request
from npu_zoo.evaluation.record import ResultRecord, write_record

SYSTEM_NAMES = (report.SUBJECT, report.PEER)
BUSY = 0.5
CORRECTNESS = Case("correctness", "correctness", "total", 8, (3, 90), (32, 32))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.3b", help="model shape; tiny checks the script itself")
    parser.add_argument(
        "--cases", type=_case_names, default=list(CATALOGUE), help=f"comma-separated: {', '.join(CATALOGUE)}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs per case")
    parser.add_argument("--threads", type=int, default=2, help="threads, and cores that both systems are pinned to")
    parser.add_argument("--workdir", type=Path, default=Path("build/benchmarks"), help="cache of checkpoints")
    parser.add_argument("--json", type=Path, help="write the record: machine, versions, all samples")
    parser.add_argument("--markdown", type=Path, help="write the report")
    parser.add_argument(
        "--from",
        dest="records",
        type=Path,
        nargs="+",
        metavar="RECORD",
        help="report earlier records instead of running; those of one shape come together, and are of one machine",
    )
    parser.add_argument("--experts", default="eager", help="transformers' experts_implementation")
    parser.add_argument("--check", action="store_true", help="exit 1 when a ratio is below its case's target")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads are at least 1")
    return options


def _case_names(value: str) -> list[str]:
    names = value.split(",")
    unknown = [name for name in names if name not in CATALOGUE]
    if unknown:
        raise argparse.ArgumentTypeError(f"no case {', '.join(unknown)}; there are {', '.join(CATALOGUE)}")
    return names


def session_of(shape: Shape, options: argparse.Namespace, cases: list[Case]) -> Session:
    """The comparison on a shape's checkpoint, which is written where it does not exist."""
    weights = _checkpoint(shape, options.workdir.resolve())
    asked = EngineArgs(
        model=shape.model,
        weights=str(weights),
        hardware="cpu",
        dtype=shape.dtype,
        max_model_len=shape.max_model_len,
        kv_cache_memory=shape.kv_cache_memory,
        threads=options.threads,
    )
    beside = weights / REFERENCE
    peer = {
        "weights": str(beside if beside.is_dir() else weights),
        "settings": {"experts_implementation": options.experts} if shape.experts else {},
    }
    args, config = checked_request(asked)
    engines, _ = find_engines(SYSTEM_NAMES)
    return Session.prepare(args, config, engines, cases, rounds=options.rounds, overrides={report.PEER: peer})


def _checkpoint(shape: Shape, root: Path) -> Path:
    _say(f"checkpoint of shape {shape.name} in {shape.dtype}")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(ensure_checkpoint, root, shape).result()


def check_correctness(session: Session) -> dict[str, int]:
    """Greedy tokens of a small float32 model: npu-zoo in one batch, transformers one request at a time.

    Raises:
        PeerError: they differ.
    """
    requests = CORRECTNESS.requests(session.conditions.num_tokens, 0)
    found = {}
    for engine, batch in zip(session.engines, (0, 1), strict=True):
        with PeerProcess(engine, session.conditions.threads, session.conditions.cores) as process:
            process.load(session.options[engine.name])
            found[engine.name] = process.run(requests, batch).token_ids
    own, other = (found[name] for name in SYSTEM_NAMES)
    equal = sum(left == right for left, right in zip(own, other, strict=True))
    if equal < len(requests):
        raise PeerError(f"greedy tokens differ in {len(requests) - equal} of {len(requests)} requests: {found}")
    return {"requests": len(requests), "equal": equal, "tokens": sum(map(len, own))}


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _tell(step: Step) -> None:
    _say(f"{step.done}/{step.total} {step.text}")


def _write(target: Path | None, content: str) -> None:
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content, encoding="utf-8")


def measure(options: argparse.Namespace) -> report.Record:
    """Run the selected cases and return the record; it is written after every case.

    Raises:
        PeerError: an engine failed in a case.
    """
    load = os.getloadavg()[0]
    if load > BUSY:
        _say(f"warning: a load of {load:.1f} before the start; other work on this machine distorts all figures")
    shape = SHAPES[options.shape]
    small = dataclasses.replace(SHAPES[shape.small], dtype="float32")
    more = {
        "shape": dataclasses.asdict(shape),
        "experts_implementation": options.experts if shape.experts else None,
        "correctness": check_correctness(session_of(small, options, [CORRECTNESS])),
        "load_average": load,
    }
    session = session_of(shape, options, [CATALOGUE[name].scaled(shape.divisor) for name in options.cases])
    for result in session.run(_tell, divisor=shape.divisor):
        if result.failures:
            raise PeerError(f"{result.name}: {result.failures}")
        record = _with_body(session, more)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_record(record, options.json)
    return report.as_page_record(record)


def _with_body(session: Session, more: dict[str, Any]) -> ResultRecord:
    record = session.record({"shape": more["shape"]["name"], "cases": [case.name for case in session.cases]})
    return record.model_copy(update={"body": {**record.body, **more}})


def read_records(paths: list[Path]) -> list[report.Record]:
    """Earlier records, those of one shape as one.

    Raises:
        UsageError: records of one shape are of other machines or versions, or of another way to compute experts.
    """
    found: dict[str, tuple[Path, report.Record]] = {}
    for path in paths:
        record = _read(path)
        first_path, first = found.setdefault(record["shape"]["name"], (path, record))
        if first is record:
            continue
        differing = [key for key in ("shape", "machine") if _lasting(record[key]) != _lasting(first[key])]
        differing += ["experts_implementation"] if _peer(record) != _peer(first) else []
        if differing:
            raise UsageError(f"{path} differs from {first_path} in its {' and '.join(differing)}; report it by itself")
        first["cases"] += record["cases"]
        first["measurements"] += record["measurements"]
    return [record for _, record in found.values()]


def _read(path: Path) -> report.Record:
    data: report.Record = json.loads(path.read_text(encoding="utf-8"))
    return report.as_page_record(ResultRecord.model_validate(data)) if "kind" in data else data


def _peer(record: report.Record) -> str | None:
    # Records of models without experts may be older than the field.
    return record.get("experts_implementation")


def _lasting(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key != "load_average"}


def main(arguments: list[str] | None = None) -> int:
    """Run or read a record, report it, and judge it where that was asked for."""
    options = parse_arguments(arguments)
    try:
        records = read_records(options.records) if options.records else [measure(options)]
    except (OSError, NpuZooError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.text(records))
    _write(options.markdown, report.markdown(records))
    missed = [row for record in records for row in report.rows_of(record) if row.missed]
    for row in missed:
        print(f"below target: {row.name} has {row.ratio:.2f}, not {row.target}", file=sys.stderr)
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
