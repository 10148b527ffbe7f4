"""Install npu-zoo and an example plugin as their users would, and run what the plugin's author and its users run.

Both are built and installed with pip into a virtual environment of their own, from copies, so that nothing is built in
this tree and nothing is imported from it. Third parties' packages are seen where this interpreter has them; nothing is
downloaded. Everything lies in a temporary directory, which is removed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "npu-zoo-qwen3"
PLUGIN = "qwen3"
BUILT = ("npu_zoo", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
"""What the package is built of."""

REFUSED = 3


class Environment:
    """A virtual environment whose interpreter also finds the packages of this one, after its own."""

    def __init__(self, directory: Path) -> None:
        venv.EnvBuilder(symlinks=True).create(directory)
        self.bin, self._directory = directory / "bin", directory
        purelib = Path(sysconfig.get_path("purelib", vars={"base": str(directory), "platbase": str(directory)}))
        shared = sysconfig.get_path("purelib")
        (purelib / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n", "utf-8")

    def install(self, *sources: str) -> None:
        """Build wheels of source trees and install them; everything else that they require must be there."""
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "--python", str(self._directory)]
        run([*pip, "install", "--no-index", "--no-build-isolation", *sources], self._directory)

    def run(self, command: str, *arguments: str, cwd: Path, expected: int = 0) -> str:
        """Run a program of the environment; see :func:`run`."""
        return run([str(self.bin / "python"), "-m", command, *arguments], cwd, expected)


def run(command: Sequence[str], cwd: Path, expected: int = 0) -> str:
    """Run a command and give its standard output, of which the last line is shown, or all where it fails.

    Raises:
        SystemExit: it ends with another code than ``expected``.
    """
    told = " ".join(("python", *command[1:]))
    print(f"$ {told}", flush=True)
    begin = time.monotonic()
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "NPU_ZOO_PLUGINS")}
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != expected:
        print(done.stdout, end="")
        raise SystemExit(f"error: {told} ended with {done.returncode}, and {expected} is due")
    last = (done.stdout.strip().splitlines() or [""])[-1]
    print(f"  {last} ({time.monotonic() - begin:.1f} s)", flush=True)
    return done.stdout


def copy_sources(directory: Path) -> tuple[Path, Path]:
    """Copies of what both packages are built of, without what a build has left in the tree."""
    zoo, example = directory / "npu-zoo", directory / EXAMPLE.name
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".*_cache")
    zoo.mkdir()
    for name in BUILT:
        place = ROOT / name
        if place.is_dir():
            shutil.copytree(place, zoo / name, ignore=leave)
        else:
            shutil.copy(place, zoo / name)
    shutil.copytree(EXAMPLE, example, ignore=leave)
    return zoo, example


def check(directory: Path) -> None:
    """Install both packages under a directory and run everything."""
    zoo, example = copy_sources(directory)
    environment = Environment(directory / "environment")
    environment.install(str(zoo), f"{example}[test]")
    where = run([str(environment.bin / "python"), "-c", "import npu_zoo; print(npu_zoo.__file__)"], directory)
    if not Path(where.strip()).is_relative_to(environment.bin.parent):
        raise SystemExit(f"error: npu_zoo is imported from {where.strip()}, not from {environment.bin.parent}")
    environment.run("pytest", "-q", "-p", "no:cacheprovider", cwd=example)
    listed = json.loads(environment.run("npu_zoo", "plugins", "--json", cwd=directory))
    record = next(record for record in listed if record["name"] == PLUGIN)
    if record["state"] != "loaded" or record["remarks"]:
        raise SystemExit(f"error: plugin {PLUGIN} is {record['state']}: {record['error'] or record['remarks']}")
    model = ("--model", f"{PLUGIN}:0.6b", "--hardware", "cpu", "--dtype", "bfloat16", "--attention", "paged")
    environment.run("npu_zoo", "check", *model, "--quantization", "int8_rows", cwd=directory)
    environment.run("npu_zoo", "check", *model, "--quantization", "w4a16", cwd=directory, expected=REFUSED)
    environment.run("npu_zoo", "explain", *model, cwd=directory)
    suite = ("--npu-zoo-plugin", PLUGIN, "--npu-zoo-level", "build")
    environment.run("pytest", "-q", "-p", "no:cacheprovider", *suite, cwd=directory)
    environment.run("npu_zoo", "validate", "--plugin", PLUGIN, "--level", "run", cwd=directory)


def main() -> None:
    """Check, and say how long it took."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="npu-zoo-example-") as directory:
        check(Path(directory))
    print(f"{EXAMPLE.name} is as its users need it ({time.monotonic() - begin:.0f} s)")


if __name__ == "__main__":
    main()
