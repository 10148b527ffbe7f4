"""The native engine on the simulated device against the same engine on the CPU, in the same dtype.

Rounding differs: the CPU's kernels round more often than the fused operators. So texts are scored, not generated, and a
generated token may differ where the CPU's two best are closer than the bound.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.errors import HardwareError, UnsupportedError
from npu_zoo.core.sampling import StructuredOutputs
from npu_zoo.evaluation.comparison.divergence import Divergence
from npu_zoo.simulator import measure
from npu_zoo.testing.agreement import SCORED
from npu_zoo.testing.agreement import compare as agreement_of

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")
DUO = PRODUCT == "atlas_300i_duo"
DTYPES = ["float16"] if DUO else ["bfloat16", "float16"]
FAMILIES = ["deepseek_coder", "wizardcoder"] + ([] if DUO else ["deepseek_moe", "deepseek_v3"])
BOUND = {"float16": 0.06, "bfloat16": 0.5}
"""Natural-log probability; twice and more what was seen."""

TEXTS = [
    "def add(a, b):\n    return a + b\n\n\ndef mul(a, b):\n    return a * b\n",
    "import os\n\n\ndef main() -> None:\n    for name in os.listdir('.'):\n        print(name)\n",
    "class Stack:\n",
]

_ENGINES: dict[Any, LLM] = {}


def engine(family: str, hardware: str, dtype: str, **options: Any) -> LLM:
    key = (family, hardware, dtype, *sorted(options.items()))
    if key not in _ENGINES:
        shared: dict[str, Any] = {"max_model_len": 512, "kv_cache_memory": "64MiB"}
        _ENGINES[key] = LLM(model=f"{family}:demo", hardware=hardware, dtype=dtype, **shared, **options)
    return _ENGINES[key]


def compare(reference: list[Any], found: list[Any], bound: float) -> None:
    agreement = agreement_of(reference, found)
    assert agreement.within(bound), agreement


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
class TestFamily:
    def test_batched(self, family: str, dtype: str) -> None:
        reference = engine(family, "cpu", dtype).generate(TEXTS, SCORED)
        compare(reference, engine(family, PRODUCT, dtype).generate(TEXTS, SCORED), BOUND[dtype])

    def test_alone(self, family: str, dtype: str) -> None:
        reference = engine(family, "cpu", dtype).generate(TEXTS[:1], SCORED)
        compare(reference, engine(family, PRODUCT, dtype).generate(TEXTS[:1], SCORED), BOUND[dtype])

    def test_in_chunks(self, family: str, dtype: str) -> None:
        reference = engine(family, "cpu", dtype).generate(TEXTS, SCORED)
        chunked = engine(family, PRODUCT, dtype, max_num_batched_tokens=16, max_num_seqs=4)
        compare(reference, chunked.generate(TEXTS, SCORED), BOUND[dtype])

    def test_from_the_prefix_cache(self, family: str, dtype: str) -> None:
        shared = TEXTS[1] * 8
        prompts = [shared + "x = 1\n", shared + "y = 2\n"]
        params = SamplingParams(temperature=0, max_tokens=8, logprobs=2)
        reference = [engine(family, "cpu", dtype).generate([prompt], params)[0] for prompt in prompts]
        cached = engine(family, PRODUCT, dtype)
        found = [cached.generate([prompt], params)[0] for prompt in prompts]
        assert found[1].metrics.cached_tokens > 0
        compare(reference, found, BOUND[dtype])

    def test_graphs_equal_launching_one_by_one(self, family: str, dtype: str) -> None:
        params = SamplingParams(temperature=0, max_tokens=12, logprobs=1)
        prompts = [*TEXTS, TEXTS[0][:9], "x"]
        graphs = engine(family, PRODUCT, dtype).generate(prompts, params)
        eager = engine(family, PRODUCT, dtype, enforce_eager=True).generate(prompts, params)
        assert [o.outputs[0].token_ids for o in graphs] == [o.outputs[0].token_ids for o in eager]
        assert [o.outputs[0].cumulative_logprob for o in graphs] == [o.outputs[0].cumulative_logprob for o in eager]

    def test_a_decode_step_is_one_launch_and_one_copy_back(self, family: str, dtype: str) -> None:
        llm = engine(family, PRODUCT, dtype)
        steps = {}
        for tokens in (2, 10):
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            llm.generate(TEXTS[2:], params)  # captures
            with measure() as report:
                llm.generate(TEXTS[2:], params)
            steps[tokens] = report
        few, many = steps[2], steps[10]
        assert many.replays - few.replays == 8
        assert many.num_launches - few.num_launches == 8  # the choice of the token
        assert many.copies["device_to_host"][0] - few.copies["device_to_host"][0] == 8
        assert many.synchronisations - few.synchronisations == 8

    def test_no_operation_falls_back(self, family: str, dtype: str) -> None:
        strict = LLM(model=f"{family}:demo", hardware=PRODUCT, dtype=dtype, strict_kernels=True, max_model_len=64)
        strict.shutdown()


@pytest.mark.parametrize("dtype", DTYPES)
def test_contiguous_attention(dtype: str) -> None:
    reference = engine("deepseek_coder", "cpu", dtype).generate(TEXTS, SCORED)
    found = engine("deepseek_coder", PRODUCT, dtype, attention="flash").generate(TEXTS, SCORED)
    compare(reference, found, BOUND[dtype])


LAUNCHES = {"deepseek_coder": 10, "wizardcoder": 10}
"""Operator launches of a decoder layer in a decode step, where the family has one kind of layer."""


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("family", LAUNCHES)
def test_launches_of_a_layer(family: str) -> None:
    llm = engine(family, PRODUCT, "float16", enforce_eager=True)
    layers = llm.engine.config.model_config.num_hidden_layers
    per_layer = {}
    for tokens in (1, 9):
        with measure() as report:
            llm.generate(TEXTS[2:], SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
        per_layer[tokens] = report.launches
    decode = {name: (count - per_layer[1].get(name, 0)) / 8 for name, count in per_layer[9].items()}
    inside = {
        "aclnnAddRmsNorm": 2, "aclnnApplyRotaryPosEmbV2": 1, "aclnnFusedInferAttentionScoreV3": 1,
        "aclnnGroupedMatmulV5": 1, "aclnnScatterPaKvCache": 1, "aclnnSwiGlu": 1, "aclnnMatmul": 3,
    }  # fmt: skip
    assert sum(inside.values()) == LAUNCHES[family]
    for name, count in inside.items():
        assert decode[name] == count * layers + (name == "aclnnMatmul"), (name, decode[name])  # one more for the head


@pytest.mark.chip("ascend310p")
@pytest.mark.parametrize("family", ["deepseek_moe", "deepseek_v3"])
def test_experts_and_latents_are_refused_on_310p(family: str) -> None:
    with pytest.raises(UnsupportedError, match="atlas_300i_duo"):
        LLM(model=f"{family}:demo", hardware=PRODUCT, dtype="float16")


@pytest.mark.chip("ascend310p")
def test_bfloat16_is_refused_on_310p() -> None:
    with pytest.raises(UnsupportedError, match="bfloat16"):
        LLM(model="wizardcoder:demo", hardware=PRODUCT, dtype="bfloat16")


@pytest.mark.chip("ascend310p")
def test_blocks_too_large_for_310p_are_refused() -> None:
    with pytest.raises(HardwareError, match="block size 256"):
        LLM(model="deepseek_coder:demo", hardware=PRODUCT, dtype="float16", block_size=256)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
        {"temperature": 1.0, "min_p": 0.05, "n": 3},
        {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    ],
    ids=["top", "several", "penalties"],
)
def test_draws_depend_on_the_request_alone(params: dict[str, Any]) -> None:
    wanted = SamplingParams(max_tokens=10, seed=5, **params)  # without a draw that rounding could turn
    together = engine("deepseek_coder", PRODUCT, "float16").generate(TEXTS, wanted)
    alone = [engine("deepseek_coder", PRODUCT, "float16").generate([text], wanted)[0] for text in TEXTS]
    eager = engine("deepseek_coder", PRODUCT, "float16", enforce_eager=True).generate(TEXTS, wanted)
    tokens = [[[c.token_ids for c in o.outputs] for o in outputs] for outputs in (together, alone, eager)]
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_keep_mindies_rule(family: str) -> None:
    """In float16: what `npu-zoo eval compare` asks of two products."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, prompt_logprobs_start=4, prompt_logits=True)
    runs = [engine(family, hardware, "float16").generate(TEXTS, params) for hardware in ("cpu", PRODUCT)]
    divergence = Divergence()
    for number, (expected, output) in enumerate(zip(*runs, strict=True)):
        assert len(output.prompt_logits) == len(output.prompt_token_ids) - 3
        divergence.add(str(number), [(expected.prompt_logits, output.prompt_logits)])
    assert not divergence.invalid
    assert divergence.passes, divergence


def test_penalties_equal_the_cpus() -> None:
    wanted = SamplingParams(temperature=0, max_tokens=10, repetition_penalty=1.3, presence_penalty=0.5, logprobs=2)
    reference = engine("deepseek_coder", "cpu", "float16").generate(TEXTS, wanted)
    compare(reference, engine("deepseek_coder", PRODUCT, "float16").generate(TEXTS, wanted), BOUND["float16"])


def test_outputs_of_a_form_and_biased_ones() -> None:
    llm = engine("deepseek_coder", PRODUCT, DTYPES[0])
    forms = [StructuredOutputs(regex=r"[a-f]{3}-\d{2}"), StructuredOutputs(choice=("yes", "no"))]
    params = [SamplingParams(temperature=0, max_tokens=24, structured_outputs=form) for form in forms]
    params.append(SamplingParams(seed=1, max_tokens=24, structured_outputs=forms[0], min_tokens=20))
    params.append(SamplingParams(temperature=0, max_tokens=4, logit_bias={40: 100}, ignore_eos=True))
    shaped, chosen, sampled, biased = (o.outputs[0] for o in llm.generate([TEXTS[0]] * 4, params))
    assert re.fullmatch(r"[a-f]{3}-\d{2}", shaped.text)
    assert chosen.text in ("yes", "no")
    assert re.fullmatch(r"[a-f]{3}-\d{2}", sampled.text)
    assert biased.token_ids == [40] * 4
