"""The page of the matrix in a headless Chromium: it says of every cell what the matrix says, and how to run it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.cli.matrix_page import page
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.evidence import row_digest
from npu_zoo.core.features import AXES, Conflict, FeatureRow, Verdict, layout_names, splits_of
from npu_zoo.core.hardware import PRODUCTS
from npu_zoo.core.specs import FamilySpec
from npu_zoo.dispatch import check, resolve
from npu_zoo.matrix_text import part_of
from npu_zoo.registry import get_registry
from npu_zoo.settings import ALIASES

FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
COMPLETE = {
    "attention": "paged",
    "quantization": "none",
    "kv_cache_dtype": "auto",
    "long_sequence": "false",
    "serving": "offline",
}
CELLS = [
    (family, size, hardware)
    for family in get_registry().families.values()
    for size in dict.fromkeys(variant.size for variant in family.variants)
    for hardware in PRODUCTS
]

OFFERED = ("supported", "experimental")

Wanted = Mapping[str, str]


@dataclasses.dataclass
class Browser:
    """A Chromium with the page of all families, or of one that is given."""

    driver: Any
    folder: Path
    shown: str = ""

    def write(self, name: str, *families: FamilySpec, stale: frozenset[tuple[str, str]] = frozenset()) -> str:
        """Write a page and return its URL."""
        file = self.folder / f"{name}.html"
        file.write_text(page([part_of(family, None) for family in families], stale), encoding="utf-8")
        return file.as_uri()

    def open(self, fragment: str = "", url: str = "") -> None:
        """Load a page as a browser does that gets its URL."""
        self.driver.get("about:blank")
        self.driver.get((url or self.shown) + (f"#{fragment}" if fragment else ""))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def filter(self, wanted: Wanted) -> dict[str, str]:
        """The state of every cell that is shown under some filters."""
        return self.driver.execute_async_script(
            """
            const done = arguments[1];
            const states = () => Object.fromEntries(
              [...document.querySelectorAll("#grid button")]
                .filter((button) => button.checkVisibility())
                .map((button) => [button.dataset.cell, button.dataset.state]));
            if (location.hash.slice(1) === arguments[0]) done(states());
            window.addEventListener("hashchange", () => done(states()), { once: true });
            location.hash = arguments[0];
            """,
            fragment(wanted),
        )

    def element(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def elements(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.element(selector).text)

    def press(self, key: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(key).perform()

    def choose(self, name: str, value: str) -> None:
        from selenium.webdriver.support.select import Select

        Select(self.element(f"select[name={name}]")).select_by_value(value)

    def pick(self, axis: str, value: str) -> None:
        """Choose a value of the first row in the panel."""
        self.element(f'#row-0 label:has(input[data-axis={axis}][value="{value}"])').click()

    def wait(self, script: str) -> None:
        """Wait until an expression of JavaScript is true."""
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 10, poll_frequency=0.02).until(
            lambda driver: driver.execute_script(f"return {script}")
        )

    def resize(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium with its chromedriver is installed: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    running = webdriver.Chrome(options=options, service=Service(driver))
    browser = Browser(running, tmp_path_factory.mktemp("pages"))
    browser.shown = browser.write("all", *get_registry().families.values())
    yield browser
    running.quit()


@pytest.fixture
def grid(chromium: Browser) -> Browser:
    """The page of all families, for tests that set filters alone."""
    if not chromium.driver.current_url.startswith(chromium.shown):
        chromium.open()
    return chromium


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """A wide window; a test that leaves an error in its console fails."""
    chromium.driver.get_log("browser")
    chromium.resize(1400)
    yield chromium
    assert chromium.driver.get_log("browser") == []


def fragment(wanted: Wanted) -> str:
    return "&".join(f"{name}={value}" for name, value in wanted.items())


def key(family: FamilySpec, size: str, hardware: str) -> str:
    return f"{family.name}:{size}@{hardware}"


def requests(wanted: Wanted, hardware: str) -> list[dict[str, Any]]:
    """What a filter on every axis asks for on one product; a kind of layout may be several splits of a world."""
    world = int(wanted["world_size"])
    splits = splits_of(wanted["parallelism"], world)
    shared = {**wanted, "hardware": hardware, "world_size": world, "long_sequence": wanted["long_sequence"] == "true"}
    return [{**{axis: shared[axis] for axis in AXES}, "parallelism": layout_names(split)} for split in splits]


def verdicts(family: FamilySpec, size: str, hardware: str, wanted: Wanted) -> list[Verdict]:
    """The matrix's answers; the one that supports the request, where there is one."""
    model, experimental = f"{family.name}:{size}", wanted.get("status") != "supported"
    found = []
    for request in requests(wanted, hardware):
        found.append(family.matrix.check(model, size, request, allow_experimental=experimental))
        if found[-1].supported:
            return found[-1:]
    return found


FULL = [
    {"dtype": dtype, "parallelism": layout, "world_size": world, **COMPLETE, **others}
    for dtype, layout, world, others in (
        ("float16", "tp", "2", {}),
        ("bfloat16", "tp", "1", {"status": "supported"}),
        ("bfloat16", "tp", "8", {"attention": "flash"}),
        ("bfloat16", "tp+ep", "8", {"quantization": "w4a16"}),
        ("float16", "tp+pp", "16", {}),
        ("float32", "pp+ep+dp", "4", {"kv_cache_dtype": "int8"}),
        ("float16", "tp", "4", {"serving": "mindie_service"}),
        ("float16", "tp", "1", {"quantization": "w8a8", "status": "supported"}),
        ("bfloat16", "tp", "3", {"long_sequence": "true"}),
    )
]


REASONS = """
    const [wanted, cells] = arguments;
    return cells.map(([name, size, hardware]) => {
      const family = data.families.find((one) => one.name === name);
      const cell = { family, size: family.sizes.find((one) => one.name === size), hardware };
      return rules.answer(cell, wanted).reasons.map((reason) => reason.text);
    });
"""


@pytest.mark.parametrize("wanted", FULL, ids=fragment)
def test_a_whole_request_is_answered_as_the_matrix_answers_it(grid: Browser, wanted: Wanted) -> None:
    shown = grid.filter(wanted)
    answers = {key(*cell): verdicts(*cell, wanted) for cell in CELLS}
    assert shown.keys() == answers.keys()
    offered = {name: found[0].status for name, found in answers.items() if found[0].supported}
    assert {name: state for name, state in shown.items() if state in OFFERED} == offered
    denied = {name for name, found in answers.items() if " says no" in found[0].describe()}
    assert {name for name, state in shown.items() if state == "denied"} == denied
    reasons = grid.run(REASONS, wanted, [(family.name, size, hardware) for family, size, hardware in CELLS])
    for name, given in zip(answers, reasons, strict=True):
        assert given in [[reason.message for reason in answer.reasons] for answer in answers[name]], name


PARTIAL = [
    {},
    {"dtype": "bfloat16"},
    {"world_size": "8"},
    {"dtype": "float16", "world_size": "16"},
    {"parallelism": "tp+pp"},
    {"parallelism": "tp+ep", "world_size": "16"},
    {"parallelism": "tp", "world_size": "3"},
    {"quantization": "w8a8", "dtype": "float16"},
    {"quantization": "w8a16", "kv_cache_dtype": "int8"},
    {"attention": "flash", "world_size": "8"},
    {"serving": "mindie_service", "dtype": "bfloat16"},
    {"status": "experimental", "dtype": "float16"},
    {"evidence": "simulated", "world_size": "4"},
    {"evidence": "claimed", "attention": "paged", "status": "supported"},
    {"hardware": "atlas_300i_duo", "dtype": "bfloat16"},
    {"model": "wizardcoder", "world_size": "8"},
    {"model": "deepseek_coder:33b"},
]


def holds(row: FeatureRow, hardware: str, wanted: Wanted) -> bool:
    """Whether one row has all that is wanted, its splits and its evidence those of one world size."""
    if hardware not in row.hardware or wanted.get("status", row.status) != row.status:
        return False
    plain = [axis for axis in wanted if axis in AXES and axis not in ("world_size", "parallelism", "hardware")]
    if any(wanted[axis] not in [str(value).lower() for value in row.values(axis)] for axis in plain):
        return False
    return any(
        wanted.get("world_size", str(world)) == str(world)
        and wanted.get("parallelism", layout_names(split)[1]) == layout_names(split)[1]
        and wanted.get("evidence", row.on(world).evidence) == row.on(world).evidence
        for world, layout in itertools.product(row.world_size, row.parallelism)
        for split in splits_of(layout, world)
    )


def expected_states(wanted: Wanted) -> dict[str, str]:
    """The cells that are left and offered: the model and hardware decide which are left."""
    left = [
        (family, size, hardware)
        for family, size, hardware in CELLS
        if wanted.get("hardware", hardware) == hardware
        and wanted.get("model", family.name) in (family.name, f"{family.name}:{size}")
    ]
    states = {}
    for family, size, hardware in left:
        rows = [row for row in family.matrix.of_size(size) if holds(row, hardware, wanted)]
        states[key(family, size, hardware)] = min((row.status for row in rows), key="supported".__ne__, default="")
    return states


@pytest.mark.parametrize("wanted", PARTIAL, ids=lambda wanted: fragment(wanted) or "none")
def test_filters_leave_the_cells_of_which_one_row_holds_all_values(grid: Browser, wanted: Wanted) -> None:
    shown = grid.filter(wanted)
    assert {name: state if state in OFFERED else "" for name, state in shown.items()} == (expected_states(wanted))
    offered = [state for state in shown.values() if state in OFFERED]
    assert grid.text("#summary").startswith(f"{len(offered)} of {len(shown)} cells: ")


COMMANDS = """
    const every = (row) => [
      {},
      ...row.splits.map((split) => ({ split: split.name })),
      ...rules.COMBINED.flatMap((axis) => row[axis].map((value) => ({ [axis]: rules.spell(value) }))),
    ];
    const found = [];
    for (const family of data.families) for (const size of family.sizes) for (const row of family.rows) {
      if (!row.sizes.includes(size.name)) continue;
      for (const hardware of row.hardware) for (const wanted of arguments[0] || every(row)) {
        const cell = { family, size, hardware };
        const point = rules.point(cell, row, wanted);
        if (point) found.push([size.model, row.status, point.world_size, ...rules.commands(cell, row, point)]);
      }
    }
    return found;
"""
"""The commands of every row of every cell: for values that are given, or for each of its splits and values once."""


def parse(command: str) -> EngineArgs:
    """The request of a command of the page, without the weights, which lie in nobody's directory yet."""
    words = iter(shlex.split(command.partition(" run ")[2]))
    values: dict[str, Any] = {}
    for word in words:
        name = word.removeprefix("--").replace("-", "_")
        values[ALIASES.get(name, name)] = True if name == "allow_experimental" else next(words)
    values.pop("weights", None)
    return EngineArgs.model_validate(values)


def test_the_matrix_accepts_the_command_of_every_combination(browser: Browser) -> None:
    browser.open()
    commands = set(map(tuple, browser.run(COMMANDS)))
    assert len(commands) > 1000
    for model, status, world_size, *lines in commands:
        args = parse(lines[-1])
        found = check(args)
        assert found.supported, (lines[-1], found.describe())
        assert (args.model, found.request["world_size"]) == (model, world_size)
        assert bool(args.allow_experimental) == (status == "experimental"), lines[-1]
        nodes = world_size // 8 if args.hardware in ("atlas_800i_a2", "atlas_800t_a2") and world_size > 8 else 1
        assert (f" launch --nnodes {nodes} " in lines[-1]) == (nodes > 1)


def test_what_is_offered_first_for_a_demo_can_run(browser: Browser) -> None:
    browser.open()
    worlds = [{"world_size": str(size)} for size in (1, 2, 3, 4)]
    commands = [entry for entry in browser.run(COMMANDS, worlds) if entry[0].endswith(":demo") and len(entry) == 4]
    on_cpu = [parse(line) for *_, line in commands if "--hardware cpu" in line and "--weights" not in line]
    assert len(on_cpu) >= 16
    for args in on_cpu:
        assert resolve(args).world_size == args.world_size


def test_the_command_line_takes_the_commands(browser: Browser, cli: Callable) -> None:
    browser.open("cell=deepseek_v3:671b@atlas_800i_a2")
    blocks = [" ".join(block.text.split()) for block in browser.elements("#panel pre")]
    assert len(blocks) == 3
    for block in blocks:
        options = shlex.split(block.rpartition(" run ")[2])
        at = options.index("--weights")
        assert cli("check", *options[:at], *options[at + 2 :]).code == 0
    assert any(
        block == "npu-zoo pull deepseek_v3:671b --to weights "
        "npu-zoo convert weights weights-w8a16 --to hf-safetensors --quantize w8a16 "
        "npu-zoo launch --nnodes 2 --master-addr ADDRESS -- run --model deepseek_v3:671b --weights weights-w8a16 "
        "--hardware atlas_800i_a2 --dtype bfloat16 --world-size 16 --tp 16 --ep 16 --attention paged "
        "--quantization w8a16"
        for block in blocks
    )


def cell(name: str) -> str:
    return f'button[data-cell="{name}"]'


def test_a_click_opens_what_is_behind_a_cell(browser: Browser) -> None:
    browser.open()
    browser.element(cell("deepseek_coder:6.7b@atlas_800i_a2")).click()
    browser.wait("document.querySelector('#panel').open")
    assert browser.text("#panel-title").split("\n") == ["DeepSeek-Coder 6.7b", "on Atlas 800I A2"]
    text = browser.text("#row-0")
    for part in (
        "supported",
        "simulated",
        "DeepSeek-Coder README of the MindIE ATB model zoo",
        "Simulated with 2 devices; with 1, 4, 8 it is a claim.",
        "npu-zoo pull deepseek_coder:6.7b --to weights",
    ):
        assert part in text
    browser.element("#row-0 .record summary").click()
    family = get_registry().families["deepseek_coder"]
    row = next(row for row in family.rows if "6.7b" in row.sizes and "atlas_800i_a2" in row.hardware)
    record = next(record for record in family.records if record.row == row_digest(row))
    proof = browser.text("#row-0 .record")
    for value in (record.date, *record.shape.values(), *record.versions.values()):
        assert str(value) in proof
    assert (
        f"bfloat16, flash, tp2 {record.figures['atlas_800i_a2_bfloat16_flash_tp2_worst_logprob_difference']}" in proof
    )
    denials = [denial for denial in family.denials if "6.7b" in denial.sizes and "atlas_800i_a2" in denial.hardware]
    assert len(browser.elements("#panel section li")) == len(denials)


def test_values_of_a_row_choose_the_command(browser: Browser) -> None:
    browser.open("cell=deepseek_coder:6.7b@atlas_800i_a2")
    chosen = {"dtype": "bfloat16", "world_size": "4", "attention": "flash"}
    for axis, value in chosen.items():
        browser.pick(axis, value)
        assert browser.run("return document.activeElement.value") == value
    assert " ".join(browser.text("#row-0 pre").split()).endswith(
        "--hardware atlas_800i_a2 --dtype bfloat16 --world-size 4 --attention flash"
    )
    assert browser.text("#row-0 h3 .level") == "claimed"


def test_a_split_that_the_shape_refuses_is_told(browser: Browser) -> None:
    browser.open("world_size=3&cell=deepseek_coder:demo@cpu")
    assert "--pp 3" in browser.text("#row-0 pre")
    assert browser.elements("#row-0 .caution") == []
    browser.pick("split", "tp3*")
    assert "tensor_parallel_size=3 does not divide" in browser.text("#row-0 .caution")


def test_the_keyboard_opens_and_closes_a_cell(browser: Browser) -> None:
    browser.open()
    for name, press in (("deepseek_moe:16b@cpu", "\ue007"), ("wizardcoder:34b@cuda", " ")):
        browser.run("document.querySelector(arguments[0]).focus()", cell(name))
        browser.press(press)
        browser.wait("document.querySelector('#panel').open")
        assert browser.run("return document.querySelector('#panel').contains(document.activeElement)")
        browser.press("\ue00c")
        browser.wait("!document.querySelector('#panel').open && !location.hash.includes('cell')")
        assert browser.run("return document.activeElement.dataset.cell") == name


def test_the_tab_key_reaches_filters_cells_and_the_panel(browser: Browser) -> None:
    browser.open()
    reached = []
    for _ in range(20):
        browser.press("\ue004")
        reached.append(browser.run("return document.activeElement.name || document.activeElement.className"))
    assert reached[1:13] == browser.run("return [...document.querySelectorAll('select')].map((one) => one.name)")
    assert set(reached[13:]) == {"cell"}
    assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_refused_cell_says_what_and_who(browser: Browser) -> None:
    browser.open("dtype=bfloat16&cell=deepseek_coder:6.7b@atlas_300i_duo")
    assert browser.text(".refusal li") == (
        "dtype=bfloat16 is not supported by deepseek_coder:6.7b on atlas_300i_duo; supported: float16 "
        "(the DeepSeek-Coder README of the MindIE ATB model zoo says no: bfloat16 on Atlas 800I A2 only)"
    )
    assert browser.text(".others summary") == "1 row with other values"


def test_a_refusal_by_evidence_names_the_level_that_there_is(browser: Browser) -> None:
    browser.open("evidence=measured&cell=wizardcoder:34b@atlas_800i_a2")
    assert browser.text(".refusal li") == "no row with these values is measured; it is simulated"
    browser.open("parallelism=tp%2Bpp&world_size=3&cell=wizardcoder:34b@cpu")
    assert browser.text(".refusal li") == "no row shares 3 devices by tp+pp"


def test_filters_stand_in_the_fragment_and_come_back_from_it(browser: Browser) -> None:
    browser.open()
    browser.choose("parallelism", "tp+pp")
    browser.choose("dtype", "float16")
    browser.wait("location.hash.includes('float16')")
    browser.element(cell("deepseek_moe:16b@atlas_800t_a2")).click()
    browser.wait("document.querySelector('#panel').open")
    expected = "#dtype=float16&parallelism=tp+pp&cell=deepseek_moe:16b@atlas_800t_a2"
    assert browser.run("return location.hash") == expected
    states = browser.run("return [...document.querySelectorAll('#grid button')].map((one) => one.dataset.state)")
    browser.open(expected[1:])
    assert (
        browser.run("return [...document.querySelectorAll('#grid button')].map((one) => one.dataset.state)") == states
    )
    assert browser.run("return document.querySelector('select[name=parallelism]').value") == "tp+pp"
    assert browser.text("#panel-title").startswith("DeepSeek-MoE 16b")
    browser.element("#clear").click()
    browser.wait("location.hash === '#cell=deepseek_moe:16b@atlas_800t_a2'")
    browser.driver.back()
    browser.wait(f"location.hash === '{expected}'")
    browser.wait("document.querySelector('select[name=dtype]').value === 'float16'")


def test_a_fragment_that_names_nothing_is_passed_over(browser: Browser) -> None:
    browser.open("dtype=int7&nonsense=1&cell=a:b@c&%E0%A4%A&world_size=8")
    assert browser.run("return [...document.querySelectorAll('select[data-active]')].map((one) => one.name)") == [
        "world_size"
    ]
    assert not browser.run("return document.querySelector('#panel').open")


def test_the_copy_button_copies_the_commands(browser: Browser) -> None:
    browser.open("cell=deepseek_coder:1.3b@cpu")
    browser.run("navigator.clipboard.writeText = async (text) => { window.copied = text; };")
    browser.element("#row-0 .copy").click()
    browser.wait("document.querySelector('#row-0 .copy').textContent === 'Copied'")
    assert browser.run("return window.copied").split("\n") == [
        "npu-zoo pull deepseek_coder:1.3b --to weights",
        "npu-zoo run --model deepseek_coder:1.3b --weights weights --hardware cpu --dtype float32 --world-size 1 "
        "--attention paged",
    ]
    assert browser.run("return document.querySelector('#said').textContent") == "Copied"


def test_nothing_is_wider_than_the_window(browser: Browser) -> None:
    browser.open("cell=deepseek_v3:671b@atlas_800i_a2")
    browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
    for width in (1400, 1100, 768, 360):
        browser.resize(width)
        browser.wait(f"document.querySelector('#panel').matches(':modal') === {str(width < 1088).lower()}")
        assert browser.run("return document.documentElement.scrollWidth") <= width
        assert browser.run("return document.querySelector('#panel').scrollWidth") <= width
        widths = browser.run(
            "return [...document.querySelectorAll('#grid button')].map((one) => [one.scrollWidth, one.clientWidth])"
        )
        assert [pair for pair in widths if pair[0] > pair[1]] == []


def test_every_control_has_a_name(browser: Browser) -> None:
    browser.open("cell=deepseek_coder:6.7b@cpu")
    unnamed = browser.run(
        """
        const name = (one) => one.getAttribute("aria-label") || one.textContent.trim()
          || [...(one.labels || [])].map((label) => label.textContent.trim()).join("");
        return [...document.querySelectorAll("button, select, input, summary, [role=region]")]
          .filter((one) => !name(one)).map((one) => one.outerHTML);
        """
    )
    assert unnamed == []
    label = browser.element(cell("deepseek_coder:6.7b@cpu")).get_attribute("aria-label")
    assert label == "DeepSeek-Coder 6.7b on CPU, supported, claimed"
    heads = browser.run("return [...document.querySelectorAll('#grid th')].map((one) => one.scope)")
    assert set(heads) == {"col", "row", "rowgroup"}


def test_the_page_asks_for_nothing_but_itself(browser: Browser) -> None:
    browser.driver.get_log("performance")
    browser.open("cell=deepseek_coder:6.7b@atlas_800i_a2")
    messages = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert asked - {"about:blank"} <= {browser.shown, browser.driver.current_url}
    assert browser.run("return performance.getEntriesByType('resource').length") == 0


def test_a_stale_record_is_told_and_proves_nothing(browser: Browser) -> None:
    family = get_registry().families["deepseek_coder"]
    row = next(row for row in family.rows if row.evidence == "simulated" and "6.7b" in row.sizes)
    url = browser.write("stale", family, stale=frozenset({(family.name, row_digest(row))}))
    browser.open("cell=deepseek_coder:6.7b@atlas_800i_a2", url)
    assert browser.text(cell("deepseek_coder:6.7b@atlas_800i_a2")) == "✓\nsupported\nsimulated (stale)"
    assert browser.text(cell("deepseek_coder:1.3b@atlas_800i_a2")) == "✓\nsupported\nsimulated"
    assert "Its record is stale" in browser.text("#row-0 .evidence")
    stale = browser.filter({"evidence": "stale"})
    assert {name for name, state in stale.items() if state in OFFERED} == {
        f"deepseek_coder:{size}@atlas_800i_a2" for size in row.sizes
    }
    assert browser.filter({"evidence": "simulated"})["deepseek_coder:6.7b@atlas_800i_a2"] == "none"


def test_values_that_exclude_each_other_are_never_offered_together(browser: Browser) -> None:
    family = get_registry().families["deepseek_coder"]
    conflict = Conflict(first=("dtype", "float16"), second=("attention", "flash"), reason="they overflow together")
    url = browser.write("conflict", family.model_copy(update={"conflicts": (conflict,)}))
    name = "deepseek_coder:6.7b@atlas_800i_a2"
    browser.open(f"dtype=float16&cell={name}", url)
    assert browser.filter({"dtype": "float16", "attention": "paged"})[name] == "supported"
    assert browser.filter({"dtype": "bfloat16", "attention": "flash"})[name] == "supported"
    assert browser.filter({"dtype": "float16", "attention": "flash"})[name] == "none"
    browser.open(f"dtype=float16&attention=flash&cell={name}", url)
    assert browser.text(".refusal li") == "dtype=float16 excludes attention=flash: they overflow together"
    browser.open(f"dtype=float16&cell={name}", url)
    browser.pick("attention", "flash")
    assert browser.run("return document.querySelector('#row-0 input[data-axis=dtype]:checked').value") == "bfloat16"


def test_a_long_sequence_is_asked_for_beyond_what_the_checkpoint_has(browser: Browser) -> None:
    family = get_registry().families["deepseek_coder"]
    long = family.rows[0].model_copy(update={"long_sequence": (True,)})
    url = browser.write("long", family.model_copy(update={"rows": (long,)}))
    browser.open("cell=deepseek_coder:1.3b@atlas_800i_a2", url)
    variant = family.variant("1.3b")
    assert variant is not None
    assert variant.config is not None
    assert f"--max-model-len {variant.config.context_length + 1}" in browser.text("#row-0 pre")


def test_without_javascript_the_tables_are_there(browser: Browser) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open()
        assert browser.element("#tables table").is_displayed()
        assert not browser.element("#explorer").is_displayed()
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
