"""``bench compare``: the same work on npu-zoo and on other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from npu_zoo.cli.options import request_options
from npu_zoo.evaluation.peers.cases import CATALOGUE, DEFAULT_CASES
from npu_zoo.settings import Settings

_ENGINES_HELP = "Engines, comma-separated; the first is compared with the others. Default: npu-zoo and all installed."
_PYTHON_HELP = "The interpreter of the environment that has an engine; repeatable. Default: this one."
_CASES_HELP = (
    f"Cases, comma-separated: {', '.join(CATALOGUE)}; or pairs of lengths, such as [[2048,2048],[256,256]]. "
    f"Default: {', '.join(DEFAULT_CASES)}."
)
_BATCH_HELP = "Batch sizes of pairs: 1, or 1,4 for all, or [[1,4],[8]] with a list for each pair. Default: 1."
_GGUF_HELP = "The model as llama.cpp takes it; its convert_hf_to_gguf.py makes one of a checkpoint."
_JSON_HELP = "Write the record, with all samples, after every case."


def _option(help_text: str, *flags: str, metavar: str | None = None) -> Any:
    return typer.Option(*flags, help=help_text, metavar=metavar, rich_help_panel="Comparison")


@request_options(engine=True)
def compare(
    settings: Settings,
    engines: Annotated[str | None, _option(_ENGINES_HELP, "--engines", metavar="NAME,…")] = None,
    engine_python: Annotated[list[str] | None, _option(_PYTHON_HELP, "--engine-python", metavar="NAME=PYTHON")] = None,
    cases: Annotated[str | None, _option(_CASES_HELP, "--cases", metavar="CASE,…")] = None,
    batch: Annotated[str | None, _option(_BATCH_HELP, "--batch", metavar="N,…")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, metavar="N", rich_help_panel="Comparison")] = 3,
    gguf: Annotated[Path | None, _option(_GGUF_HELP, "--gguf", metavar="FILE")] = None,
    json_file: Annotated[Path | None, _option(_JSON_HELP, "--json", metavar="FILE")] = None,
) -> None:
    """Run the same work on npu-zoo and on other engines, in turn, and show medians and ratios.

    Each engine is one loaded process on the same cores, and who runs first changes from round to round. A ratio is the
    median of the rounds' pairs, with the lowest and highest; above 1 the first engine is better, whatever the unit.
    """
    asked = {
        "engines": engines,
        "engine_python": engine_python,
        "cases": cases,
        "batch": batch,
        "rounds": rounds,
        "gguf": gguf and str(gguf),
    }
    # Its imports would slow every other command's start.
    from npu_zoo.cli.bench.compare_run import run_comparison

    run_comparison(settings.args, asked, gguf, json_file)
