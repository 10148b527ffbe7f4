from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from npu_zoo import __version__
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.features import Conflict, FeatureRow
from npu_zoo.dispatch import resolve
from npu_zoo.registry import PluginRecord, get_registry
from npu_zoo.settings import SAMPLING_FIELDS, option_name


def test_version(cli: Callable) -> None:
    assert cli("--version") == (0, f"npu-zoo {__version__}\n", "")


def test_without_arguments_the_help_is_shown(cli: Callable) -> None:
    ran = cli()
    assert ran == cli("--help")
    assert ran.code == 0
    for name in ("run", "chat", "list", "matrix", "check", "explain", "plugins", "config"):
        assert f"\n  {name} " in ran.out


@pytest.mark.parametrize("command", ["list", "matrix", "plugins", "check", "explain", "run"])
def test_everything_fits_eighty_columns(cli: Callable, command: str) -> None:
    arguments = [command, "--help"] if command == "run" else [command]
    arguments += ["--model", "deepseek_coder:1.3b", "--hardware", "cpu"] if command in ("check", "explain") else []
    ran = cli(*arguments)
    assert ran.code == 0
    assert [line for line in ran.out.splitlines() if len(line) > 80 or line != line.rstrip()] == []


def test_list_names_every_variant_and_where_it_is_from(cli: Callable) -> None:
    text = cli("list").out
    for family in get_registry().families.values():
        section = text.partition(f"{family.name}: {family.title}")[2].partition("\n\n")[0]
        for variant in family.variants:
            line = next(line for line in section.splitlines() if line.startswith(f"{variant.name} "))
            assert (variant.huggingface or ("bundled" if variant.bundled else "--weights DIR")) in line


def test_list_as_json(cli: Callable) -> None:
    families = {family["name"]: family for family in json.loads(cli("list", "--json").out)}
    coder = families["deepseek_coder"]
    assert coder["plugin"] == "deepseek_coder"
    variant = next(v for v in coder["variants"] if v["name"] == "6.7b-instruct")
    assert variant["aliases"] == ["6.7b"]
    assert variant["huggingface"] == "deepseek-ai/deepseek-coder-6.7b-instruct"
    assert next(v for v in coder["variants"] if v["name"] == "demo")["bundled"] is True


def test_matrix_as_json_gives_the_rows_back(cli: Callable) -> None:
    ran = cli("matrix", "--json")
    assert ran == cli("matrix", "--format", "json")
    for part in json.loads(ran.out):
        rows = tuple(FeatureRow.model_validate(row) for row in part["rows"])
        assert rows == get_registry().families[part["family"]].rows


@pytest.mark.parametrize("form", ["table", "markdown", "html"])
def test_a_variants_matrix_holds_only_its_rows(cli: Callable, form: str) -> None:
    ran = cli("matrix", "deepseek_coder:33b", "--format", form)
    assert ran.code == 0
    assert "atlas_800t_a2" in ran.out
    rows = ran.out.partition('<details id="tables"')[2] if form == "html" else ran.out
    assert "atlas_300i_duo" not in rows.split("say no")[0]
    assert "README of MindFormers" in ran.out


@pytest.mark.parametrize("form", ["table", "markdown", "html"])
def test_every_form_of_the_matrix_tells_denials_conflicts_and_notes(
    cli: Callable, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    family = get_registry().families["deepseek_coder"]
    conflict = Conflict(first=("dtype", "float16"), second=("attention", "flash"), reason="they overflow together")
    changed = family.model_copy(update={"conflicts": (conflict,)})
    monkeypatch.setitem(get_registry().families, "deepseek_coder", changed)
    words = " ".join(html.unescape(cli("matrix", "--format", form).out).split())
    assert "dtype=float16 excludes attention=flash: they overflow together" in words
    for denial in family.denials:
        assert f"{denial.axis} {', '.join(str(value).lower() for value in denial.values)}: no, for " in words
        assert denial.reason in words
    notes = [row.note for row in family.rows if row.note]
    assert notes
    assert [note for note in notes if note not in words] == []


def test_plugins_shows_what_each_registered(cli: Callable) -> None:
    records = {record["name"]: record for record in json.loads(cli("plugins", "--json").out)}
    assert records["deepseek_coder"]["registered"]["families"] == ["deepseek_coder"]
    assert records["native"]["state"] == "loaded"
    assert records["native"]["error"] is None
    assert "engines: native" in cli("plugins").out


def test_plugins_shows_remarks_beside_what_loads(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "remark" not in cli("plugins").out
    monkeypatch.setitem(get_registry().plugins, "idle", PluginRecord("idle"))
    text = cli("plugins").out
    assert "remark" in text.splitlines()[0]
    assert re.search(r"^idle .* loaded .* registers\b", text, re.MULTILINE)
    record = next(r for r in json.loads(cli("plugins", "--json").out) if r["name"] == "idle")
    assert (record["state"], record["remarks"]) == ("loaded", ["registers nothing"])


def test_plugins_quotes_the_error_of_a_dropped_one(
    cli: Callable, monkeypatch: pytest.MonkeyPatch, fresh_registry: None
) -> None:
    monkeypatch.setenv("NPU_ZOO_PLUGINS", "no_such_plugin")
    ran = cli("plugins")
    assert ran.code == 0
    assert "no_such_plugin: UsageError: NPU_ZOO_PLUGINS names 'no_such_plugin'" in ran.out
    record = next(r for r in json.loads(cli("plugins", "--json").out) if r["name"] == "no_such_plugin")
    assert record["state"] == "dropped"
    assert "not installed" in record["error"]


def test_config_show_tells_origins(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: deepseek_coder\nsampling: {top_k: 5}\n")
    monkeypatch.setenv("NPU_ZOO_DTYPE", "bf16")
    arguments = ("config", "show", "--config", str(path), "--tp", "2", "--temperature", "0.5")
    data = json.loads(cli(*arguments, "--origin", "--json").out)
    assert data["settings"]["model"] == "deepseek_coder"
    assert data["sampling"] == {"top_k": 5, "temperature": 0.5}
    assert {key: data["origins"][key] for key in ("model", "dtype", "tensor_parallel_size", "engine")} == {
        "model": f"file {path}",
        "dtype": "environment NPU_ZOO_DTYPE",
        "tensor_parallel_size": "option --tp",
        "engine": "default",
    }
    assert data["origins"]["sampling.temperature"] == "option --temperature"
    lines = [line.split() for line in cli(*arguments, "--origin").out.splitlines()]
    assert ["dtype:", "bf16", "#", "environment", "NPU_ZOO_DTYPE"] in lines
    assert ["tensor_parallel_size:", "2", "#", "option", "--tp"] in lines


def test_config_show_says_what_an_unset_value_comes_to(cli: Callable) -> None:
    lines = [line.split(maxsplit=2) for line in cli("config", "show", "--dtype", "bf16").out.splitlines()]
    assert ["max_num_seqs:", "null", "# default: 64"] in lines
    assert ["hardware:", "null", "# default: detected"] in lines
    assert ["dtype:", "bf16"] in lines
    data = json.loads(cli("config", "show", "--dtype", "bf16", "--json").out)
    assert data["settings"]["max_num_seqs"] is None
    assert data["defaults"]["max_num_seqs"] == "64"
    assert set(data["defaults"]) == set(EngineArgs.model_fields) - {"dtype"}
    assert all(data["defaults"].values())


def test_the_defaults_of_config_show_are_what_a_request_gets(cli: Callable) -> None:
    defaults = json.loads(cli("config", "show", "--json").out)["defaults"]
    config = dataclasses.asdict(resolve(EngineArgs(model="deepseek_coder:demo", hardware="cpu")))
    plain = {key: text for key, text in defaults.items() if key in config and re.fullmatch(r"[\w.]+", text)}
    shown = {key: str(config[key]).lower() if isinstance(config[key], bool) else str(config[key]) for key in plain}
    assert {**plain, "hardware": "cpu"} == shown
    assert {"max_num_seqs", "max_num_batched_tokens", "seed", "strict_kernels"} <= set(plain)


def test_what_config_show_writes_is_a_configuration_file(cli: Callable, tmp_path: Path) -> None:
    arguments = (
        "config",
        "show",
        "--dtype",
        "no",
        "--weights",
        "/a b: c",
        "--stop",
        "a\n",
        "--stop",
        "#b",
        "--top-k",
        "3",
    )
    first = cli(*arguments, "--origin").out
    (tmp_path / "a.yaml").write_text(first)
    assert json.loads(cli("config", "show", "--config", str(tmp_path / "a.yaml"), "--json").out) == json.loads(
        cli(*arguments, "--json").out
    )


def test_every_field_of_a_request_has_its_option(cli: Callable) -> None:
    text = cli("run", "--help").out
    keys = [*EngineArgs.model_fields, *(f"sampling.{name}" for name in SAMPLING_FIELDS)]
    flags = [option_name(key).removeprefix("--") for key in keys]
    assert [flag for flag in flags if f"--{flag}" not in text and f"--[no-]{flag}" not in text] == []
    assert len(set(flags)) == len(flags)


@pytest.mark.parametrize("command", [("check",), ("explain",), ("run",), ("chat",), ("config", "show")], ids=" ".join)
def test_every_command_that_names_a_request_takes_the_same_options(cli: Callable, command: tuple[str, ...]) -> None:
    text = cli(*command, "--help").out
    named = "model weights hardware dtype tp pp ep dp world-size attention quantization kv-cache-dtype serving engine"
    assert [name for name in named.split() if f"  --{name}" not in text] == []
    assert "--[no-]allow-experimental" in text
