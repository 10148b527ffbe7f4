from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import ConfigError, WeightsError, validation_lines
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.settings import SAMPLING_FIELDS, Settings, engine_args, load_settings, option_name

LAYERS = ("file", "environment", "option")
KEYS: dict[str, tuple[Any, Any, Any]] = {
    "dtype": ("float32", "bfloat16", "float16"),
    "tensor_parallel_size": (2, 4, 8),
    "kv_cache_fraction": (0.25, 0.5, 0.75),
    "allow_experimental": (True, False, True),
    "kv_cache_memory": ("1GiB", "2GiB", "3GiB"),
    "sampling.temperature": (0.25, 0.5, 0.75),
    "sampling.max_tokens": (1, 2, 3),
    "sampling.ignore_eos": (True, False, True),
}


def load(
    tmp_path: Path, *, file: Any = None, environ: dict[str, str] | None = None, flags: dict[str, Any] | None = None
) -> Settings:
    path = None
    if file is not None:
        path = tmp_path / "settings.json"
        path.write_text(json.dumps(file))
    return load_settings(flags or {}, path, environ or {})


def nested(key: str, value: Any) -> dict[str, Any]:
    table, _, name = key.partition(".")
    return {table: {name: value}} if name else {key: value}


def found(settings: Settings, key: str) -> Any:
    name = key.removeprefix("sampling.")
    return settings.sampling.get(name) if name != key else getattr(settings.args, name)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("layers", [c for n in range(4) for c in itertools.combinations(LAYERS, n)], ids="+".join)
def test_a_later_layer_wins_and_the_origin_says_which(tmp_path: Path, key: str, layers: tuple[str, ...]) -> None:
    values = dict(zip(LAYERS, KEYS[key], strict=True))
    variable = "NPU_ZOO_" + key.upper().replace(".", "_")
    settings = load(
        tmp_path,
        file=nested(key, values["file"]) if "file" in layers else None,
        environ={variable: str(values["environment"])} if "environment" in layers else None,
        flags=nested(key, values["option"]) if "option" in layers else None,
    )
    origins = {
        "file": f"file {tmp_path / 'settings.json'}",
        "environment": f"environment {variable}",
        "option": f"option {option_name(key)}",
    }
    if layers:
        assert found(settings, key) == values[layers[-1]]
        assert settings.origins[key] == origins[layers[-1]]
    else:
        assert found(settings, key) is None
        assert settings.origins.get(key, "default") == "default"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "tp: 2\nsampling:\n  stop: [x]\n"),
        ("a.yml", "tensor_parallel_size: 2\nsampling: {stop: [x]}\n"),
        ("a.json", '{"tp": 2, "sampling": {"stop": ["x"]}}'),
        ("a.toml", 'tp = 2\n[sampling]\nstop = ["x"]\n'),
    ],
)
def test_three_formats_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    settings = load_settings({}, tmp_path / name, {})
    assert settings.args == EngineArgs(tensor_parallel_size=2)
    assert settings.sampling_params().stop_strings == ("x",)


def test_the_environment_may_name_the_file_and_an_option_goes_over_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"dtype": "float16"}')
    (tmp_path / "b.json").write_text('{"dtype": "float32"}')
    environ = {"NPU_ZOO_CONFIG": str(tmp_path / "a.json")}
    assert load_settings({}, None, environ).args.dtype == "float16"
    assert load_settings({}, tmp_path / "b.json", environ).args.dtype == "float32"


def test_empty_and_foreign_variables_and_those_of_the_process_are_no_settings(tmp_path: Path) -> None:
    environ = {"NPU_ZOO_DTYPE": "", "NPU_ZOO_PLUGINS": "x", "NPU_ZOO_TEST_DATA": "/x", "HOME": "/", "NPU_ZOOM": "1"}
    assert load(tmp_path, environ=environ).args == EngineArgs()


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert load_settings({}, tmp_path / "a.yaml", {}).args == EngineArgs()


def test_null_in_a_file_is_unset_but_lifts_a_sampling_limit(tmp_path: Path) -> None:
    settings = load(tmp_path, file={"dtype": None, "sampling": {"max_tokens": None}})
    assert settings.args.dtype is None
    assert settings.origins["dtype"] == "default"
    assert settings.sampling_params(max_tokens=7).max_tokens is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"file": {"dtpye": "float16"}}, ["'dtpye'", "settings.json", "did you mean dtype?"]),
        ({"file": {"max_len": 1}}, ["'max_len'", "did you mean max_model_len?"]),
        ({"file": {"sampling": {"temprature": 1}}}, ["'temprature'", "table sampling", "did you mean temperature?"]),
        ({"file": {"sampling": {"tp": 1}}}, ["'tp'", "table sampling"]),
        ({"file": {"zzzzzzzz": 1}}, ["'zzzzzzzz'", "known: model, "]),
        ({"environ": {"NPU_ZOO_DTPYE": "x"}}, ["NPU_ZOO_DTPYE", "did you mean NPU_ZOO_DTYPE?"]),
        (
            {"environ": {"NPU_ZOO_SAMPLING_TOPP": "1"}},
            ["did you mean NPU_ZOO_SAMPLING_TOP_P?"],
        ),
        ({"environ": {"NPU_ZOO_PLUGIN": "x"}}, ["did you mean NPU_ZOO_PLUGINS?"]),
        ({"flags": {"dtypes": "x"}}, ["'dtypes'", "did you mean dtype?"]),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path, given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, **given)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"file": {"tp": "2"}}, ["tensor_parallel_size='2'", "file ", "valid integer"]),
        ({"file": {"tp": True}}, ["tensor_parallel_size=True", "valid integer"]),
        ({"file": {"tp": 0}}, ["tensor_parallel_size=0", "greater than or equal to 1"]),
        ({"file": {"dtype": 16}}, ["dtype=16", "valid string"]),
        ({"file": {"attention": "pagde"}}, ["attention='pagde'", "'paged' or 'flash'"]),
        ({"file": {"allow_experimental": "yes"}}, ["allow_experimental='yes'", "valid boolean"]),
        ({"file": {"kv_cache_fraction": 2}}, ["kv_cache_fraction=2"]),
        ({"file": {"sampling": {"ignore_eos": 1}}}, ["sampling.ignore_eos=1", "valid boolean"]),
        ({"file": {"sampling": {"top_k": 1.5}}}, ["sampling.top_k=1.5", "valid integer"]),
        ({"file": {"sampling": 3}}, ["sampling is no table"]),
        ({"file": {"tp": 2, "tensor_parallel_size": 2}}, ["both tp and tensor_parallel_size"]),
        ({"environ": {"NPU_ZOO_TP": "two"}}, ["tensor_parallel_size='two'", "environment NPU_ZOO_TP"]),
        ({"environ": {"NPU_ZOO_STRICT_KERNELS": "maybe"}}, ["environment NPU_ZOO_STRICT_KERNELS", "valid boolean"]),
        ({"environ": {"NPU_ZOO_SAMPLING_STOP_TOKEN_IDS": "1,x"}}, ["sampling.stop_token_ids", "STOP_TOKEN_IDS"]),
        ({"flags": {"tensor_parallel_size": 0}}, ["tensor_parallel_size=0", "option --tp"]),
    ],
)
def test_a_wrong_type_names_key_value_and_origin(tmp_path: Path, given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, **given)
    assert [word for word in words if word not in str(error.value)] == []


def test_validation_errors_are_one_line_per_field_without_the_librarys_links() -> None:
    with pytest.raises(ValidationError) as caught:
        EngineArgs(tensor_parallel_size=0, max_num_seqs="x", nonsense=[1])  # type: ignore[arg-type, call-arg]
    assert validation_lines(caught.value, "EngineArgs") == [
        "EngineArgs.tensor_parallel_size: input should be greater than or equal to 1, given 0",
        "EngineArgs.max_num_seqs: input should be a valid integer, unable to parse string as an integer, given 'x'",
        "EngineArgs.nonsense: extra inputs are not permitted",
    ]
    assert validation_lines(caught.value)[2] == "nonsense: extra inputs are not permitted"


def test_a_checkpoints_config_of_the_wrong_form_is_told_the_same_way() -> None:
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
    with pytest.raises(WeightsError) as caught:
        ModelConfig.from_hf({**dict.fromkeys(sizes, 8), "num_attention_heads": 2, "vocab_size": 0, "rms_norm_eps": "x"})
    first, *rest = str(caught.value).splitlines()
    assert first == "config.json holds values of the wrong form:"
    assert rest == [
        "  vocab_size: input should be greater than 0, given 0",
        "  rms_norm_eps: input should be a valid number, unable to parse string as a number, given 'x'",
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "tp: [\n", ["cannot be parsed"]),
        ("a.json", '{"tp": 2,}', ["cannot be parsed"]),
        ("a.toml", "tp = \n", ["cannot be parsed"]),
        ("a.yaml", "- tp\n", ["no table"]),
        ("a.ini", "[a]\n", [".yaml, .yml, .json or .toml"]),
        ("a.json", b"\xff\xfe", ["cannot be parsed"]),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, name: str, text: str | bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        load_settings({}, tmp_path / name, {})
    assert [word for word in [name, *words] if word not in str(error.value)] == []


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_settings({}, tmp_path / "none.yaml", {})


@pytest.mark.parametrize("name", SAMPLING_FIELDS)
def test_every_sampling_parameter_can_come_from_the_environment(name: str) -> None:
    texts = {"stop": "END", "stop_token_ids": "3,4", "seed": "3", "n": "3", "max_tokens": "30"}
    default = getattr(SamplingParams, name)
    text = texts.get(name) or (str(not default) if isinstance(default, bool) else "1")
    settings = load_settings({}, None, {f"NPU_ZOO_SAMPLING_{name.upper()}": text})
    value = getattr(settings.sampling_params(), name)
    expected = {"stop": ("END",), "stop_token_ids": (3, 4)}.get(name)
    assert value == expected if expected else str(value).removesuffix(".0") == text


def test_several_stop_strings_come_from_the_environment_as_a_json_list() -> None:
    settings = load_settings({}, None, {"NPU_ZOO_SAMPLING_STOP": '["a", "b"]'})
    assert settings.sampling_params().stop_strings == ("a", "b")


def test_sampling_settings_go_over_a_commands_defaults_and_a_fault_names_its_origin() -> None:
    settings = load_settings({"sampling": {"temperature": 0.5}}, None, {"NPU_ZOO_SAMPLING_TOP_P": "3"})
    with pytest.raises(ConfigError, match=r"top_p=3.*top_p from environment NPU_ZOO_SAMPLING_TOP_P"):
        settings.sampling_params(temperature=0.0)
    assert load_settings({"sampling": {"temperature": 0.5}}, None, {}).sampling_params(
        temperature=0.0, max_tokens=9
    ) == SamplingParams(temperature=0.5, max_tokens=9)


def test_engine_args_takes_keyword_arguments() -> None:
    args = engine_args({"model": "m", "tp": 2, "weights": Path("/w"), "dtype": None, "max_model_len": 8})
    assert args == EngineArgs(model="m", tensor_parallel_size=2, weights="/w", max_model_len=8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_modl_len": 3}, r"'max_modl_len' in the arguments; did you mean max_model_len\?"),
        ({"max_model_len": "3"}, r"max_model_len='3' \(argument\): .*valid integer"),
        ({"sampling": {}}, "unknown key 'sampling'"),
    ],
)
def test_engine_args_refuses_as_a_file_does(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_args(values)
