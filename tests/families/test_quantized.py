"""Quantized checkpoints on the CPU against the plain ones that they stand for, by family and scheme."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.errors import UnsupportedError, WeightsError
from npu_zoo.nn.kernels.quantized import QuantizedWeight
from npu_zoo.nn.moe import MoE
from npu_zoo.testing.agreement import SCORED, agree
from npu_zoo.testing.checkpoints import write_checkpoint
from npu_zoo.testing.door import unchecked_config
from npu_zoo.testing.quantized import quantize_checkpoint

SCHEMES: dict[str, dict[str, Any]] = {
    "w8a16": {"bits": 8},
    "w8a16-groups": {"bits": 8, "group_size": 32},
    "w4a16": {"bits": 4},
    "w4a16-groups": {"bits": 4, "group_size": 32},
    "w8a8": {"bits": 8, "activations": 8},
}
BOUND = {"float32": 1e-4, "float16": 0.02}
"""Natural-log probability; twice and more what was seen."""

PROMPTS = [list(range(3, 3 + length)) for length in (70, 17, 1)]
LLAMA = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}


def write_llama(directory: Path, **options: Any) -> Path:
    return write_checkpoint(directory, tokenizer=False, **{**LLAMA, **options})


def launch(model: str, weights: Path, **options: Any) -> LLM:
    defaults: dict[str, Any] = {"dtype": "float32", "hardware": "cpu", "max_model_len": 128, "kv_cache_memory": "8MiB"}
    defaults |= {"threads": 1, "skip_tokenizer_init": True, "allow_experimental": True}
    return LLM(model, weights=str(weights), **{**defaults, **options})


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory, make_pair: Callable[..., Any]) -> dict[str, tuple[str, Path]]:
    """A model name and a plain checkpoint of each architecture; all widths are multiples of 32."""
    wide = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
    latent = {**wide, "kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 16}
    pairs = {
        "moe": make_pair("deepseek_moe", **wide),
        "v3": make_pair("deepseek_v3", **latent),
        "v2": make_pair("deepseek_v2", **{**latent, "q_lora_rank": None}),
    }
    found = {name: (pair.model, pair.directory) for name, pair in pairs.items()}
    return {**found, "llama": ("deepseek_coder:custom", write_llama(tmp_path_factory.mktemp("llama")))}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.long)])
@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "w8a8"])
@pytest.mark.parametrize("shape", ["llama", "moe", "v3", "v2"])
def test_weights_only(sources: Any, shape: str, scheme: str, dtype: str, tmp_path: Path) -> None:
    model, source = sources[shape]
    quantized, plain = quantize_checkpoint(source, tmp_path, **SCHEMES[scheme])
    llm, reference = launch(model, quantized, dtype=dtype), launch(model, plain, dtype=dtype)
    assert llm.engine.config.quantization == scheme.partition("-")[0]
    found = agree(reference, llm, PROMPTS)
    assert found.within(BOUND[dtype]), found
    assert found.worst_gap == 0


def errors(truth: LLM, llm: LLM) -> float:
    """The mean difference of the prompts' log-probabilities."""
    found = [scores(one, PROMPTS[:2]) for one in (truth, llm)]
    return sum(abs(a - b) for a, b in zip(*found, strict=True)) / len(found[0])


def scores(llm: LLM, prompts: list[list[int]]) -> list[float]:
    outputs = llm.generate(prompts, SCORED)
    return [next(iter(entry.values())).logprob for o in outputs for entry in o.prompt_logprobs or [] if entry]


@pytest.mark.parametrize(
    ("shape", "scheme"),
    [
        pytest.param(shape, scheme, marks=[] if shape == "llama" or scheme == "w4a16-groups" else pytest.mark.long)
        for shape in ("llama", "moe", "v3", "v2")
        for scheme in SCHEMES
        if scheme != "w8a8"
    ],
)
def test_weights_only_in_bfloat16(sources: Any, shape: str, scheme: str, tmp_path: Path) -> None:
    """Rounding can choose another expert, so both are held against float32: one must err no more than the other."""
    model, source = sources[shape]
    quantized, plain = quantize_checkpoint(source, tmp_path, **SCHEMES[scheme])
    truth = launch(model, plain)
    usual = errors(truth, launch(model, plain, dtype="bfloat16"))
    assert 0 < errors(truth, launch(model, quantized, dtype="bfloat16")) < 2 * usual + 0.02


def fake_quantize(x: Tensor) -> Tensor:
    """Each row rounded to 127 steps of its largest value, written out."""
    rows = x.reshape(-1, x.shape[-1]).clone()
    for number, row in enumerate(rows):
        step = float(row.abs().max()) / 127
        if step:
            rows[number] = (row / step).round() * step
    return rows.view_as(x)


class FakeQuantized(nn.Module):
    """A plain linear layer behind :func:`fake_quantize`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(fake_quantize(x), self.weight)


def test_activations_in_int8_are_those_of_fake_quantization(sources: Any, tmp_path: Path) -> None:
    model, source = sources["llama"]
    quantized, plain = quantize_checkpoint(source, tmp_path, **SCHEMES["w8a8"])
    theirs: Any = LlamaForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    for layer in theirs.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, FakeQuantized(child.weight.detach()))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2)
    for output in launch(model, quantized).generate(PROMPTS, params):
        tokens = output.outputs[0].token_ids
        with torch.no_grad():
            due = theirs(torch.tensor([[*output.prompt_token_ids, *tokens]])).logits[0].log_softmax(-1)
        due = due[len(output.prompt_token_ids) - 1 : -1]
        assert tokens == due.argmax(-1).tolist()
        for row, entries in zip(due, output.outputs[0].logprobs or [], strict=True):
            assert all(abs(e.logprob - float(row[i])) < 0.02 for i, e in entries.items())


class FakeQuantizedKernel:
    """w8a8 as plain products of rounded operands, in float64."""

    @staticmethod
    def pack(weight: QuantizedWeight) -> Tensor:
        return weight.codes.double() * weight.scale.double()

    @staticmethod
    def apply(x: Tensor, packed: Tensor) -> Tensor:
        return F.linear(fake_quantize(x).double(), packed).to(x.dtype)


@pytest.mark.parametrize("shape", ["moe", "v3", "v2"])
def test_experts_and_latents_with_activations_in_int8(sources: Any, shape: str, tmp_path: Path) -> None:
    model, source = sources[shape]
    quantized, _ = quantize_checkpoint(source, tmp_path, **SCHEMES["w8a8"])
    llm = launch(model, quantized)
    fake = [
        dataclasses.replace(choice, implementation=f"{__name__}:FakeQuantizedKernel")
        if choice.operation == "linear_w8a8"
        else choice
        for choice in llm.engine.config.kernels
    ]
    reference = LLM.from_config(unchecked_config(llm.engine.config, kernels=tuple(fake)))
    found = agree(reference, llm, PROMPTS)
    assert found.within(1e-3), found


def changed(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


NAME = "model.layers.1.mlp.down_proj"


def missing_scale(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{NAME}.weight_scale"]


def wrong_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.weight_scale"] = tensors[f"{NAME}.weight_scale"].repeat(1, 2)


def wrong_shape(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.weight_shape"] = torch.tensor([64, 95])


def float_codes(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.weight_packed"] = tensors[f"{NAME}.weight_packed"].float()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (missing_scale, "1 missing:\n    model.layers.1.mlp.down_proj.weight_scale"),
        (wrong_scale, r"down_proj.weight_scale: \[64, 2\] in the checkpoint, \[64, 1\] due"),
        (wrong_shape, r"down_proj.weight_shape says \[64, 95\], and this model has \[64, 96\] there"),
        (float_codes, "weight_packed is stored as float32 and cannot be loaded as int32"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    sources: Any, change: Callable[[dict[str, Tensor]], None], named: str, tmp_path: Path
) -> None:
    model, source = sources["llama"]
    quantized, _ = quantize_checkpoint(source, tmp_path, bits=4)
    with pytest.raises(WeightsError, match=named):
        launch(model, changed(quantized, change))


def with_quantization(directory: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8"))
    change(config["quantization_config"])
    path.write_text(json.dumps(config), "utf-8")
    return directory


def test_groups_that_do_not_divide_the_inputs_are_refused(sources: Any, tmp_path: Path) -> None:
    model, source = sources["llama"]
    quantized, _ = quantize_checkpoint(source, tmp_path, bits=4, group_size=32)

    def wider(config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"]["weights"]["group_size"] = 40

    with pytest.raises(WeightsError, match="q_proj/k_proj/v_proj of 256 x 64 in w4a16: its groups of 40 inputs"):
        launch(model, with_quantization(quantized, wider))


def test_parts_of_one_product_are_quantized_together(sources: Any, tmp_path: Path) -> None:
    model, source = sources["llama"]
    quantized, _ = quantize_checkpoint(source, tmp_path, bits=8)
    ignored = "model.layers.0.self_attn.k_proj"
    with pytest.raises(WeightsError, match=f"ignores {ignored} and not model.layers.0.self_attn.q_proj"):
        launch(model, with_quantization(quantized, lambda config: config["ignore"].append(ignored)))


def test_experts_of_a_layer_are_quantized_together(sources: Any, tmp_path: Path) -> None:
    model, source = sources["moe"]
    quantized, _ = quantize_checkpoint(source, tmp_path, bits=8)
    ignored = r"re:.*layers\.1\.mlp\.experts\.3\."
    with pytest.raises(WeightsError, match="ignores some of a layer's experts"):
        launch(model, with_quantization(quantized, lambda config: config["ignore"].append(ignored)))


def test_a_layer_that_is_ignored_is_plain(sources: Any, tmp_path: Path) -> None:
    model, source = sources["llama"]
    quantized, plain = quantize_checkpoint(source, tmp_path, bits=4)
    kept = load_file(plain / "model.safetensors")[f"{NAME}.weight"]

    def put_back(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(NAME)]:
            del tensors[name]
        tensors[f"{NAME}.weight"] = kept

    with_quantization(changed(quantized, put_back), lambda config: config["ignore"].append(NAME))
    found = agree(launch(model, plain), launch(model, quantized), PROMPTS)
    assert found.within(BOUND["float32"])


def test_a_contradiction_names_both(sources: Any, tmp_path: Path) -> None:
    model, source = sources["llama"]
    quantized, plain = quantize_checkpoint(source, tmp_path, bits=4)
    with pytest.raises(WeightsError, match=r"--quantization w8a8 was asked for.* is quantized in w4a16"):
        launch(model, quantized, quantization="w8a8")
    with pytest.raises(WeightsError, match=r"--quantization none was asked for.* is quantized in w4a16"):
        launch(model, quantized, quantization="none")
    with pytest.raises(WeightsError, match=r"--quantization w8a16 was asked for.* is not quantized"):
        launch(model, plain, quantization="w8a16")
    same = launch(model, quantized, quantization="w4a16")
    assert same.engine.config.row.status == "experimental"


def test_the_matrix_is_asked_before_a_tensor_is_read(sources: Any, tmp_path: Path) -> None:
    model, source = sources["llama"]
    quantized, _ = quantize_checkpoint(source, tmp_path, bits=4)
    (quantized / "model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(UnsupportedError, match="quantization=w4a16 is not supported"):
        launch(model, quantized, allow_experimental=None)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_plain_copy_is_kept(sources: Any, scheme: str, tmp_path: Path) -> None:
    """All tensors that the model's layers keep take no more than their codes, scales and padding."""
    model, source = sources["moe"]
    quantized, _ = quantize_checkpoint(source, tmp_path, **SCHEMES[scheme])
    tree = launch(model, quantized, dtype="bfloat16").engine.runner.model
    layers = [(name, layer) for name, layer in tree.named_modules() if getattr(layer, "quantization", None) is not None]
    allowed = {name: most_bytes(layer, SCHEMES[scheme]["bits"]) for name, layer in layers}
    held = {name for name, layer in layers if layer._packed is not None}
    for name, layer in layers:
        assert sum(parameter.numel() for parameter in layer.parameters()) == 0, name
        if name in held:
            assert bytes_of(layer.stored) <= allowed[name], name
    for name, moe in tree.named_modules():
        if isinstance(moe, MoE):
            together = moe._shared_along
            theirs = [part for part in allowed if part.startswith(f"{name}.") and (together or part not in held)]
            assert bytes_of(moe._stacked) <= sum(allowed[part] for part in theirs), name
            assert theirs or moe._stacked is None, name


def most_bytes(layer: Any, bits: int) -> int:
    """What a quantized layer's codes, scales and padding take at most."""
    rows, width = sum(layer.parts.values()), layer._in_features
    groups = width // 32  # torch's int4 product takes a scale and a zero for each 32 inputs of these widths
    padded = -(-width // 64) * 64  # as far as compiled panels go
    return int(-(-rows // 64) * 64 * (padded * bits // 8 + 4 * groups) + 16 * rows)


def bytes_of(value: Any) -> int:
    """What all tensors take that an object's fields and members hold."""
    if isinstance(value, Tensor):
        return value.nelement() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(map(bytes_of, value))
    return sum(map(bytes_of, vars(value).values())) if hasattr(value, "__dict__") else 0


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w8a8"])
def test_strict_kernels_have_what_they_need(sources: Any, scheme: str, tmp_path: Path) -> None:
    model, source = sources["moe"]
    quantized, _ = quantize_checkpoint(source, tmp_path, **SCHEMES[scheme])
    for dtype in ("bfloat16", "float32"):
        config = launch(model, quantized, dtype=dtype, strict_kernels=True).engine.config
        operations = {choice.operation for choice in config.kernels}
        assert {f"linear_{scheme}", f"experts_{scheme}", "linear"} <= operations
        others = {"w8a16", "w4a16", "w8a8"} - {scheme}
        assert not operations & {f"linear_{other}" for other in others}
