"""Run by path: ``python …/worker ENGINE [CORES]``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    """Import this folder as a package of its own name, without leaving its neighbours importable."""
    # The first entry is this folder, whose modules are no top-level ones.
    sys.path[0] = str(FOLDER.parent)
    serving = importlib.import_module(f"{FOLDER.name}.serving")
    del sys.path[0]
    serving.main(sys.argv[1:])


if __name__ == "__main__":
    main()
