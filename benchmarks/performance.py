"""Write docs/performance.md and its charts from records of engine.py and long_context.py.

    python benchmarks/performance.py [--check] [RECORD …]

Without records it takes those of benchmarks/records, in folders or not. Why a target is missed stands in
performance_notes.json, by processor and case: a note on a case that misses nothing is refused, so that none outlives
its reason.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.notes import Notes, read_notes, require_matching
from harness.page import page
from harness.pictures import digest, pictures, read_digest, write_pictures
from harness.records import Records, read_records
from harness.targets import verdicts

from npu_zoo.core.errors import NpuZooError
from npu_zoo.testing.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
RECORDS, NOTES, DOCS = ROOT / "benchmarks" / "records", ROOT / "benchmarks" / "performance_notes.json", ROOT / "docs"
PAGE = "performance.md"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("records", type=Path, nargs="*", metavar="RECORD", help="default: all in benchmarks/records")
    parser.add_argument("--notes", type=Path, default=NOTES, help="why targets are missed")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page and its charts are")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something would change")
    return parser.parse_args(arguments)


def stale(records: Records, notes: Notes, docs: Path) -> list[str]:
    """Files that are not as the records have them."""
    path = docs / PAGE
    found = [] if path.is_file() and path.read_text(encoding="utf-8") == page(records, notes, docs) else [PAGE]
    return found + [name for name, charts in pictures(records).items() if read_digest(docs / name) != digest(charts)]


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or say what is stale."""
    options = parse_arguments(arguments)
    try:
        records = read_records(options.records or sorted(RECORDS.rglob("*.json")))
        notes = read_notes(options.notes)
        judged = {
            processor: [found for one in compared for found in verdicts(one.record)]
            for processor, compared in records.by_processor.items()
        }
        require_matching(notes, judged)
        if options.check:
            changed = stale(records, notes, options.docs)
            for name in changed:
                print(f"{options.docs / name} is stale: run benchmarks/performance.py", file=sys.stderr)
            return 1 if changed else 0
        write_whole(options.docs / PAGE, page(records, notes, options.docs))
        write_pictures(pictures(records), options.docs)
        for processor, verdict in [(processor, one) for processor, found in judged.items() for one in found]:
            if not verdict.held and verdict.key not in notes.get(processor, {}):
                told = f"{verdict.key} on {processor}: {verdict.sentence}"
                print(f"{options.notes.name} has nothing on {told}", file=sys.stderr)
    except (OSError, NpuZooError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
