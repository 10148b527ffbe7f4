"""The page of the matrix as it is written: its parts, its data, and what it is without JavaScript."""

from __future__ import annotations

import html.parser
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from npu_zoo.cli.matrix_page import page
from npu_zoo.core.evidence import row_digest
from npu_zoo.matrix_text import part_of
from npu_zoo.registry import get_registry


def family_page(name: str, *, stale: frozenset[tuple[str, str]] = frozenset()) -> str:
    return page([part_of(get_registry().families[name], None)], stale)


class Reader(html.parser.HTMLParser):
    """Checks that elements are closed in their order, and keeps what a browser would do with them."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows = 0
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        self.rows += tag == "tr"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[self.open[-1] if self.open else ""] = data


def page_data(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def test_the_page_is_well_formed_and_names_no_other_file() -> None:
    text = family_page("deepseek_coder")
    reader = Reader(text)
    assert reader.open == []
    assert not {"src", "href", "style", "onclick"} & {name for name, _ in reader.attributes}
    assert "url(" not in text
    assert "@import" not in text
    policy = next(value for name, value in reader.attributes if name == "content" and value and "default-src" in value)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def test_without_javascript_there_is_a_table_of_every_row() -> None:
    family = get_registry().families["deepseek_coder"]
    text = family_page("deepseek_coder")
    assert '<details id="tables" open>' in text
    assert '<div id="explorer" class="scripted" hidden>' in text
    table = text.partition('<details id="tables" open>')[2].partition("</details>")[0]
    assert Reader(table).rows == 1 + len(family.rows)
    assert "atlas_800t_a2" in table
    assert "simulated on 2" in table
    assert "DeepSeek-Coder README of MindFormers" in table


def test_the_data_cannot_end_its_element() -> None:
    family = get_registry().families["deepseek_coder"]
    row = family.rows[-1].model_copy(update={"note": "</script><!--<script>"})
    text = page([part_of(family.model_copy(update={"rows": (*family.rows[:-1], row)}), None)])
    assert page_data(text)["families"][0]["rows"][-1]["note"] == "</script><!--<script>"
    assert text.count("</script>") == 3
    assert Reader(text).open == []


def test_a_variant_s_page_has_its_size_alone(cli: Callable) -> None:
    (family,) = page_data(cli("matrix", "deepseek_coder:33b-base", "--format", "html").out)["families"]
    assert [size["model"] for size in family["sizes"]] == ["deepseek_coder:33b-base"]
    assert {size for row in family["rows"] for size in row["sizes"]} == {"33b"}
    assert all("33b" in denial["sizes"] for denial in family["denials"])


def test_a_size_is_asked_for_by_a_name_that_the_family_knows() -> None:
    for family in get_registry().families.values():
        (data,) = page_data(family_page(family.name))["families"]
        for size in data["sizes"]:
            found, variant = get_registry().find(size["model"])
            assert variant is not None
            assert (found.name, variant.size) == (family.name, size["name"])


def test_a_size_without_an_alias_is_asked_for_as_its_first_variant() -> None:
    family = get_registry().families["deepseek_coder"]
    variants = tuple(variant.model_copy(update={"aliases": ()}) for variant in family.variants)
    text = page([part_of(family.model_copy(update={"variants": variants}), None)])
    models = {size["name"]: size["model"] for size in page_data(text)["families"][0]["sizes"]}
    assert models["6.7b"] == "deepseek_coder:6.7b-base"
    assert models["demo"] == "deepseek_coder:demo"


def test_every_record_is_with_its_row() -> None:
    for family in get_registry().families.values():
        (data,) = page_data(family_page(family.name))["families"]
        kept = [(row["evidence"], [record["level"] for record in row["records"]]) for row in data["rows"]]
        expected = [
            (row.evidence, [record.level for record in family.records if record.row == row_digest(row)])
            for row in family.rows
        ]
        assert kept == expected
        assert all(levels or level == "claimed" for level, levels in kept)


def test_figures_are_taken_apart_by_what_ran() -> None:
    (data,) = page_data(family_page("deepseek_v3"))["families"]
    record = next(record for row in data["rows"] if "v2-lite" in row["sizes"] for record in row["records"])
    metrics = {"worst_logprob_difference", "mean_logprob_difference", "tokens"}
    assert {figure["metric"] for figure in record["figures"]} == metrics
    runs = {(figure["hardware"], figure["run"]) for figure in record["figures"]}
    assert ("atlas_800t_a2", "bfloat16, paged, tp2+ep2") in runs
    (data,) = page_data(family_page("deepseek_coder"))["families"]
    demo = next(row for row in data["rows"] if row["sizes"] == ["demo"] and row["records"])
    assert {"float16, paged", "float16, flash"} <= {figure["run"] for figure in demo["records"][0]["figures"]}
    quantized = [row for row in data["rows"] if row["records"] and "demo" in row["sizes"] and row not in (demo,)]
    runs = {figure["run"] for row in quantized for figure in row["records"][0]["figures"]}
    assert {"float16, paged, w8a16", "bfloat16, flash, w4a16", "float16, paged, int8_cache"} <= runs
    assert metrics == {figure["metric"] for row in quantized for figure in row["records"][0]["figures"]}


def test_stale_rows_are_told_in_the_table_and_in_the_data() -> None:
    family = get_registry().families["deepseek_coder"]
    proven = next(row for row in family.rows if row.evidence == "simulated")
    stale = frozenset({(family.name, row_digest(proven)), ("another", row_digest(family.rows[1]))})
    text = family_page("deepseek_coder", stale=stale)
    assert text.count("<td>simulated on 2 (stale)</td>") == 1
    assert [row["stale"] for row in page_data(text)["families"][0]["rows"]] == [row == proven for row in family.rows]


STYLE = (Path(__file__).parents[2] / "npu_zoo" / "cli" / "matrix_page" / "page.css").read_text(encoding="utf-8")
TEXT_ON_GROUND = [
    ("ink", "ground"),
    ("ink", "raised"),
    ("faint", "ground"),
    ("faint", "raised"),
    ("good", "ground"),
    ("trial", "ground"),
    ("bad", "ground"),
    ("good", "good-ground"),
    ("ink", "good-ground"),
    ("trial", "trial-ground"),
    ("ink", "trial-ground"),
    ("bad", "bad-ground"),
    ("ink", "bad-ground"),
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("text", "ground"), TEXT_ON_GROUND)
def test_text_has_the_contrast_that_wcag_aa_asks_for(scheme: str, text: str, ground: str) -> None:
    light, dark = STYLE.partition("prefers-color-scheme: dark")[::2]
    colors = dict(re.findall(r"--([\w-]+): (#\w{6});", light if scheme == "light" else dark.partition("\n}\n")[0]))
    darker, lighter = sorted((luminance(colors[text]), luminance(colors[ground])))
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def luminance(color: str) -> float:
    """Relative luminance, from the definition in WCAG 2.2."""
    values = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("form", ["table", "markdown", "json", "html"])
def test_output_writes_what_would_be_printed(cli: Callable, tmp_path: Path, form: str) -> None:
    file = tmp_path / "matrix"
    ran = cli("matrix", "--format", form, "--output", str(file))
    assert ran == (0, f"{file} is complete\n", "")
    assert file.read_text(encoding="utf-8") == cli("matrix", "--format", form).out
    assert list(tmp_path.iterdir()) == [file]


def test_output_replaces_a_file_only_by_force(cli: Callable, tmp_path: Path) -> None:
    file = tmp_path / "matrix.json"
    file.write_text("mine")
    ran = cli("matrix", "--json", "--output", str(file))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"error: cannot write {file}: it exists; choose another name, or give --force\n"
    assert file.read_text() == "mine"
    assert cli("matrix", "--json", "--output", str(file), "--force").code == 0
    assert json.loads(file.read_text(encoding="utf-8"))
    assert list(tmp_path.iterdir()) == [file]


def test_output_says_why_it_cannot_write(cli: Callable, tmp_path: Path) -> None:
    ran = cli("matrix", "--output", str(tmp_path / "none" / "matrix"))
    assert ran.code == 2
    assert "No such file or directory; choose another file" in ran.err
    ran = cli("matrix", "--output", str(tmp_path), "--force")
    assert ran.code == 2
    assert f"cannot write {tmp_path}" in ran.err
    ran = cli("matrix", "--force")
    assert (ran.code, ran.err.splitlines()[0]) == (
        2,
        "error: --force replaces the file that --output names; give --output FILE too",
    )
