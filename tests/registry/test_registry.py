"""Guarded loading: whatever a plugin does, it falls alone, and its error is kept and quoted."""

from __future__ import annotations

import importlib
import itertools
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from npu_zoo.api import AttentionBackendSpec, FamilySpec, FeatureRow, KernelSpec, VariantSpec, hookimpl
from npu_zoo.core.errors import PluginError, UnknownModelError
from npu_zoo.registry import (
    Candidate,
    PluginRecord,
    Registry,
    build_registry,
    find_candidates,
    get_registry,
    load_code,
    registry_in_place,
)

BUILTIN = [candidate for candidate in find_candidates("") if candidate.builtin]
_numbers = itertools.count()


def family(name: str) -> FamilySpec:
    row = FeatureRow(
        sizes=("1b",), hardware=("cpu",), dtype=("float32",), world_size=(1,), attention=("paged",), source="zoo"
    )
    return FamilySpec(
        name=name,
        title=name.title(),
        architectures=("LlamaForCausalLM",),
        model="package.model:Model",
        variants=(VariantSpec(name="1b-instruct", size="1b", aliases=("1b",)),),
        default_variant="1b",
        rows=(row,),
    )


def kernel(name: str) -> KernelSpec:
    return KernelSpec(name=name, operation="rms_norm", chip="cpu", dtypes=("float32",), implementation="package.k:norm")


class Good:
    """A plugin as it should be; its family is named after it."""

    def __init__(self, name: str = "good_family") -> None:
        self.name = name

    @hookimpl
    def register_families(self) -> list[FamilySpec]:
        return [family(self.name)]

    @hookimpl
    def register_kernels(self) -> list[KernelSpec]:
        return [kernel(f"{self.name}_norm")]


def load(registry: Registry, plugin: object, name: str = "", distribution: str = "") -> PluginRecord:
    return registry.add(Candidate(name or f"plugin{next(_numbers)}", lambda: plugin, "package.plugin", distribution))


@pytest.fixture
def registry() -> Registry:
    return build_registry(BUILTIN)


def assert_only_this_one_fell(registry: Registry, record: PluginRecord, *quoted: str) -> None:
    assert record.error is not None
    assert all(text in record.error for text in quoted), record.error
    assert record.registered == {}
    assert registry.plugins[record.name] is record
    assert [r.name for r in registry.plugins.values() if r.error] == [record.name]
    assert registry.find("deepseek_coder:33b")[0].name == "deepseek_coder"
    assert load(registry, Good("after")).error is None
    assert registry.find("after:1b")[0] == family("after")
    with pytest.raises(UnknownModelError) as caught:
        registry.find("no_such_model")
    assert f"plugin {record.name} was dropped: {record.error}" in str(caught.value)


def test_builtin_plugins_load(registry: Registry) -> None:
    assert {r.name: r.error for r in registry.plugins.values()} == {c.name: None for c in BUILTIN}
    assert registry.owner("deepseek_coder") == "deepseek_coder"
    assert registry.plugins["native"].registered["register_engines"] == ["native"]
    assert registry.plugins["native"].distribution.startswith("npu-zoo ")


def test_a_good_plugin_registers_everything(registry: Registry) -> None:
    record = load(registry, Good(), "good", "good-dist 1.0")
    assert record == PluginRecord(
        name="good",
        target="package.plugin",
        distribution="good-dist 1.0",
        registered={"register_families": ["good_family"], "register_kernels": ["good_family_norm"]},
    )
    assert registry.owner("good_family") == "good"
    assert registry.kernels["good_family_norm"] == kernel("good_family_norm")


# Faults that a plugin brings, and what a tolerant registry keeps of it


class Faulty:
    """Two kernels, one with a name of the zoo's own, and a family with three rows, two of them at fault."""

    @hookimpl
    def register_families(self) -> list[FamilySpec]:
        good = family("faulty")
        row = good.rows[0]
        claims = row.model_copy(update={"dtype": ("float16",), "evidence": "measured"})
        return [good.model_copy(update={"rows": (row, row.model_copy(update={"note": "once more"}), claims)})]

    @hookimpl
    def register_kernels(self) -> list[KernelSpec]:
        return [kernel("reference_rms_norm"), kernel("faulty_norm")]


FAULTS = [
    "register_kernels: the name 'reference_rms_norm' is taken by plugin native",
    "faulty row 2: 1b on cpu in float32 is registered twice: it is row 1 once more",
    "faulty row 3: 1b on cpu in float16 says measured and has no record of it",
]


def test_every_fault_of_a_plugin_is_named_at_once(registry: Registry) -> None:
    assert_only_this_one_fell(registry, load(registry, Faulty()), *FAULTS)


def test_a_tolerant_registry_keeps_what_is_sound() -> None:
    registry = build_registry(BUILTIN, tolerant=True)
    own = registry.kernels["reference_rms_norm"]
    record = load(registry, Faulty())
    assert record.error is None
    assert all(str(fault).startswith(text) for fault, text in zip(record.faults, FAULTS, strict=True))
    assert [fault.axis for fault in record.faults] == ["name", "row", "evidence"]
    assert registry.kernels["reference_rms_norm"] == own
    assert registry.kernels["faulty_norm"] == kernel("faulty_norm")
    assert [row.dtype for row in registry.families["faulty"].rows] == [("float32",)]


def test_a_registry_in_place_is_the_process_s_own_until_it_is_left(registry: Registry) -> None:
    before = get_registry()
    with registry_in_place(registry):
        assert get_registry() is registry
    assert get_registry() is not registry
    assert set(get_registry().families) == set(before.families)


# Plugins that do not load

IMPORTS = {
    "a missing module": ("import a_module_that_is_nowhere", "ModuleNotFoundError: No module named 'a_module_that"),
    "a missing name": ("from json import nothing_of_the_kind", "ImportError: cannot import name"),
    "a syntax error": ("def (", "SyntaxError: "),
    "an exception": ("raise RuntimeError('the driver is gone')", "RuntimeError: the driver is gone"),
    "an exit": ("import sys\nsys.exit('no licence')", "SystemExit: no licence"),
}


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes an importable throw-away module and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)
    names: list[str] = []

    def write(source: str) -> str:
        names.append(f"throwaway_{next(_numbers)}")
        (tmp_path / f"{names[-1]}.py").write_text(source)
        importlib.invalidate_caches()
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("source", "quoted"), IMPORTS.values(), ids=IMPORTS)
def test_a_broken_import(registry: Registry, write_module: Callable[[str], str], source: str, quoted: str) -> None:
    module = write_module(source)
    record = registry.add(Candidate("broken", lambda: importlib.import_module(module), module))
    assert_only_this_one_fell(registry, record, quoted)


def test_ctrl_c_while_loading_is_no_plugin_s_fault(registry: Registry) -> None:
    def load_slowly() -> object:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.add(Candidate("slow", load_slowly))


# Plugins that break a contract


def module(**attributes: Any) -> ModuleType:
    plugin = ModuleType(f"throwaway_{next(_numbers)}")
    vars(plugin).update(attributes)
    return plugin


def returns(answer: Any) -> Callable[[], Any]:
    return hookimpl(lambda: answer)


def raises(error: BaseException) -> Callable[..., Any]:
    def hook() -> list[Any]:
        raise error

    return hookimpl(hook)


@hookimpl(specname="register_families")
def families_by_specname() -> list[FamilySpec]:
    return [family("by_specname")]


@hookimpl(specname="register_family")
def misspelt_specname() -> list[FamilySpec]:
    return [family("lost")]


@hookimpl
def wrong_signature(config: Any) -> list[FamilySpec]:
    return [family("lost")]


@hookimpl
def commands_wrong_signature(application: Any) -> None:
    raise AssertionError("never called")


GOOD_FAMILIES = returns([family("lost")])
BROKEN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a misspelt hook": (
        {"register_familys": GOOD_FAMILIES},
        ("no hook named register_familys", "did you mean register_families?"),
    ),
    "a misspelt hook beside a good one": (
        {"register_families": GOOD_FAMILIES, "register_kernel": returns([])},
        ("no hook named register_kernel;", "did you mean register_kernels?"),
    ),
    "a misspelt specname": (
        {"families": misspelt_specname},
        ("no hook named register_family;", "did you mean register_families?"),
    ),
    "a misspelt hook after a specname": (
        {"a": families_by_specname, "register_kernel": returns([])},
        ("no hook named register_kernel;",),
    ),
    "a name like no hook": ({"on_start": returns([])}, ("no hook named on_start", "hooks: register_families")),
    "a forgotten mark": ({"register_families": lambda: [family("lost")]}, ("register_families is not marked with",)),
    "an unknown argument": ({"register_families": wrong_signature}, ("PluginValidationError", "config")),
    "an unknown argument of commands": (
        {"register_families": GOOD_FAMILIES, "register_commands": commands_wrong_signature},
        ("PluginValidationError", "application"),
    ),
    "a raising hook": ({"register_families": raises(KeyError("hidden_size"))}, ("KeyError: 'hidden_size'",)),
    "an exiting hook": ({"register_families": raises(SystemExit(3))}, ("SystemExit: 3",)),
    "a raising hook after a good one": (
        {"register_families": GOOD_FAMILIES, "register_weight_formats": raises(OSError("disk"))},
        ("OSError: disk",),
    ),
    "a spec instead of a list": ({"register_families": returns(family("lost"))}, ("returned FamilySpec where a list",)),
    "a generator": ({"register_families": returns(f for f in [family("lost")])}, ("returned generator where a list",)),
    "nothing": ({"register_families": returns(None)}, ("register_families returned NoneType where a list is due",)),
    "the wrong kind of spec": (
        {"register_families": returns([family("lost"), kernel("k")])},
        ("register_families returned KernelSpec where a list of FamilySpec is due",),
    ),
    "text": ({"register_kernels": returns("rms_norm")}, ("register_kernels returned str where a list is due",)),
    "names": ({"register_kernels": returns(["rms_norm"])}, ("returned str where a list of KernelSpec is due",)),
    "a built-in family's name": (
        {"register_families": returns([family("deepseek_coder")]), "register_kernels": returns([kernel("k")])},
        ("register_families: the name 'deepseek_coder' is taken by plugin deepseek_coder",),
    ),
    "a built-in kernel's name": (
        {"register_families": GOOD_FAMILIES, "register_kernels": returns([kernel("reference_rms_norm")])},
        ("register_kernels: the name 'reference_rms_norm' is taken by plugin native",),
    ),
    "two kernels of one name": (
        {"register_kernels": returns([kernel("norm"), kernel("norm")])},
        ("register_kernels: the name 'norm' is registered twice",),
    ),
}


@pytest.mark.parametrize(("attributes", "quoted"), BROKEN.values(), ids=BROKEN)
def test_a_broken_contract(registry: Registry, attributes: dict[str, Any], quoted: tuple[str, ...]) -> None:
    before = {**registry.families}, {**registry.kernels}
    record = load(registry, module(**attributes))
    assert ({**registry.families}, {**registry.kernels}) == before
    assert_only_this_one_fell(registry, record, *quoted)


def test_specname_and_optional_hooks_are_fine(registry: Registry) -> None:
    @hookimpl(optionalhook=True)
    def of_a_later_version() -> None:
        raise AssertionError("never called")

    plugin = module(families=families_by_specname, of_a_later_version=of_a_later_version)
    assert load(registry, plugin).error is None
    assert registry.find("by_specname:1b")[1] is not None
    assert load(registry, Good("after")).error is None


def test_an_empty_list_is_an_answer(registry: Registry) -> None:
    assert load(registry, module(register_families=returns([]))).error is None


def test_between_third_parties_the_first_keeps_the_name(registry: Registry) -> None:
    first, second = load(registry, Good("shared"), "a_first"), load(registry, Good("shared"), "b_second")
    assert first.error is None
    assert registry.owner("shared") == "a_first"
    assert_only_this_one_fell(registry, second, "the name 'shared' is taken by plugin a_first")


def test_a_dropped_plugin_s_names_are_free_again(registry: Registry) -> None:
    load(registry, module(register_families=returns([family("mine")]), register_kernels=raises(OSError())))
    assert load(registry, Good("mine")).error is None


def test_one_name_in_two_distributions(registry: Registry) -> None:
    load(registry, Good("one"), "twin", "first-dist 1.0")
    record = load(registry, Good("two"), "twin", "second-dist 2.0")
    assert record.name == "twin (second-dist 2.0)"
    assert_only_this_one_fell(registry, record, "the plugin name 'twin' is taken by first-dist 1.0")
    assert registry.owner("one") == "twin"
    assert "two" not in registry.families


def test_one_object_under_two_names(registry: Registry) -> None:
    plugin = Good("once")
    load(registry, plugin, "first_name")
    record = load(registry, plugin, "second_name")
    assert record.error == "PluginError: this is plugin 'first_name' once more; keep one of the two entry points"
    assert_only_this_one_fell(registry, record)
    assert registry.owner("once") == "first_name"


def broken_row() -> list[FamilySpec]:
    good = family("lost").model_dump()
    bad = {**good["rows"][0], "world_size": [0], "status": "maybe"}
    return [FamilySpec.model_validate({**good, "rows": [good["rows"][0], bad], "name": "Lost"})]


def test_a_spec_of_the_wrong_form_is_told_field_by_field(registry: Registry) -> None:
    record = load(registry, module(register_families=hookimpl(broken_row)))
    lines = str(record.error).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("FamilySpec.name: string should match pattern")
    assert lines[0].endswith(", given 'Lost'")
    assert lines[1] == "FamilySpec.rows.1.world_size: world sizes start at 1"
    assert lines[2] == "FamilySpec.rows.1.status: input should be 'supported' or 'experimental', given 'maybe'"
    assert_only_this_one_fell(registry, record)


def test_a_spec_that_contradicts_itself_is_told_in_one_line(registry: Registry) -> None:
    def contradictory() -> list[FamilySpec]:
        return [FamilySpec(**{**dict(family("lost")), "default_variant": "2b"})]

    record = load(registry, module(register_families=hookimpl(contradictory)))
    assert_only_this_one_fell(registry, record, "FamilySpec: default_variant 2b is none of 1b-instruct, 1b")
    assert "\n" not in str(record.error)


def test_what_a_plugin_prints_goes_to_standard_error(
    registry: Registry, write_module: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty() -> list[FamilySpec]:
        print("from a hook")
        return []

    name = write_module("print('from the import')\nCODE = 1")
    registry.add(Candidate("chatty", lambda: importlib.import_module(name), name))
    load(registry, module(register_families=hookimpl(chatty)))
    assert load_code(f"{write_module('print(3)' + chr(10) + 'CODE = 1')}:CODE") == 1
    assert capsys.readouterr() == ("", "from the import\nfrom a hook\n3\n")


def test_only_a_plugin_that_loads_and_registers_nothing_is_remarked_upon(registry: Registry) -> None:
    assert load(registry, module()).remarks == ["registers nothing"]
    assert load(registry, Good()).remarks == []
    assert load(registry, module(on_start=returns([]))).remarks == []


def test_the_plugin_that_brings_torch_is_remarked_upon(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def heavy() -> list[KernelSpec]:
        monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
        return [kernel("heavy")]

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert load(registry, Good("before")).remarks == []
    record = load(registry, module(register_kernels=hookimpl(heavy)))
    assert record.error is None
    assert record.remarks == ["imports torch at load time: every command gets slower"]
    assert load(registry, Good("after")).remarks == []


# Commands


class Commands(Good):
    def __init__(self, name: str, error: BaseException | None = None) -> None:
        super().__init__(name)
        self.error = error

    @hookimpl
    def register_commands(self, app: typer.Typer) -> None:
        app.command(self.name)(lambda: None)
        if self.error:
            raise self.error


def commands(registry: Registry) -> list[str | None]:
    apps = [app for _, app in registry.collect_commands(typer.Typer)]
    return [command.name for app in apps for command in app.registered_commands]


@pytest.mark.parametrize("error", [RuntimeError("no terminal"), SystemExit("no terminal")])
def test_commands_of_the_others_survive_one_that_raises(registry: Registry, error: BaseException) -> None:
    load(registry, Commands("first"))
    record = load(registry, Commands("second", error))
    load(registry, Commands("third"))
    assert commands(registry) == ["first", "third"]
    assert record.error == f"register_commands raised {type(error).__name__}: no terminal"
    assert [r.name for r in registry.plugins.values() if r.error] == [record.name]


def test_commands_by_specname(registry: Registry) -> None:
    @hookimpl(specname="register_commands")
    def add(app: typer.Typer) -> None:
        app.command("added")(lambda: None)

    load(registry, module(add=add))
    assert commands(registry) == ["added"]


def test_a_bad_signature_is_not_left_registered(registry: Registry) -> None:
    # pluggy up to 1.6 raises for it and keeps the plugin all the same, so its good hooks would still be called.
    def must_not_run(app: typer.Typer) -> None:
        raise AssertionError("called although dropped")

    record = load(registry, module(register_families=wrong_signature, register_commands=hookimpl(must_not_run)))
    error = record.error
    assert commands(registry) == []
    assert record.error == error
    assert not registry._manager.has_plugin(record.name)


def test_unregistering_copes_with_a_pluggy_that_keeps_it(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = type(registry._manager)
    register = manager.register

    def keeps_then_raises(self: Any, plugin: object, name: str | None = None) -> str | None:
        register(self, plugin, name)
        raise TypeError("bad signature")

    plugin = Commands("kept")
    with monkeypatch.context() as patch:
        patch.setattr(manager, "register", keeps_then_raises)
        record = load(registry, plugin)
    assert commands(registry) == []
    assert_only_this_one_fell(registry, record, "TypeError: bad signature")


# Finding models and code


def test_a_near_name_is_offered(registry: Registry) -> None:
    with pytest.raises(UnknownModelError, match=r"no model family is named 'deepseek_code'; did you mean deepseek_cod"):
        registry.find("deepseek_code")


def test_an_unknown_variant_names_the_known_ones(registry: Registry) -> None:
    load(registry, Good("small"))
    with pytest.raises(UnknownModelError, match=r"small has no variant '2b'; it has: 1b-instruct \(1b\)"):
        registry.find("small:2b")


def test_a_bare_family_leaves_the_variant_open(registry: Registry) -> None:
    assert registry.find("deepseek_coder") == (registry.families["deepseek_coder"], None)


def test_without_any_plugin_the_message_still_says_so() -> None:
    with pytest.raises(UnknownModelError, match="families: none"):
        Registry().find("deepseek_coder")


def test_load_code(write_module: Callable[[str], str]) -> None:
    name = write_module("class Model: pass")
    assert load_code(f"{name}:Model") is sys.modules[name].Model


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "has no attribute 'Model', which a spec names"),
        ("import a_module_that_is_nowhere", "cannot import .*:Model: ModuleNotFoundError: No module named"),
        ("[].nothing", "cannot import .*:Model: AttributeError: 'list' object"),
        ("1 / 0", "cannot import .*:Model: ZeroDivisionError: division by zero"),
    ],
)
def test_load_code_says_what_is_wrong(write_module: Callable[[str], str], source: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        load_code(f"{write_module(source)}:Model")


def test_load_code_of_no_module() -> None:
    with pytest.raises(PluginError, match="cannot import nowhere_at_all"):
        load_code("nowhere_at_all.model:Model")


def test_specs_travel_to_other_processes(registry: Registry) -> None:
    specs = [*registry.families.values(), *registry.kernels.values(), *registry.attention_backends.values()]
    assert pickle.loads(pickle.dumps(specs)) == specs
    assert any(isinstance(spec, AttentionBackendSpec) for spec in specs)
