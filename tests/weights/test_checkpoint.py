from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from npu_zoo.checkpoint import MAX_CONFIG_BYTES, detect_format, read_config, read_generation_config
from npu_zoo.core.errors import WeightsError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.specs import WeightFormatSpec
from npu_zoo.registry import get_registry

CONFIGS = Path(__file__).parent.parent / "data" / "configs"
SPECS = {
    spec.name: spec
    for spec in (
        WeightFormatSpec(
            name="hf-bin", patterns=("pytorch_model*.bin",), loadable=False, source="a:b", description="pickled"
        ),
        WeightFormatSpec(name="hf-safetensors", patterns=("*.safetensors",), loader="a:B"),
    )
}


def touch(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).touch()
    return directory


def test_safetensors_are_found_and_win_over_bin(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "model-00001-of-00002.safetensors")
    assert detect_format(tmp_path, SPECS).name == "hf-safetensors"
    assert detect_format(str(touch(tmp_path, "pytorch_model.bin")), SPECS).name == "hf-safetensors"


def test_what_no_engine_loads_is_refused_with_what_converts_it(tmp_path: Path) -> None:
    touch(tmp_path, "pytorch_model-00001-of-00001.bin")
    with pytest.raises(WeightsError) as caught:
        detect_format(tmp_path, SPECS)
    message = str(caught.value)
    assert "holds pytorch_model-00001-of-00001.bin: pickled, which no engine loads directly" in message
    assert message.endswith(f"npu-zoo convert {tmp_path} {tmp_path}-safetensors --to hf-safetensors")


def test_ranks_are_found_in_their_directories(tmp_path: Path) -> None:
    formats = get_registry().weight_formats
    for rank in range(2):
        (tmp_path / f"rank_{rank}").mkdir()
        touch(tmp_path, f"rank_{rank}/checkpoint_{rank}.ckpt")
    assert detect_format(tmp_path, formats).name == "mindspore-ckpt"
    assert detect_format(touch(tmp_path, "model0-mp1.safetensors"), formats).name == "ascend-mp"


def test_directories_without_a_checkpoint_say_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"looked for pytorch_model\*\.bin \(hf-bin\); \*\.safetensors .*no files"):
        detect_format(tmp_path, SPECS)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(WeightsError, match=r"it has: readme\.md"):
        detect_format(touch(tmp_path, "readme.md"), SPECS)
    with pytest.raises(WeightsError, match="does not exist"):
        detect_format(tmp_path / "nowhere", SPECS)
    with pytest.raises(WeightsError, match="is a file; name the directory"):
        detect_format(tmp_path / "readme.md", SPECS)


def test_config_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((CONFIGS / "deepseek-r1.xft.config.json").read_bytes())
    assert ModelConfig.from_hf(read_config(tmp_path)).hidden_size == 7168
    assert read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_bytes((CONFIGS / "deepseek-r1.generation_config.json").read_bytes())
    assert read_generation_config(str(tmp_path))["eos_token_id"] == 1


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "holds a JSON list, an object is due"),
        (b" " * (MAX_CONFIG_BYTES + 1), "has more than"),
    ],
)
def test_damaged_config_files_are_refused(tmp_path: Path, content: bytes, fault: str) -> None:
    for name, read in (("config.json", read_config), ("generation_config.json", read_generation_config)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=fault) as caught:
            read(tmp_path)
        assert str(tmp_path / name) in str(caught.value)


def test_a_missing_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        read_config(tmp_path)


def test_reading_headers_and_configs_needs_no_torch(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    code = (
        "import sys, pathlib; import npu_zoo.checkpoint, npu_zoo.weights.load, npu_zoo.weights.safetensors as s;"
        "print(s.SafetensorsLoader(pathlib.Path(sys.argv[1])).shapes(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "{'a': (1,)} False\n"
