"""``npu-zoo ranktable``: HCCL's tables, written and checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from npu_zoo.cli.ranktable import CHECK_KEYS

ROOT = Path(__file__).parents[2]
HCCN = "address_0=192.168.1.8\nnetmask_0=255.255.255.0\naddress_1=192.168.1.9\n"


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Ran]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "rt.json"


def test_write_and_check(cli: Cli, out: Path) -> None:
    servers = ["--server", "10.0.0.1=0-1:192.168.1.8,192.168.1.9", "--server", "10.0.0.2=0,1:192.168.2.8,192.168.2.9"]
    ran = cli("ranktable", "write", str(out), *servers, "--hardware", "atlas_300i_duo")
    assert (ran.code, ran.err) == (0, "")
    assert "has 4 ranks on 2 servers" in ran.out
    table = json.loads(out.read_text())
    ranks = [[d["rank_id"] for d in server["device"]] for server in table["server_list"]]
    assert ranks == [["0", "1"], ["2", "3"]]
    checked = cli("ranktable", "check", str(out), "--hardware", "atlas_300i_duo")
    assert checked.code == 0
    assert [line.split() for line in checked.out.splitlines()[2:6]] == [
        ["0", "10.0.0.1", "0", "192.168.1.8"],
        ["1", "10.0.0.1", "1", "192.168.1.9"],
        ["2", "10.0.0.2", "0", "192.168.2.8"],
        ["3", "10.0.0.2", "1", "192.168.2.9"],
    ]
    assert "is fit: 4 ranks on 2 servers" in " ".join(checked.out.split())


def test_check_as_json_has_the_documented_keys(cli: Cli, out: Path) -> None:
    assert cli("ranktable", "write", str(out), "--server", "a=2,0").code == 0
    report = json.loads(cli("ranktable", "check", str(out), "--json").out)
    assert {*report, *(f"servers[].{key}" for server in report["servers"] for key in server)} == set(CHECK_KEYS)
    (server,) = report["servers"]
    assert (server["ranks"], server["devices"], server["addresses"]) == ([0, 1], [2, 0], [None, None])
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").split("## `npu-zoo ranktable check`")[1]
    assert [key for key in CHECK_KEYS if f"`{key}`" not in page.split("\n## ")[0]] == []


def test_addresses_of_hccn_conf(cli: Cli, out: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.conf", tmp_path / "second.conf"
    first.write_text(HCCN)
    second.write_text(HCCN.replace(".1.", ".2."))
    ran = cli("ranktable", "write", str(out), "--server", "a=0-1", "--hccn", str(first))
    assert ran.code == 0, ran.err
    out.unlink()
    both = ["--server", "a=0-1", "--server", "b=0-1"]
    ran = cli("ranktable", "write", str(out), *both, "--hccn", f"a={first}", "--hccn", f"b={second}")
    assert ran.code == 0, ran.err
    listed = [d["device_ip"] for server in json.loads(out.read_text())["server_list"] for d in server["device"]]
    assert listed == ["192.168.1.8", "192.168.1.9", "192.168.2.8", "192.168.2.9"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--server", "a=0", "--server", "b=0", "--hccn", "CONF"], "2 of those that are given have no addresses yet"),
        (["--server", "a=0:1.1.1.1", "--hccn", "CONF"], "none of those that are given have no addresses yet"),
        (["--server", "a=0", "--hccn", "b=CONF"], "--hccn b=… is of no --server; there are a"),
        (["--server", "a=0", "--hccn", "a=CONF", "--hccn", "CONF"], "--hccn is given twice for a"),
        (["--server", "a=0:1.1.1.1", "--hccn", "a=CONF"], "a has its addresses already"),
        (["--server", "a=5", "--hccn", "CONF"], "no address of device 5"),
        (["--server", "a=0", "--hccn", "missing.conf"], "cannot read missing.conf: No such file"),
        (["--server", "a"], "is no ADDRESS=DEVICES[:IPS]"),
        (["--server", "a=0", "--server", "b=0"], "device_ip is missing of rank 0, 1"),
        (["--server", "a=0", "--hardware", "cpu"], "rank tables are of HCCL, on atlas_800i_a2"),
        ([], "--server"),
    ],
)
def test_what_cannot_be_written(
    arguments: list[str], words: str, cli: Cli, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("CONF").write_text(HCCN)
    ran = cli("ranktable", "write", str(out), *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["CONF"]


def test_a_file_that_exists_is_left_alone(cli: Cli, out: Path) -> None:
    out.write_text("mine")
    ran = cli("ranktable", "write", str(out), "--server", "a=0")
    assert ran.code == 2
    assert "it exists; delete it or choose another name" in ran.err
    assert out.read_text() == "mine"


def test_every_fault_of_a_file(cli: Cli, out: Path) -> None:
    device = {"device_id": "0", "rank_id": "1"}
    servers = [{"server_id": "a", "device": [device, device]}]
    out.write_text(json.dumps({"version": "1.0", "server_count": "2", "server_list": servers, "status": "no"}))
    ran = cli("ranktable", "check", str(out))
    assert (ran.code, ran.out) == (2, "")
    assert "the rank table has 5 faults:" in ran.err
    for words in ("status is 'no'", "server_count is 2", "device 0 2 times", "0 is missing", "rank 1 is given to 2"):
        assert words in ran.err


def test_files_that_cannot_be_read(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert "no text in UTF-8" in cli("ranktable", "check", str(tmp_path / "bytes")).err
    assert "cannot read" in cli("ranktable", "check", str(tmp_path)).err
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 30)
    assert "more than 64 MiB" in cli("ranktable", "check", str(tmp_path / "large")).err
